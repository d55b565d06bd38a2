"""Gluon pass 3, for Hopper, where it summarises: what a segment's outputs give to the gradient of its incoming state.

The mathematics is that of :mod:`.triton_reverse` from a gradient of zero; how it is done, that of :mod:`.gluon_states`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gluon_chunk import (
    SCALES,
    STATES,
    TILE,
    VALUES,
    WIDTH,
    add,
    barrier,
    fetch_chunk,
    leave_out,
    lost_rows,
    lost_rows_in,
    new_mbarriers,
    row_of,
    scaled,
)
from .helpers import hashed
from .triton_prepare import SEVERAL
from .triton_states import LOOK, UNDERFLOW


@hashed
@gluon.jit
def _first_underflow(bound, first, stop, layout: gl.constexpr):
    """As :func:`.triton_reverse.first_underflow`."""
    c = first + gl.arange(0, LOOK, layout=layout)
    there = c < stop
    left = gl.associative_scan(gl.load(bound + c, mask=there, other=0.0), 0, add)
    return gl.min(gl.where(there & (left < UNDERFLOW), c + 1, stop), 0)


@gluon.jit
def _expect_chunk(k_bars, q_bars, do_bars, A_bars, P_bars, scales_bars, half, wanted, W: gl.constexpr):
    mbarrier.expect(k_bars.index(half), 64 * W * 2, pred=wanted)
    mbarrier.expect(q_bars.index(half), 64 * W * 2, pred=wanted)
    mbarrier.expect(do_bars.index(half), 64 * W * 2, pred=wanted)
    mbarrier.expect(A_bars.index(half), 64 * 64 * 2, pred=wanted)
    mbarrier.expect(P_bars.index(half), 64 * 64 * 2, pred=wanted)
    mbarrier.expect(scales_bars.index(half), 256 * 4, pred=wanted)


@gluon.jit(
    do_not_specialize=["T", "NC", "segment_chunks", "B", "N", "row0"],
    do_not_specialize_on_alignment=["doc"],
)
def whole_reverse_kernel(
    q, k, do, A, P, scales, rows, through, bound, doc, need, D,
    T, NC, segment_chunks, B, N, row0,
    H: gl.constexpr, G: gl.constexpr, HAS_DOC: gl.constexpr,
):  # fmt: skip
    W: gl.constexpr = WIDTH
    dtype: gl.constexpr = k.dtype
    wide: gl.constexpr = STATES
    new: gl.constexpr = VALUES
    of_new: gl.constexpr = gl.DotOperandLayout(0, new, 2)
    of_wide: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    tile: gl.constexpr = TILE
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    each: gl.constexpr = gl.BlockedLayout([4], [32], [8], [0])
    loads: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0])

    n = gl.program_id(0)
    local = gl.program_id(1)
    row = row0 + local
    HV: gl.constexpr = H * G
    ib = row // HV
    hv = row % HV
    ih = hv // G
    if gl.load(need + n) == 0:
        return
    first = n * segment_chunks
    stop = _first_underflow(bound + row.to(gl.int64) * NC, first, gl.minimum(first + segment_chunks, NC), each)
    chunks = stop - first

    k_mem = gl.allocate_shared_memory(dtype, [2, 64, W], tile)
    q_mem = gl.allocate_shared_memory(dtype, [2, 64, W], tile)
    do_mem = gl.allocate_shared_memory(dtype, [2, 64, W], tile)
    A_mem = gl.allocate_shared_memory(dtype, [2, 64, 64], tile)
    P_mem = gl.allocate_shared_memory(dtype, [2, 64, 64], tile)
    scales_mem = gl.allocate_shared_memory(gl.float32, [2, 1, 256], SCALES)
    if HAS_DOC:
        doc_at = gl.allocate_shared_memory(gl.int32, [64], line)
    k_bars = new_mbarriers()
    q_bars = new_mbarriers()
    do_bars = new_mbarriers()
    A_bars = new_mbarriers()
    P_bars = new_mbarriers()
    scales_bars = new_mbarriers()
    fence_async_shared()
    barrier()
    for j in gl.static_range(2):
        _expect_chunk(k_bars, q_bars, do_bars, A_bars, P_bars, scales_bars, j, j < chunks, W)
    barrier()
    for j in gl.static_range(2):
        wanted = j < chunks
        c = stop - 1 - j
        at_tile = row * NC + c
        fetch_chunk(k, k_bars.index(j), k_mem.index(j), ib, c, ih, wanted, W)
        tma.async_copy_global_to_shared(scales, [at_tile, 0], scales_bars.index(j), scales_mem.index(j), pred=wanted)
        fetch_chunk(do, do_bars.index(j), do_mem.index(j), ib, c, hv, wanted, W)
        tma.async_copy_global_to_shared(P, [at_tile * 64, 0], P_bars.index(j), P_mem.index(j), pred=wanted)
        tma.async_copy_global_to_shared(A, [at_tile * 64, 0], A_bars.index(j), A_mem.index(j), pred=wanted)
        fetch_chunk(q, q_bars.index(j), q_mem.index(j), ib, c, ih, wanted, W)
    through += row.to(gl.int64) * NC
    rows += row.to(gl.int64) * NC * 512 + 64
    passes_next = gl.load(through + stop - 1, mask=chunks > 0, other=0.0)
    any_sees_next = 1.0
    if HAS_DOC:
        any_sees_next = gl.load(rows + (stop - 1).to(gl.int64) * 512, mask=chunks > 0, other=0.0)
    dS = gl.zeros([W, W], gl.float32, wide)
    zero_new = gl.zeros([W, 64], gl.float32, new)

    for i in range(0, chunks):
        c = stop - 1 - i
        half = i & 1
        phase = (i // 2) & 1
        following = gl.maximum(c - 1, first)
        passes = passes_next
        any_sees = any_sees_next
        passes_next = gl.load(through + following)
        if HAS_DOC:
            any_sees_next = gl.load(rows + following.to(gl.int64) * 512)
        k_now = k_mem.index(half)
        scales_at = scales_mem.index(half)._reinterpret(gl.float32, [256], line)

        if HAS_DOC:  # noqa: SIM102 (a constant, and a number of the device's)
            if passes < 0.0:  # several documents
                lost = gl.sum(lost_rows(dS), 0)
                dS_lost = gl.where(lost == lost, 0, 1)
                mbarrier.wait(do_bars.index(half), phase)
                do_lost = gl.max(lost_rows_in(do_mem.index(half), 64, loads), 0)
                if (passes < SEVERAL) | (dS_lost + do_lost != 0):  # seldom
                    mbarrier.wait(k_bars.index(half), phase)
                    mbarrier.wait(q_bars.index(half), phase)
                    mbarrier.wait(scales_bars.index(half), phase)
                    t = gl.minimum(c * 64 + gl.arange(0, 64, layout=each), T - 1)
                    doc_at.store(gl.load(doc + ib.to(gl.int64) * T + t).to(gl.int32))
                    barrier()
                    first_lost = leave_out(
                        q_mem.index(half), k_now, do_mem.index(half), scales_at, doc_at, dS_lost, 0, loads
                    )
                    passes = gl.where(first_lost & (any_sees != 0.0), float("nan"), 0.0)
                else:
                    passes = 0.0
        held = gl.convert_layout(dS.to(dtype), of_new)
        mbarrier.wait(k_bars.index(half), phase)
        dnew = warpgroup_mma(held, k_now.permute((1, 0)), zero_new, use_acc=False, is_async=True)
        dS = scaled(passes, dS, HAS_DOC)
        mbarrier.wait(scales_bars.index(half), phase)
        mbarrier.wait(do_bars.index(half), phase)
        seen = do_mem.index(half).permute((1, 0)).load(new).to(gl.float32)
        seen = scaled(row_of(scales_at, 0, new), seen, HAS_DOC).to(dtype)
        weight = row_of(scales_at, 128, new)  # scales are fetched before a product is waited for
        dnew = warpgroup_mma_wait(0, deps=[dnew])
        dnew = scaled(weight, dnew, HAS_DOC)
        mbarrier.wait(P_bars.index(half), phase)
        dnew = warpgroup_mma(do_mem.index(half).permute((1, 0)), P_mem.index(half), dnew, is_async=True)
        mbarrier.wait(q_bars.index(half), phase)
        dS = warpgroup_mma(gl.convert_layout(seen, of_wide), q_mem.index(half), dS, is_async=True)
        weight = row_of(scales_at, 192, new)
        dnew = warpgroup_mma_wait(1, deps=[dnew])
        dnew = (dnew * weight).to(dtype)
        mbarrier.wait(A_bars.index(half), phase)
        dnew = warpgroup_mma(
            gl.convert_layout(dnew, of_new), A_mem.index(half), zero_new, use_acc=False, is_async=True
        )
        weight = row_of(scales_at, 64, new)
        dnew, dS = warpgroup_mma_wait(0, deps=[dnew, dS])
        erased = scaled(weight, -dnew, HAS_DOC).to(dtype)
        dS = warpgroup_mma(gl.convert_layout(erased, of_wide), k_now, dS, is_async=True)
        dS = warpgroup_mma_wait(0, deps=[dS])
        if HAS_DOC:  # see triton_reverse
            dS = gl.where(any_sees != 0.0, dS, 0.0)
        wanted = i + 2 < chunks
        _expect_chunk(k_bars, q_bars, do_bars, A_bars, P_bars, scales_bars, half, wanted, W)
        barrier()  # nothing reads this half any more
        at_tile = row * NC + c - 2
        fetch_chunk(k, k_bars.index(half), k_mem.index(half), ib, c - 2, ih, wanted, W)
        tma.async_copy_global_to_shared(
            scales, [at_tile, 0], scales_bars.index(half), scales_mem.index(half), pred=wanted
        )
        fetch_chunk(do, do_bars.index(half), do_mem.index(half), ib, c - 2, hv, wanted, W)
        tma.async_copy_global_to_shared(P, [at_tile * 64, 0], P_bars.index(half), P_mem.index(half), pred=wanted)
        tma.async_copy_global_to_shared(A, [at_tile * 64, 0], A_bars.index(half), A_mem.index(half), pred=wanted)
        fetch_chunk(q, q_bars.index(half), q_mem.index(half), ib, c - 2, ih, wanted, W)
    cv = gl.expand_dims(gl.arange(0, W, layout=gl.SliceLayout(1, wide)), 1)
    ck = gl.expand_dims(gl.arange(0, W, layout=gl.SliceLayout(0, wide)), 0)
    state_row = ((n * B + ib) * HV + hv).to(gl.int64)
    gl.store(D + state_row * W * W + ck * W + cv, dS)
