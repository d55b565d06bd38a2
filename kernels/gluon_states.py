"""Gluon pass 2, for Hopper: the recurrence over the chunks of each segment.

The mathematics and the three uses are those of :mod:`.triton_states`. There a program has a block of the state's
columns, and fetches a chunk's keys, queries and tiles for that block alone; here it has the whole state of a value
head, transposed, in the registers of eight warps, as the left operand of every product. What a chunk needs from memory
comes through the tensor memory accelerator while the chunk before it is worked on, and its results leave the same way.
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
    TOKENS,
    VALUES,
    WIDTH,
    add,
    arrived,
    barrier,
    clear_rows,
    fetch_chunk,
    finite,
    new_mbarriers,
    row_of,
    scaled,
)
from .helpers import hashed
from .triton_prepare import SEVERAL
from .triton_states import LOOK, UNDERFLOW


@hashed
@gluon.jit
def _last_underflow(bound, first, stop, layout: gl.constexpr):
    """As :func:`.triton_states.last_underflow`."""
    c = stop - LOOK + gl.arange(0, LOOK, layout=layout)
    there = c >= first
    left = gl.associative_scan(gl.load(bound + c, mask=there, other=0.0), 0, add, reverse=True)
    return gl.max(gl.where(there & (left < UNDERFLOW), c, first), 0)


@gluon.jit(do_not_specialize=["T", "NC", "segment_chunks", "B", "N", "row0", "every"])
def whole_states_kernel(
    q, k, v, A, P, scales, o, states, errors, through, bound, need, incoming, M, U, forgets,
    T, NC, segment_chunks, B, N, row0, every,
    H: gl.constexpr, G: gl.constexpr, HAS_DOC: gl.constexpr,
    SUMMARY: gl.constexpr, OUTPUT: gl.constexpr, KEEP: gl.constexpr,
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
    row = row0 + local * every
    HV: gl.constexpr = H * G
    ib = row // HV
    hv = row % HV
    ih = hv // G
    state_row = ((n * B + ib) * HV + hv).to(gl.int64)
    is_M = False
    if SUMMARY:
        is_M = gl.program_id(2) == 1
        if gl.load(need + n * 2 + gl.program_id(2)) == 0:
            return
    has_v = not is_M
    cv = gl.expand_dims(gl.arange(0, W, layout=gl.SliceLayout(1, wide)), 1)
    ck = gl.expand_dims(gl.arange(0, W, layout=gl.SliceLayout(0, wide)), 0)
    first = n * segment_chunks
    stop = gl.minimum(first + segment_chunks, NC)
    if SUMMARY:
        S = gl.where((ck == cv) & is_M, 1.0, 0.0)
        start = _last_underflow(bound + row.to(gl.int64) * NC, first, stop, each)
        if is_M:
            gl.store(forgets + state_row, (start > first).to(gl.int32))
        if start > first:
            S = gl.zeros([W, W], gl.float32, wide)
            if is_M:
                start = stop
        first = start
    chunks = stop - first

    k_mem = gl.allocate_shared_memory(dtype, [2, 64, W], tile)
    v_mem = gl.allocate_shared_memory(dtype, [2, 64, W], tile)
    A_mem = gl.allocate_shared_memory(dtype, [2, 64, 64], tile)
    scales_mem = gl.allocate_shared_memory(gl.float32, [2, 1, 256], SCALES)
    k_bars = new_mbarriers()
    v_bars = new_mbarriers()
    A_bars = new_mbarriers()
    scales_bars = new_mbarriers()
    if OUTPUT:
        q_mem = gl.allocate_shared_memory(dtype, [2, 64, W], tile)
        P_mem = gl.allocate_shared_memory(dtype, [2, 64, 64], tile)
        q_bars = new_mbarriers()
        P_bars = new_mbarriers()
    if not SUMMARY:
        out_mem = gl.allocate_shared_memory(dtype, [64, W], tile)  # outputs or errors
    if KEEP:
        S_mem = gl.allocate_shared_memory(dtype, [W, W], tile)
    fence_async_shared()
    barrier()
    for j in gl.static_range(2):
        wanted = j < chunks
        mbarrier.expect(k_bars.index(j), 64 * W * 2, pred=wanted)
        mbarrier.expect(v_bars.index(j), 64 * W * 2, pred=wanted & has_v)
        mbarrier.expect(A_bars.index(j), 64 * 64 * 2, pred=wanted)
        mbarrier.expect(scales_bars.index(j), 256 * 4, pred=wanted)
        if OUTPUT:
            mbarrier.expect(q_bars.index(j), 64 * W * 2, pred=wanted)
            mbarrier.expect(P_bars.index(j), 64 * 64 * 2, pred=wanted)
    barrier()
    for j in gl.static_range(2):
        wanted = j < chunks
        c = first + j
        at_tile = row * NC + c
        fetch_chunk(k, k_bars.index(j), k_mem.index(j), ib, c, ih, wanted, W)
        fetch_chunk(v, v_bars.index(j), v_mem.index(j), ib, c, hv, wanted & has_v, W)
        tma.async_copy_global_to_shared(A, [at_tile * 64, 0], A_bars.index(j), A_mem.index(j), pred=wanted)
        tma.async_copy_global_to_shared(scales, [at_tile, 0], scales_bars.index(j), scales_mem.index(j), pred=wanted)
        if OUTPUT:
            fetch_chunk(q, q_bars.index(j), q_mem.index(j), ib, c, ih, wanted, W)
            tma.async_copy_global_to_shared(P, [at_tile * 64, 0], P_bars.index(j), P_mem.index(j), pred=wanted)
    through += row.to(gl.int64) * NC
    passes_next = gl.load(through + first, mask=chunks > 0, other=0.0)
    if not SUMMARY:
        S = arrived(gl.load(incoming + state_row * W * W + ck * W + cv))
    zero_new = gl.zeros([W, 64], gl.float32, new)

    for i in range(0, chunks):
        c = first + i
        half = i & 1
        phase = (i // 2) & 1
        passes = passes_next
        passes_next = gl.load(through + gl.minimum(c + 1, stop - 1))
        k_now = k_mem.index(half)
        scales_at = scales_mem.index(half)._reinterpret(gl.float32, [256], line)

        if HAS_DOC:
            several = passes < 0.0
            if passes < SEVERAL:  # seldom: without spoilt keys
                mbarrier.wait(k_bars.index(half), phase)
                mbarrier.wait(scales_bars.index(half), phase)
                clear_rows(k_now, scales_at.slice(0, 64), loads)
                fence_async_shared()
                barrier()
            passes = gl.where(several, 0.0, passes)
        low = S.to(dtype)
        held = gl.convert_layout(low, of_new)
        mbarrier.wait(k_bars.index(half), phase)
        error = warpgroup_mma(held, k_now.permute((1, 0)), zero_new, use_acc=False, is_async=True)
        if OUTPUT:
            mbarrier.wait(q_bars.index(half), phase)
            out = warpgroup_mma(held, q_mem.index(half).permute((1, 0)), zero_new, use_acc=False, is_async=True)
        if not SUMMARY:
            tma.store_wait(0)  # of the chunk before this one
            barrier()
        if KEEP:
            S_mem.store(low)
        mbarrier.wait(scales_bars.index(half), phase)
        if SUMMARY:
            value = zero_new
            if has_v:
                mbarrier.wait(v_bars.index(half), phase)
                value = v_mem.index(half).permute((1, 0)).load(new).to(gl.float32)
        else:
            mbarrier.wait(v_bars.index(half), phase)
            value = v_mem.index(half).permute((1, 0)).load(new).to(gl.float32)
        weight = row_of(scales_at, 64, new)  # scales are fetched before a product is waited for
        error = warpgroup_mma_wait(1 if OUTPUT else 0, deps=[error])
        error = value - scaled(weight, error, HAS_DOC)
        if HAS_DOC:
            error = gl.where(several & (finite(error) == 0), 0.0, error)
        mbarrier.wait(A_bars.index(half), phase)
        error = warpgroup_mma(
            gl.convert_layout(error.to(dtype), of_new), A_mem.index(half).permute((1, 0)), zero_new, use_acc=False,
            is_async=True,
        )  # fmt: skip
        S = scaled(passes, S, HAS_DOC)
        bt = row_of(scales_at, 192, new)
        if OUTPUT:
            weight = row_of(scales_at, 0, new)
            out, error = warpgroup_mma_wait(0, deps=[out, error])
            out = scaled(weight, out, HAS_DOC)
            mbarrier.wait(P_bars.index(half), phase)
        else:
            error = warpgroup_mma_wait(0, deps=[error])
        values = bt * error
        if OUTPUT:
            out = warpgroup_mma(
                gl.convert_layout(values.to(dtype), of_new), P_mem.index(half).permute((1, 0)), out, is_async=True
            )
        left = scaled(row_of(scales_at, 128, new), values, HAS_DOC).to(dtype)
        S = warpgroup_mma(gl.convert_layout(left, of_wide), k_now, S, is_async=True)
        if KEEP:
            out_mem.permute((1, 0)).store(error.to(dtype))
        if OUTPUT:
            out, S = warpgroup_mma_wait(0, deps=[out, S])  # apart they bring the assembler down
            out_mem.permute((1, 0)).store(out.to(dtype))
        else:
            S = warpgroup_mma_wait(0, deps=[S])
        wanted = i + 2 < chunks
        mbarrier.expect(k_bars.index(half), 64 * W * 2, pred=wanted)
        mbarrier.expect(v_bars.index(half), 64 * W * 2, pred=wanted & has_v)
        mbarrier.expect(A_bars.index(half), 64 * 64 * 2, pred=wanted)
        mbarrier.expect(scales_bars.index(half), 256 * 4, pred=wanted)
        if OUTPUT:
            mbarrier.expect(q_bars.index(half), 64 * W * 2, pred=wanted)
            mbarrier.expect(P_bars.index(half), 64 * 64 * 2, pred=wanted)
        if not SUMMARY:
            fence_async_shared()
        barrier()  # nothing reads this half any more, and the results are there
        at_tile = row * NC + c + 2
        fetch_chunk(k, k_bars.index(half), k_mem.index(half), ib, c + 2, ih, wanted, W)
        fetch_chunk(v, v_bars.index(half), v_mem.index(half), ib, c + 2, hv, wanted & has_v, W)
        tma.async_copy_global_to_shared(A, [at_tile * 64, 0], A_bars.index(half), A_mem.index(half), pred=wanted)
        tma.async_copy_global_to_shared(
            scales, [at_tile, 0], scales_bars.index(half), scales_mem.index(half), pred=wanted
        )
        if OUTPUT:
            fetch_chunk(q, q_bars.index(half), q_mem.index(half), ib, c + 2, ih, wanted, W)
            tma.async_copy_global_to_shared(P, [at_tile * 64, 0], P_bars.index(half), P_mem.index(half), pred=wanted)
            tma.async_copy_shared_to_global(o, [ib, c * 64, hv, 0], out_mem._reinterpret(dtype, [1, 64, 1, W], TOKENS))
        if KEEP:
            at = local * NC + c
            tma.async_copy_shared_to_global(states, [at * W, 0], S_mem)
            tma.async_copy_shared_to_global(errors, [at * 64, 0], out_mem)
    if SUMMARY:
        if is_M:
            gl.store(M + state_row * W * W + ck * W + cv, S)
        else:
            gl.store(U + state_row * W * W + ck * W + cv, S)
    else:
        tma.store_wait(0)
