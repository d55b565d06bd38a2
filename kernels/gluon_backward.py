"""Gluon passes 3 and 4 in one, for Hopper: the reverse recurrence and the gradients of each chunk's inputs.

The mathematics is that of :mod:`.triton_reverse` and :mod:`.triton_gradients`. There the gradient of every chunk's
state goes through memory, and so do the tiles of the pairs; here one program takes a value head of a segment, right to
left, and all of a chunk stays on the multiprocessor. Eight warps hold dS, transposed, in registers (64 of a thread's
255); what a chunk needs from memory comes through the tensor memory accelerator, each array into shared memory as soon
as the last use of the chunk behind it is over. Matrix instructions are issued before their results are waited for.
Few may spill: shared memory leaves the first cache 10 KiB.

The value heads of a key head are launched one after another. Each but the first adds to what dq and dk hold so far, and
the last takes them through the norm: in memory there are no other parts of them.

It leaves ``parts`` as the kernels there, but where a row lies in two warps each has its half of the sum: warps wait for
each other at barriers, of which a sum over all of them takes two. (Of the pairs' dbeta there are quarters.)

Long because it is one loop, in which each line's place decides what waits for what.
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
    arrived,
    barrier,
    column_of,
    decays_of,
    fetch_chunk,
    kept_pairs,
    leave_out,
    lost_rows_in,
    new_mbarrier,
    new_mbarriers,
    row_of,
    scaled,
)
from .triton_prepare import SEVERAL


@gluon.jit
def _nil(i):
    """0, unknown to the compiler: an address that hangs on it is worked out where it is used, not kept through the loop
    in a register that is wanted for the state."""
    return gl.inline_asm_elementwise("mov.b32 $0, 0; // $1", "=r,r", [i], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@gluon.jit
def _store_halves(at, x, columns: gl.constexpr):
    """Sums of the rows of x, [64, 2 * columns], in two halves."""
    sums = gl.sum(gl.reshape(x, [64, 2, columns]), 2)
    i = gl.arange(0, 64, layout=gl.SliceLayout(1, sums.type.layout))
    half = gl.arange(0, 2, layout=gl.SliceLayout(0, sums.type.layout))
    gl.store(at + gl.expand_dims(i, 1) * 2 + gl.expand_dims(half, 0), sums)


@gluon.jit
def _store_quarters(at, x):
    """Sums of the columns of x, [64, 64], in four quarters."""
    sums = gl.sum(gl.reshape(x, [4, 16, 64]), 1)
    quarter = gl.arange(0, 4, layout=gl.SliceLayout(1, sums.type.layout))
    j = gl.arange(0, 64, layout=gl.SliceLayout(0, sums.type.layout))
    gl.store(at + gl.expand_dims(quarter, 1) * 64 + gl.expand_dims(j, 0), sums)


@gluon.jit(
    do_not_specialize=["T", "NC", "segment_chunks", "B", "row0"],
    do_not_specialize_on_alignment=["doc"],
)
def backward_kernel(
    q, k, do, states, errors, A, P, dv, dq, dk, scales, dq_sum, dk_sum, rows, through, doc, outgoing, parts,
    T, NC, segment_chunks, B, row0, scale,
    H: gl.constexpr, G: gl.constexpr, HAS_G: gl.constexpr, HAS_DOC: gl.constexpr, NORM: gl.constexpr,
    SUM: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    W: gl.constexpr = WIDTH
    dtype: gl.constexpr = q.dtype
    wide: gl.constexpr = STATES
    new: gl.constexpr = VALUES
    long: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 64, 16])  # [64, K]
    pair: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16])  # [64, 64]
    of_new: gl.constexpr = gl.DotOperandLayout(0, new, 2)
    of_wide: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    tile: gl.constexpr = TILE
    tokens: gl.constexpr = TOKENS
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    flat64: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    loads: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0])
    pair_j: gl.constexpr = gl.SliceLayout(0, pair)
    pair_i: gl.constexpr = gl.SliceLayout(1, pair)
    long_i: gl.constexpr = gl.SliceLayout(1, long)

    n = gl.program_id(0)
    local = gl.program_id(1)
    row = row0 + local * G
    HV: gl.constexpr = H * G
    ib = row // HV
    hv = row % HV
    ih = hv // G
    first = n * segment_chunks
    stop = gl.minimum(first + segment_chunks, NC)
    chunks = stop - first
    if chunks <= 0:
        return

    k_at = gl.allocate_shared_memory(dtype, [2, 64, W], tile)
    q_mem = gl.allocate_shared_memory(dtype, [1, 64, W], tile)
    do_mem = gl.allocate_shared_memory(dtype, [1, 64, W], tile)
    errors_mem = gl.allocate_shared_memory(dtype, [1, 64, W], tile)
    S_mem = gl.allocate_shared_memory(dtype, [1, W, W], tile)
    A_mem = gl.allocate_shared_memory(dtype, [1, 64, 64], tile)
    P_mem = gl.allocate_shared_memory(dtype, [1, 64, 64], tile)
    dS_mem = gl.allocate_shared_memory(dtype, [1, W, W], tile)
    dv_mem = gl.allocate_shared_memory(dtype, [1, 64, W], tile)  # then dq on its way out
    pairs_mem = gl.allocate_shared_memory(dtype, [3, 64, 64], tile)  # dqk, dkk and logs; then dk on its way out
    ones_mem = gl.allocate_shared_memory(gl.bfloat16, [1, 64, 64], tile)
    rows_mem = gl.allocate_shared_memory(gl.float32, [2, 1, 512], SCALES)
    doc_at = gl.allocate_shared_memory(gl.int32, [64], line)
    k_bars = new_mbarriers()
    rows_bars = new_mbarriers()
    q_bar = new_mbarrier()
    do_bar = new_mbarrier()
    P_bar = new_mbarrier()
    A_bar = new_mbarrier()
    errors_bar = new_mbarrier()
    S_bar = new_mbarrier()
    fence_async_shared()
    barrier()

    # What the first chunk needs, and of the second one k and the scales.
    c = stop - 1
    at_kept = local * NC + c
    at_tile = row * NC + c
    two = chunks > 1
    mbarrier.expect(k_bars.index(0), 64 * W * 2)
    mbarrier.expect(k_bars.index(1), 64 * W * 2, pred=two)
    mbarrier.expect(rows_bars.index(0), 512 * 4)
    mbarrier.expect(rows_bars.index(1), 512 * 4, pred=two)
    mbarrier.expect(do_bar, 64 * W * 2)
    mbarrier.expect(P_bar, 64 * 64 * 2)
    mbarrier.expect(A_bar, 64 * 64 * 2)
    mbarrier.expect(errors_bar, 64 * W * 2)
    mbarrier.expect(S_bar, W * W * 2)
    mbarrier.expect(q_bar, 64 * W * 2)
    barrier()
    fetch_chunk(k, k_bars.index(0), k_at.index(0), ib, c, ih, True, W)
    tma.async_copy_global_to_shared(scales, [at_tile, 0], rows_bars.index(0), rows_mem.index(0))
    fetch_chunk(do, do_bar, do_mem.index(0), ib, c, hv, True, W)
    tma.async_copy_global_to_shared(P, [at_tile * 64, 0], P_bar, P_mem.index(0))
    tma.async_copy_global_to_shared(A, [at_tile * 64, 0], A_bar, A_mem.index(0))
    tma.async_copy_global_to_shared(errors, [at_kept * 64, 0], errors_bar, errors_mem.index(0))
    tma.async_copy_global_to_shared(states, [at_kept * W, 0], S_bar, S_mem.index(0))
    fetch_chunk(q, q_bar, q_mem.index(0), ib, c, ih, True, W)
    fetch_chunk(k, k_bars.index(1), k_at.index(1), ib, c - 1, ih, two, W)
    tma.async_copy_global_to_shared(scales, [at_tile - 1, 0], rows_bars.index(1), rows_mem.index(1), pred=two)

    r64 = gl.arange(0, 64, layout=flat64)
    at_tile64 = at_tile.to(gl.int64)
    if HAS_DOC:
        doc_at.store(gl.load(doc + ib.to(gl.int64) * T + gl.minimum(c * 64 + r64, T - 1)).to(gl.int32))
    passes_next = gl.load(through + at_tile64)
    any_sees_next = gl.load(rows + at_tile64 * 512 + 64)

    cv = gl.arange(0, W, layout=gl.SliceLayout(1, wide))
    ck = gl.arange(0, W, layout=gl.SliceLayout(0, wide))
    state_row = ((n * B + ib) * HV + hv).to(gl.int64)
    dS = arrived(gl.load(outgoing + state_row * W * W + gl.expand_dims(ck, 0) * W + gl.expand_dims(cv, 1)))
    ri = gl.expand_dims(gl.arange(0, 64, layout=pair_i), 1)
    rj = gl.expand_dims(gl.arange(0, 64, layout=pair_j), 0)
    ones_mem.index(0).store(gl.where(ri <= rj, 1.0, 0.0).to(gl.bfloat16))
    zero_new = gl.zeros([W, 64], gl.float32, new)
    zero_long = gl.zeros([64, W], gl.float32, long)
    zero_pair = gl.zeros([64, 64], gl.float32, pair)

    for i in range(0, chunks):
        nil = _nil(i)
        dS_at = dS_mem.index(nil)
        do_at = do_mem.index(nil)
        errors_at = errors_mem.index(nil)
        S_at = S_mem.index(nil)
        q_at = q_mem.index(nil)
        P_at = P_mem.index(nil)
        A_at = A_mem.index(nil)
        c = stop - 1 - i
        more = i + 1 < chunks
        following = gl.maximum(c - 1, first)
        at_kept = local * NC + following
        at_tile = row * NC + following
        next_tile = at_tile.to(gl.int64)
        half = i & 1
        phase = i & 1
        k_now = k_at.index(half)
        rows_at = rows_mem.index(half + nil)._reinterpret(gl.float32, [512], line)
        if HAS_DOC:
            doc_next = gl.load(doc + ib.to(gl.int64) * T + gl.minimum(following * 64 + r64, T - 1)).to(gl.int32)
        passes = passes_next
        any_sees = any_sees_next
        passes_next = gl.load(through + next_tile)
        any_sees_next = gl.load(rows + next_tile * 512 + 64)

        # The recurrence's chain of products; behind them, those of queries with keys and of dO with errors.
        dS_at.store(dS.to(dtype))
        fence_async_shared()
        barrier()
        if HAS_DOC:
            left_out = 0
            if passes < 0.0:  # several documents
                mbarrier.wait(do_bar, phase)
                mbarrier.wait(S_bar, phase)
                # 32 flags of each, added as one number: every sum over all warps keeps a register through the loop.
                lost = lost_rows_in(do_at, 64, loads)
                lost += 64 * lost_rows_in(S_at, W, loads) + 4096 * lost_rows_in(dS_at, W, loads)
                lost = gl.sum(lost, 0)
                if (passes < SEVERAL) | (lost != 0):  # seldom
                    mbarrier.wait(k_bars.index(half), (i // 2) & 1)
                    mbarrier.wait(q_bar, phase)
                    mbarrier.wait(rows_bars.index(half), (i // 2) & 1)
                    first_lost = leave_out(q_at, k_now, do_at, rows_at, doc_at, lost & -4096, lost & 4032, loads)
                    rk_at = rows_at.slice(448, 64)  # it scales no pairs but theirs, each with itself: those become NaN
                    rk_at.store(gl.where(doc_at.load(long_i) < 0, float("nan"), rk_at.load(long_i)))
                    left_out = 1
                    passes = gl.where(first_lost & (any_sees != 0.0), float("nan"), 0.0)
                else:
                    passes = 0.0
        mbarrier.wait(k_bars.index(half), (i // 2) & 1)
        dnew = warpgroup_mma(dS_at, k_now.permute((1, 0)), zero_new, use_acc=False, is_async=True)
        mbarrier.wait(q_bar, phase)
        products = warpgroup_mma(q_at, k_now.permute((1, 0)), zero_pair, use_acc=False, is_async=True)
        mbarrier.wait(rows_bars.index(half), (i // 2) & 1)
        of_out = row_of(rows_at, 128, new)  # scales are fetched before a product is waited for
        dnew = warpgroup_mma_wait(1, deps=[dnew])
        dnew = scaled(of_out, dnew, HAS_DOC)
        mbarrier.wait(do_bar, phase)
        mbarrier.wait(P_bar, phase)
        dnew = warpgroup_mma(do_at.permute((1, 0)), P_at, dnew, is_async=True)
        mbarrier.wait(errors_bar, phase)
        pairs = warpgroup_mma(do_at, errors_at.permute((1, 0)), zero_pair, use_acc=False, is_async=True)
        bt_new = row_of(rows_at, 192, new)
        dnew = warpgroup_mma_wait(1, deps=[dnew])
        dnew = dnew * bt_new
        mbarrier.wait(A_bar, phase)
        d_value = warpgroup_mma(
            gl.convert_layout(dnew.to(dtype), of_new), A_at, zero_new, use_acc=False, is_async=True
        )
        at_part = parts + (local.to(gl.int64) * NC + c) * 896
        mbarrier.wait(S_bar, phase)
        if HAS_G:
            sums = gl.zeros([32, W], gl.float32, loads)
            for j in gl.static_range(0, W, 32):
                sums += S_at.slice(j, 32).load(loads).to(gl.float32) * dS_at.slice(j, 32).load(loads).to(gl.float32)
            gl.store(at_part + 768 + gl.arange(0, 32, layout=gl.SliceLayout(1, loads)), gl.sum(sums, 1))
        pairs, products = warpgroup_mma_wait(1, deps=[pairs, products])
        tma.store_wait(0)  # of dq and dk of the chunk behind
        barrier()
        # From here on dO is scaled as it sees the incoming state.
        for j in gl.static_range(0, 64, 32):
            of_q = gl.expand_dims(rows_at.slice(j, 32).load(gl.SliceLayout(1, loads)), 1)
            do_at.slice(j, 32).store(scaled(of_q, do_at.slice(j, 32).load(loads).to(gl.float32), HAS_DOC).to(dtype))
        dS = gl.where(passes != 0.0, dS * passes, 0.0)

        nil = _nil(i)
        rows_at = rows_mem.index(half + nil)._reinterpret(gl.float32, [512], line)
        dv_at = dv_mem.index(nil)
        do_at = do_mem.index(nil)
        errors_at = errors_mem.index(nil)
        dS_at = dS_mem.index(nil)
        q_at = q_mem.index(nil)
        dqk_at = pairs_mem.index(nil)
        k_now = k_at.index(half + nil)
        of_k = row_of(rows_at, 64, new)
        d_value = warpgroup_mma_wait(0, deps=[d_value])
        if HAS_DOC:  # noqa: SIM102 (a constant, and a number of the device's)
            if left_out != 0:
                d_value += row_of(rows_at, 448, new) * 0.0
        dv_at.permute((1, 0)).store(d_value.to(dtype))
        fence_async_shared()
        barrier()
        tma.async_copy_shared_to_global(dv, [ib, c * 64, hv, 0], dv_at._reinterpret(dtype, [1, 64, 1, W], tokens))
        erased = scaled(of_k, -d_value, HAS_DOC).to(dtype)
        dS = warpgroup_mma(do_at.permute((1, 0)), q_at, dS, is_async=True)
        dS = warpgroup_mma(gl.convert_layout(erased, of_wide), k_now, dS, is_async=True)
        back = warpgroup_mma(dv_at, errors_at.permute((1, 0)), zero_pair, use_acc=False, is_async=True)

        keep = kept_pairs(ri + nil, rj, doc_at, HAS_DOC, pair)
        if HAS_G:
            decay = decays_of(rows_at, keep, pair)
            pairs = pairs * decay
        pairs = gl.where(keep, pairs * (column_of(rows_at, 384, pair) * scale) * row_of(rows_at, 448, pair), 0.0)
        dqk_at.store((pairs * row_of(rows_at, 192, pair)).to(dtype))
        pairs = pairs * products

        dS, back = warpgroup_mma_wait(0, deps=[dS, back])
        # Where no token sees the incoming state, nothing in the chunk, not even 0 * nan, reaches its gradient.
        dS = gl.where(any_sees != 0.0, dS, 0.0)
        nil = _nil(i)
        rows_at = rows_mem.index(half + nil)._reinterpret(gl.float32, [512], line)
        dkk_at = pairs_mem.index(1 + nil)
        logs_at = pairs_mem.index(2 + nil)._reinterpret(gl.bfloat16, [64, 64], tile)
        ones_at = ones_mem.index(nil)
        k_now = k_at.index(half + nil)
        products = warpgroup_mma(k_now, k_now.permute((1, 0)), zero_pair, use_acc=False, is_async=True)
        part = warpgroup_mma(errors_at, dS_at, zero_long, use_acc=False, is_async=True)
        strict = kept_pairs(ri + nil, rj, doc_at, HAS_DOC, pair) & (ri + nil > rj)
        if HAS_G:
            back = back * decay
        back = gl.where(strict, -back * column_of(rows_at, 448, pair) * row_of(rows_at, 448, pair), 0.0)
        bt = row_of(rows_at, 192, pair)
        dkk_at.store((back * bt).to(dtype))
        products = warpgroup_mma_wait(1, deps=[products])
        pairs += back * products
        _store_quarters(at_part, pairs)
        if HAS_G:
            logs_at.store(gl.where(strict, pairs * bt, 0.0).to(gl.bfloat16))
        fence_async_shared()
        barrier()

        # What was left to the outgoing state, what errors took back of the incoming one, what queries saw of it.
        part = warpgroup_mma_wait(0, deps=[part])
        nil = _nil(i)
        rows_at = rows_mem.index(half + nil)._reinterpret(gl.float32, [512], line)
        dv_at = dv_mem.index(nil)
        S_at = S_mem.index(nil)
        do_at = do_mem.index(nil)
        dqk_at = pairs_mem.index(nil)
        q_at = q_mem.index(nil)
        P_at = P_mem.index(nil)
        A_at = A_mem.index(nil)
        errors_at = errors_mem.index(nil)
        k_now = k_at.index(half + nil)
        taken = warpgroup_mma(dv_at, S_at, zero_long, use_acc=False, is_async=True)
        key = k_now.load(long)
        part = scaled(column_of(rows_at, 128, long), part, HAS_DOC)
        d_query = warpgroup_mma(do_at, S_at, zero_long, use_acc=False, is_async=True)
        taken = warpgroup_mma_wait(1, deps=[taken])
        taken = scaled(column_of(rows_at, 64, long), taken, HAS_DOC)
        _store_halves(at_part + 512, part * key.to(gl.float32), 64)
        if HAS_G:
            _store_halves(at_part + 640, taken * key.to(gl.float32), 64)
        d_key = part * column_of(rows_at, 192, long) - taken
        d_key = warpgroup_mma(dqk_at.permute((1, 0)), q_at, d_key, is_async=True)
        d_key = warpgroup_mma(dkk_at, k_now, d_key, is_async=True)
        d_key = warpgroup_mma(dkk_at.permute((1, 0)), k_now, d_key, is_async=True)
        if HAS_G:
            crossing = warpgroup_mma(ones_at, logs_at, zero_pair, use_acc=False, is_async=True)
            d_query = warpgroup_mma_wait(4, deps=[d_query])
        else:
            d_query = warpgroup_mma_wait(3, deps=[d_query])
        mbarrier.expect(do_bar, 64 * W * 2, pred=more)
        mbarrier.expect(P_bar, 64 * 64 * 2, pred=more)
        mbarrier.expect(A_bar, 64 * 64 * 2, pred=more)
        mbarrier.expect(errors_bar, 64 * W * 2, pred=more)
        mbarrier.expect(S_bar, W * W * 2, pred=more)
        barrier()
        # errors, S, do, A and P are done with. (A branch: with predicates instead the compiler spilled 20 registers.)
        if more:
            fetch_chunk(do, do_bar, do_at, ib, following, hv, True, W)
            tma.async_copy_global_to_shared(P, [at_tile * 64, 0], P_bar, P_at)
            tma.async_copy_global_to_shared(A, [at_tile * 64, 0], A_bar, A_at)
            tma.async_copy_global_to_shared(errors, [at_kept * 64, 0], errors_bar, errors_at)
            tma.async_copy_global_to_shared(states, [at_kept * W, 0], S_bar, S_at)
        d_query = gl.where(column_of(rows_at, 0, long) != 0.0, d_query, 0.0)
        if HAS_G:
            _store_halves(at_part + 384, d_query * q_at.load(long).to(gl.float32), 64)
        d_query = warpgroup_mma(dqk_at, k_now, d_query, is_async=True)
        dk_at = pairs_mem.index(1 + nil)._reinterpret(dtype, [64, W], tile)
        if SUM:  # fetched before the products are waited for
            token = c * 64 + gl.arange(0, 64, layout=long_i)
            at_sum = gl.expand_dims(((ib.to(gl.int64) * T + token) * H + ih) * W, 1)
            at_sum = at_sum + gl.expand_dims(gl.arange(0, W, layout=gl.SliceLayout(0, long)), 0)
            there = gl.expand_dims(token < T, 1)
            dk_before = gl.load(dk_sum + at_sum, mask=there, other=0.0)
            dq_before = gl.load(dq_sum + at_sum, mask=there, other=0.0)
        if HAS_G:
            d_key, d_query, crossing = warpgroup_mma_wait(0, deps=[d_key, d_query, crossing])
        else:
            d_key, d_query = warpgroup_mma_wait(0, deps=[d_key, d_query])
        if SUM:
            d_key += dk_before.to(gl.float32)
            d_query += dq_before.to(gl.float32)
        if LAST and NORM:  # see triton_gradients._write
            query = q_at.load(long).to(gl.float32)
            key = k_now.load(long).to(gl.float32)
            along_q, along_k = gl.reduce((d_query * query, d_key * key), 1, _add_pairs)
            rq = column_of(rows_at, 384, long)
            rk = column_of(rows_at, 448, long)
            d_query -= rq * rq * gl.expand_dims(along_q, 1) * query
            d_key -= rk * rk * gl.expand_dims(along_k, 1) * key
        tma.store_wait(0)  # of dv
        barrier()
        dk_at.store(d_key.to(dtype))
        dv_at.store(d_query.to(dtype))
        if HAS_G:
            nothing = 0.0
            if HAS_DOC:
                nothing = column_of(rows_at, 448, pair) * 0.0
            crossing = gl.where(ri > rj, crossing, nothing)
            _store_halves(at_part + 256, crossing, 32)
        mbarrier.expect(q_bar, 64 * W * 2, pred=more)
        mbarrier.expect(k_bars.index(half), 64 * W * 2, pred=i + 2 < chunks)
        mbarrier.expect(rows_bars.index(half), 512 * 4, pred=i + 2 < chunks)
        fence_async_shared()
        barrier()
        if more:
            fetch_chunk(q, q_bar, q_at, ib, following, ih, True, W)
        if i + 2 < chunks:
            fetch_chunk(k, k_bars.index(half), k_at.index(half), ib, c - 2, ih, True, W)
            tma.async_copy_global_to_shared(scales, [at_tile - 1, 0], rows_bars.index(half), rows_mem.index(half))
        tma.async_copy_shared_to_global(dk, [ib, c * 64, ih, 0], dk_at._reinterpret(dtype, [1, 64, 1, W], tokens))
        tma.async_copy_shared_to_global(dq, [ib, c * 64, ih, 0], dv_at._reinterpret(dtype, [1, 64, 1, W], tokens))
        if HAS_DOC:
            doc_at.store(doc_next)
    tma.store_wait(0)
