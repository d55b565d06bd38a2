"""Gluon pass 1, for Hopper: the tiles A and P of every chunk and the scales of their rows, in one kernel.

The mathematics is that of :mod:`.triton_prepare`. There N goes through memory between two kernels, and each value head
fetches its key head's q and k and multiplies them anew; here one program takes a chunk of a key head, multiplies once, and
goes through its value heads.

(I + N)^-1 in halves: the two diagonal blocks of 32 x 32 by forward substitution, row by row, side by side, and the block
below them by two products of tf32, ``-D2 N21 D1``. No power of N is formed, so that nothing grows which the inverse itself
does not hold.
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

from .gluon_chunk import TILE, TOKENS, WIDTH, barrier, column_of, decays_of, kept_pairs, row_of
from .triton_prepare import EPS

HALF = gl.constexpr(gl.NVMMASharedLayout(128, 32, 2))  # in shared memory, fp32


@gluon.jit
def _pair(b):
    hi = b.to(gl.float32)
    return hi, (b - hi.to(gl.float64)).to(gl.float32)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _add_within_document(b_left, d_left, b_right, d_right):
    """Of a running sum that starts anew with each document: not even the rounding of another one's touches it."""
    return gl.where(d_left == d_right, b_left + b_right, b_right), d_right


@gluon.jit
def _squares(x, norms, W: gl.constexpr, loads: gl.constexpr):
    """The squared norms of a chunk's rows, into ``norms``."""
    for j in gl.static_range(0, 64, 32):
        part = x.slice(j, 32).load(loads).to(gl.float32)
        norms.slice(j, 32).store(gl.sum(part * part, 1))


@gluon.jit
def _substitute(X, N, m, i: gl.constexpr, block: gl.constexpr, layout: gl.constexpr):
    """Row i of the inverse of a diagonal block, from the rows above it."""
    row = N.index(block * 32 + i).slice(block * 32, 32).load(gl.SliceLayout(1, layout))
    above = gl.sum(gl.expand_dims(row, 1) * X, 0)
    return gl.where(m == i, X - gl.expand_dims(above, 0), X)


@gluon.jit(
    do_not_specialize=["T", "NC", "segment_chunks", "sgb", "sbb"],
    do_not_specialize_on_alignment=["g", "beta", "doc", "starts"],
)
def prepare_pairs_kernel(
    q, k, P, A, g, beta, doc, starts, rows, through, bound,
    T, NC, segment_chunks, scale,
    sgb, sgt: gl.constexpr, sgh: gl.constexpr, sbb, sbt: gl.constexpr, sbh: gl.constexpr,
    H: gl.constexpr, G: gl.constexpr, HAS_G: gl.constexpr, HAS_DOC: gl.constexpr, NORM: gl.constexpr,
):  # fmt: skip
    W: gl.constexpr = WIDTH
    dtype: gl.constexpr = q.dtype
    pair: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])  # [64, 64]
    half: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 8])  # [64, 32], fp32 operands
    of_half: gl.constexpr = gl.DotOperandLayout(0, half, 1)
    flat: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])  # all 64 in each warp: running sums need no other
    loads: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    wide: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    block: gl.constexpr = gl.BlockedLayout([8, 1], [4, 8], [1, 4], [0, 1])  # [32, 32]
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    square: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    tile: gl.constexpr = TILE
    tokens: gl.constexpr = TOKENS
    fp32: gl.constexpr = HALF

    local = gl.program_id(0)
    c = gl.program_id(1)
    ib = local // H
    ih = local % H
    q_at = gl.allocate_shared_memory(dtype, [64, W], tile)
    k_at = gl.allocate_shared_memory(dtype, [64, W], tile)
    # The multiplied q and k make room for a value head's tiles.
    P_at = q_at.slice(0, 32)._reinterpret(dtype, [64, 64], tile)
    A_at = q_at.slice(32, 32)._reinterpret(dtype, [64, 64], tile)
    N_at = k_at._reinterpret(gl.float32, [64, 64], line)
    X_at = gl.allocate_shared_memory(gl.float32, [64, 32], fp32)  # D1 over D2
    D1_at = gl.allocate_shared_memory(gl.float32, [32, 32], fp32)  # transposed, as the products want it
    N21_at = gl.allocate_shared_memory(gl.float32, [32, 32], fp32)  # the same
    rows_at = gl.allocate_shared_memory(gl.float32, [512], line)
    norms_at = gl.allocate_shared_memory(gl.float32, [2, 64], line)
    doc_at = gl.allocate_shared_memory(gl.int32, [64], line)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    fence_async_shared()
    barrier()
    mbarrier.expect(bar, 2 * 64 * W * 2)
    tma.async_copy_global_to_shared(k, [ib, c * 64, ih, 0], bar, k_at._reinterpret(dtype, [1, 64, 1, W], tokens))
    tma.async_copy_global_to_shared(q, [ib, c * 64, ih, 0], bar, q_at._reinterpret(dtype, [1, 64, 1, W], tokens))

    r = gl.arange(0, 64, layout=flat)
    inside = c * 64 + r < T
    t = (c * 64 + r).to(gl.int64)
    n = c // segment_chunks
    chunk_start = gl.load(starts + n) + (c - n * segment_chunks) * 64
    wide_b = ib.to(gl.int64)
    d = r
    d_last = c
    if HAS_DOC:  # padding behind T belongs to the last document
        d = gl.load(doc + wide_b * T + gl.minimum(t, T - 1)).to(gl.int32)
        d_last = gl.load(doc + wide_b * T + gl.minimum(c * 64 + 63, T - 1)).to(gl.int32)
        doc_at.store(d)
    g += wide_b * sgb + ih * G * sgh + t * sgt
    beta += wide_b * sbb + ih * G * sbh + t * sbt
    g_next = gl.zeros([64], gl.float32, flat)
    if HAS_G:
        g_next = gl.load(g, mask=inside, other=0.0).to(gl.float32)
    beta_next = gl.load(beta, mask=inside, other=0.0).to(gl.float32)

    mbarrier.wait(bar, 0)
    zero_pair = gl.zeros([64, 64], gl.float32, pair)
    zero_half = gl.zeros([64, 32], gl.float32, half)
    products = warpgroup_mma(q_at, k_at.permute((1, 0)), zero_pair, use_acc=False, is_async=True)
    grams = warpgroup_mma(k_at, k_at.permute((1, 0)), zero_pair, use_acc=False, is_async=True)
    _squares(k_at, norms_at.index(0), W, loads)
    if NORM:
        _squares(q_at, norms_at.index(1), W, loads)
    barrier()
    k_norm = norms_at.index(0).load(flat)
    rq = gl.full([64], 1.0, gl.float32, flat)
    rk = rq
    if NORM:
        rq = gl.rsqrt(norms_at.index(1).load(flat) + EPS)
        rk = gl.rsqrt(k_norm + EPS)
    products, grams = warpgroup_mma_wait(0, deps=[products, grams])
    ri = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, pair)), 1)
    rj = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(0, pair)), 0)
    m = gl.expand_dims(gl.arange(0, 32, layout=gl.SliceLayout(1, block)), 1)
    eye = gl.where(m == gl.expand_dims(gl.arange(0, 32, layout=gl.SliceLayout(0, block)), 0), 1.0, 0.0)
    low = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, half)), 1) >= 32
    N_square = N_at._reinterpret(gl.float32, [64, 64], square)
    first = (ib * H + ih) * G

    for head in range(0, G):
        chunk = (first + head) * NC + c
        gt = g_next
        bt = beta_next
        if head + 1 < G:
            if HAS_G:
                g_next = gl.load(g + (head + 1) * sgh, mask=inside, other=0.0).to(gl.float32)
            beta_next = gl.load(beta + (head + 1) * sbh, mask=inside, other=0.0).to(gl.float32)
        hi = gl.zeros([64], gl.float32, flat)
        lo = hi
        hi_last = 0.0
        lo_last = 0.0
        if HAS_G:
            if HAS_DOC:
                b, _ = gl.associative_scan((gt.to(gl.float64), d), 0, _add_within_document)
            else:
                b = gl.associative_scan(gt.to(gl.float64), 0, _add)
            hi, lo = _pair(b)
            hi_last, lo_last = _pair(gl.sum(gl.where(r == 63, b, 0.0), 0))
        of_q = gl.exp(hi + lo)
        of_k = of_q
        of_out = gl.exp((hi_last - hi) + (lo_last - lo))
        passes = gl.exp(gl.zeros([], gl.float32) + (hi_last + lo_last))
        if HAS_DOC:
            of_q = gl.where(d < chunk_start, of_q, 0.0)
            of_k = of_q
            of_out = gl.where(d == d_last, of_out, 0.0)
            passes = gl.where(d_last < chunk_start, passes, 0.0)
        at = chunk.to(gl.int64)
        gl.store(through + at, passes)
        # How much longer the chunk can make a state, at most: the log of the product of its tokens' operator norms.
        decay_t = gl.exp(gt)
        erased = bt * rk * rk * k_norm * decay_t
        longer = gl.sum(gl.log(gl.maximum(decay_t, gl.abs(decay_t - erased))), 0)
        if HAS_DOC:
            longer = gl.where(d_last < chunk_start, longer, float("-inf"))
        gl.store(bound + at, longer)
        tma.store_wait(0)  # of the value head before this one
        barrier()
        at_rows = rows + at * 512 + r
        of_q = of_q * rq * scale
        of_k = of_k * rk
        of_out = of_out * rk
        gl.store(at_rows, of_q)
        gl.store(at_rows + 64, of_k)
        gl.store(at_rows + 128, of_out)
        gl.store(at_rows + 192, bt)
        gl.store(at_rows + 256, hi)
        gl.store(at_rows + 320, lo)
        gl.store(at_rows + 384, rq)
        gl.store(at_rows + 448, rk)
        rows_at.slice(192, 64).store(bt)
        rows_at.slice(256, 64).store(hi)
        rows_at.slice(320, 64).store(lo)
        rows_at.slice(384, 64).store(rq)
        rows_at.slice(448, 64).store(rk)
        barrier()

        keep = kept_pairs(ri, rj, doc_at, HAS_DOC, pair)
        decay = gl.where(keep, 1.0, 0.0)
        if HAS_G:
            decay = decays_of(rows_at, keep, pair)
        decay = decay * row_of(rows_at, 448, pair)
        P_at.store(gl.where(keep, products * (column_of(rows_at, 384, pair) * scale) * decay, 0.0).to(dtype))
        decay = decay * row_of(rows_at, 192, pair) * column_of(rows_at, 448, pair)
        N_square.store(gl.convert_layout(gl.where(keep & (ri > rj), grams * decay, 0.0), wide))
        fence_async_shared()
        barrier()
        tma.async_copy_shared_to_global(P, [chunk * 64, 0], P_at)

        N21_at.permute((1, 0)).store(N_square.slice(32, 32, dim=0).slice(0, 32, dim=1).load(block))
        D1 = eye
        D2 = eye
        for i in gl.static_range(1, 32):
            D1 = _substitute(D1, N_at, m, i, 0, block)
            D2 = _substitute(D2, N_at, m, i, 1, block)
        X_at.slice(0, 32).store(D1)
        X_at.slice(32, 32).store(D2)
        D1_at.permute((1, 0)).store(D1)
        fence_async_shared()
        barrier()
        left = warpgroup_mma(X_at, N21_at.permute((1, 0)), zero_half, use_acc=False, is_async=True)
        X = X_at.load(half)
        left = warpgroup_mma_wait(0, deps=[left])
        left = warpgroup_mma(
            gl.convert_layout(left, of_half), D1_at.permute((1, 0)), zero_half, use_acc=False, is_async=True
        )
        left = warpgroup_mma_wait(0, deps=[left])
        both = gl.join(gl.where(low, -left, X), gl.where(low, X, 0.0))
        A_at.store(gl.reshape(gl.permute(both, (0, 2, 1)), [64, 64]).to(dtype))
        fence_async_shared()
        barrier()
        tma.async_copy_shared_to_global(A, [chunk * 64, 0], A_at)
    tma.store_wait(0)
    barrier()
    mbarrier.invalidate(bar)
