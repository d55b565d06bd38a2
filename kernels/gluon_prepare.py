"""Gluon pass 1, for Hopper: the tiles A and P of every chunk and the scales of their rows, in one kernel.

The mathematics is that of :mod:`.triton_prepare`. There N goes through memory between two kernels, and each value head
fetches its key head's q and k and multiplies them anew; here one program takes a chunk of a key head, multiplies once,
and goes through its value heads.

(I + N)^-1: the four diagonal blocks of 16 x 16 by forward substitution, row by row, a warp each; then twice, for blocks
of 16 and of 32, what lies below two of them, ``-D2 N21 D1``, by products of tf32. No power of N is formed, so that
nothing grows which the inverse itself does not hold.

Of spoilt documents the tokens are made zero in shared memory, before anything is multiplied; what spoils one value head
of a key head spoils all of them.
"""

from __future__ import annotations

import triton.language as tl
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
    TILE,
    TOKENS,
    WIDTH,
    add,
    barrier,
    clear_rows,
    column_of,
    decays_of,
    finite,
    in_documents,
    kept_pairs,
    lost_rows,
    new_mbarrier,
    row_of,
)
from .helpers import hashed
from .triton_prepare import EPS, LEAST, SEVERAL, SPOILT

NARROW = gl.constexpr(gl.NVMMASharedLayout(64, 32, 2))  # in shared memory, of 16 columns of fp32
HALF = gl.constexpr(gl.NVMMASharedLayout(128, 32, 2))  # of 32


@gluon.jit
def _pair(b):
    hi = b.to(gl.float32)
    return hi, (b - hi.to(gl.float64)).to(gl.float32)


@gluon.jit
def _add_within_document(b_left, d_left, b_right, d_right):
    """Of a running sum that starts anew with each document: not even the rounding of another one's touches it."""
    return gl.where(d_left == d_right, b_left + b_right, b_right), d_right


@gluon.jit
def _or(a, b):
    return a | b


@hashed
@gluon.jit
def _lost_couples(x, t, T, stride: gl.constexpr, couples: gl.constexpr):
    """Which of 64 rows in memory hold what is not finite: other than 0 for them. Two numbers are looked at in one:
    where an exponent has all its bits, one more carries into the sign's."""
    W: gl.constexpr = WIDTH // 2
    exponents: gl.constexpr = 0x7F807F80 if x.dtype.element_ty == gl.bfloat16 else 0x7C007C00
    one: gl.constexpr = 0x00800080 if x.dtype.element_ty == gl.bfloat16 else 0x04000400
    at = t.to(gl.int64) * (stride // 2) + gl.expand_dims(gl.arange(0, W, layout=gl.SliceLayout(0, couples)), 0)
    bits = gl.load(x.to(gl.pointer_type(gl.int32), bitcast=True) + at, mask=t < T, other=0)
    return gl.reduce((bits & exponents) + one, 1, _or) & -0x7FFF8000


@gluon.jit
def _squares(x, norms, loads: gl.constexpr):
    """The squared norms of a chunk's rows, into ``norms``."""
    for j in gl.static_range(0, 64, 32):
        part = x.slice(j, 32).load(loads).to(gl.float32)
        norms.slice(j, 32).store(gl.sum(part * part, 1))


@gluon.jit
def _one_block(x, wanted, columns: gl.constexpr):
    """Of each row of x [64, 64] the one block of columns that is wanted: [64, columns]."""
    return gl.sum(gl.reshape(gl.where(wanted, x, 0.0), [64, 64 // columns, columns]), 1)


@gluon.jit
def _transposed(x, columns: gl.constexpr):
    """Each square of x [64, columns] transposed."""
    squares = gl.reshape(x, [64 // columns, columns, columns])
    return gl.reshape(gl.permute(squares, (0, 2, 1)), [64, columns])


@gluon.jit
def _side_by_side(left, right, columns: gl.constexpr):
    """[64, columns] each, to [64, 2 * columns]."""
    return gl.reshape(gl.permute(gl.join(left, right), (0, 2, 1)), [64, 2 * columns])


@gluon.jit(
    do_not_specialize=["T", "NC", "segment_chunks", "svb", "sgb", "sbb"],
    do_not_specialize_on_alignment=["g", "beta", "doc", "starts"],
)
def prepare_pairs_kernel(
    q, k, values, P, A, g, beta, doc, starts, rows, through, bound,
    T, NC, segment_chunks, scale, svb: tl.int64, svt: gl.constexpr, svh: gl.constexpr,
    sgb: tl.int64, sgt: gl.constexpr, sgh: gl.constexpr, sbb: tl.int64, sbt: gl.constexpr, sbh: gl.constexpr,
    H: gl.constexpr, G: gl.constexpr, HEADS: gl.constexpr,
    HAS_G: gl.constexpr, HAS_DOC: gl.constexpr, NORM: gl.constexpr,
):  # fmt: skip
    W: gl.constexpr = WIDTH
    dtype: gl.constexpr = q.dtype
    pair: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])  # [64, 64]
    blocks: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 8])  # the same, of fp32 operands
    half: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 8])  # [64, 32]
    of_blocks: gl.constexpr = gl.DotOperandLayout(0, blocks, 1)
    of_half: gl.constexpr = gl.DotOperandLayout(0, half, 1)
    heads: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])  # [HEADS, 64]: a head's sums in one warp
    each: gl.constexpr = gl.SliceLayout(1, heads)
    loads: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    couples: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])  # the same, of pairs of numbers
    cube: gl.constexpr = gl.BlockedLayout([1, 8, 1], [1, 2, 16], [4, 1, 1], [1, 2, 0])  # [4, 16, 16]: a warp a block
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    square: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    solid: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    tile: gl.constexpr = TILE
    tokens: gl.constexpr = TOKENS
    narrow: gl.constexpr = NARROW
    wide: gl.constexpr = HALF

    local = gl.program_id(0)
    c = gl.program_id(1)
    ib = local // H
    ih = local % H
    q_at = gl.allocate_shared_memory(dtype, [64, W], tile)
    k_at = gl.allocate_shared_memory(dtype, [64, W], tile)
    # The multiplied q and k make room for a value head's tiles. (Not by slices of them: a row lies in two panels.)
    tiles = q_at._reinterpret(dtype, [2, 64, 64], tile)
    P_at = tiles.index(0)
    A_at = tiles.index(1)
    halves = k_at._reinterpret(gl.float32, [2, 64, 32], wide)
    D_at = halves.index(0)  # the inverse's diagonal blocks of 32
    N_at = halves.index(1)._reinterpret(gl.float32, [2, 32, 32], wide)  # N's below them, transposed: the second
    D_turned = gl.allocate_shared_memory(gl.float32, [2, 32, 32], wide)
    small_at = gl.allocate_shared_memory(gl.float32, [64, 16], narrow)  # the diagonal blocks of 16
    small_turned = gl.allocate_shared_memory(gl.float32, [64, 16], narrow)
    below_at = gl.allocate_shared_memory(gl.float32, [64, 16], narrow)  # N's blocks below them, transposed
    diagonal_at = gl.allocate_shared_memory(gl.float32, [16, 4, 16], square)  # N's own, by row
    rows_at = gl.allocate_shared_memory(gl.float32, [HEADS, 512], line)
    norms_at = gl.allocate_shared_memory(gl.float32, [2, 64], line)
    doc_at = gl.allocate_shared_memory(gl.int32, [64], line)
    if HAS_DOC:
        spoilt_at = gl.allocate_shared_memory(gl.float32, [64], line)
        spoilt_at.store(gl.zeros([64], gl.float32, gl.SliceLayout(1, pair)))
    bar = new_mbarrier()
    fence_async_shared()
    barrier()
    mbarrier.expect(bar, 2 * 64 * W * 2)
    tma.async_copy_global_to_shared(k, [ib, c * 64, ih, 0], bar, k_at._reinterpret(dtype, [1, 64, 1, W], tokens))
    tma.async_copy_global_to_shared(q, [ib, c * 64, ih, 0], bar, q_at._reinterpret(dtype, [1, 64, 1, W], tokens))

    # The scales of all value heads, while q and k are on their way.
    zeros = gl.zeros([HEADS, 64], gl.float32, heads)
    r = gl.arange(0, 64, layout=gl.SliceLayout(0, heads))
    head = gl.arange(0, HEADS, layout=each)
    t = (c * 64 + r).to(gl.int64)
    n = c // segment_chunks
    chunk_start = gl.load(starts + n) + (c - n * segment_chunks) * 64
    wide_b = ib.to(gl.int64)
    d = gl.expand_dims(r, 0)
    d_last = c
    if HAS_DOC:  # padding behind T belongs to the last document
        d_line = gl.load(doc + wide_b * T + gl.minimum(t, T - 1)).to(gl.int32)
        d_last = gl.load(doc + wide_b * T + gl.minimum(c * 64 + 63, T - 1)).to(gl.int32)
        doc_at.store(d_line)
        d = gl.expand_dims(d_line, 0)
    r = gl.expand_dims(r, 0)
    there = gl.expand_dims(head, 1) < G
    mask = there & (gl.expand_dims(t, 0) < T)
    of_head = ih * G + gl.expand_dims(head, 1)
    bt = gl.load(beta + wide_b * sbb + of_head * sbh + gl.expand_dims(t, 0) * sbt, mask=mask, other=0.0).to(gl.float32)
    gt = zeros
    hi = zeros
    lo = zeros
    if HAS_G:
        gt = gl.load(g + wide_b * sgb + of_head * sgh + gl.expand_dims(t, 0) * sgt, mask=mask, other=0.0).to(gl.float32)
        if HAS_DOC:
            b, _ = gl.associative_scan((gt.to(gl.float64), d + zeros.to(gl.int32)), 1, _add_within_document)
        else:
            b = gl.associative_scan(gt.to(gl.float64), 1, add)
        hi, lo = _pair(b)
        hi_last, lo_last = _pair(gl.sum(gl.where(r == 63, b, 0.0), 1))
    else:
        hi_last = gl.zeros([HEADS], gl.float32, each)
        lo_last = hi_last
    of_q = gl.exp(hi + lo)
    of_k = of_q
    of_out = gl.exp((gl.expand_dims(hi_last, 1) - hi) + (gl.expand_dims(lo_last, 1) - lo))
    passes = gl.exp(hi_last + lo_last)
    if HAS_DOC:
        of_q = gl.where(d < chunk_start, gl.where(of_q < LEAST, LEAST, of_q), 0.0)
        of_k = of_q
        of_out = gl.where(d == d_last, of_out, 0.0)
        passes = gl.where(d_last < chunk_start, passes, 0.0)
    at = ((ib * H + ih) * G + head).to(gl.int64) * NC + c
    gl.store(through + at, passes, mask=head < G)

    mbarrier.wait(bar, 0)
    if HAS_DOC:
        if gl.load(doc + wide_b * T + c * 64).to(gl.int32) != d_last:
            nan: gl.constexpr = float("nan")
            own = gl.where(mask & ((finite(bt) & finite(gt)) == 0), 1, 0)
            norms_at.index(0).store(gl.where(gl.max(own, 0) != 0, nan, 0.0))
            at_t = c * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, couples))
            lost_v = gl.zeros([64], gl.int32, gl.SliceLayout(1, couples))
            values += gl.multiple_of(wide_b * svb, 16) + ih * G * svh
            for j in gl.static_range(0, G):  # together on their way
                lost_v |= _lost_couples(values + j * svh, gl.expand_dims(at_t, 1), T, svt, couples)
            norms_at.index(1).store(gl.where(lost_v != 0, nan, 0.0))
            for j in gl.static_range(0, 64, 32):
                lost = lost_rows(q_at.slice(j, 32).load(loads)) + lost_rows(k_at.slice(j, 32).load(loads))
                spoilt_at.slice(j, 32).store(lost)
            barrier()
            spoilt_i = in_documents(norms_at.index(0), doc_at, pair)
            spoilt_i = gl.maximum(spoilt_i, in_documents(norms_at.index(1), doc_at, pair))
            spoilt_i = gl.maximum(spoilt_i, in_documents(spoilt_at, doc_at, pair))
            barrier()
            any_spoilt = gl.max(spoilt_i, 0) != 0
            says = gl.zeros([HEADS], gl.float32, each) + gl.where(any_spoilt, SPOILT, SEVERAL)
            gl.store(through + at, says, mask=head < G)
            if any_spoilt:
                spoilt_at.store(gl.where(spoilt_i != 0, nan, 0.0))
                barrier()
                clear_rows(q_at, spoilt_at, loads)
                clear_rows(k_at, spoilt_at, loads)
                fence_async_shared()
            barrier()
        mark = gl.expand_dims(spoilt_at.load(gl.SliceLayout(0, heads)), 0)
        spoilt = mark != mark
        hi = gl.where(spoilt, 0.0, hi)
        lo = gl.where(spoilt, 0.0, lo)
        bt = gl.where(spoilt, 0.0, bt)
        of_k = gl.where(spoilt & (d < chunk_start), 1.0, of_k)
        of_q = gl.where(spoilt, float("nan"), of_q)
        of_out = gl.where(spoilt & (d == d_last), float("nan"), of_out)
    zero = gl.zeros([64, 64], gl.float32, pair)
    products = warpgroup_mma(q_at, k_at.permute((1, 0)), zero, use_acc=False, is_async=True)
    grams = warpgroup_mma(k_at, k_at.permute((1, 0)), zero, use_acc=False, is_async=True)
    _squares(k_at, norms_at.index(0), loads)
    if NORM:
        _squares(q_at, norms_at.index(1), loads)
    barrier()
    k_norm = gl.expand_dims(norms_at.index(0).load(gl.SliceLayout(0, heads)), 0)
    rq = zeros + 1.0
    rk = rq
    if NORM:
        rq = gl.rsqrt(gl.expand_dims(norms_at.index(1).load(gl.SliceLayout(0, heads)), 0) + EPS) + zeros
        rk = gl.rsqrt(k_norm + EPS) + zeros
    # How much longer the chunk can make a state, at most: the log of the product of its tokens' operator norms.
    decay_t = gl.exp(gt)
    erased = bt * rk * rk * k_norm * decay_t
    longer = gl.sum(gl.log(gl.maximum(decay_t, gl.abs(decay_t - erased))), 1)
    if HAS_DOC:
        longer = gl.where(d_last < chunk_start, longer, float("-inf"))
    gl.store(bound + at, longer, mask=head < G)
    of_q = of_q * rq * scale
    of_k = of_k * rk
    of_out = of_out * rk
    at_rows = rows + gl.expand_dims(at, 1) * 512 + r
    gl.store(at_rows, of_q, mask=there)
    gl.store(at_rows + 64, of_k, mask=there)
    gl.store(at_rows + 128, of_out, mask=there)
    gl.store(at_rows + 192, bt, mask=there)
    gl.store(at_rows + 256, hi, mask=there)
    gl.store(at_rows + 320, lo, mask=there)
    gl.store(at_rows + 384, rq, mask=there)
    gl.store(at_rows + 448, rk, mask=there)
    all_rows = rows_at._reinterpret(gl.float32, [HEADS, 512], square)
    all_rows.slice(192, 64, dim=1).store(bt)
    all_rows.slice(256, 64, dim=1).store(hi)
    all_rows.slice(320, 64, dim=1).store(lo)
    all_rows.slice(384, 64, dim=1).store(rq)
    all_rows.slice(448, 64, dim=1).store(rk)
    products, grams = warpgroup_mma_wait(0, deps=[products, grams])
    barrier()

    ri = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, pair)), 1)
    rj = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(0, pair)), 0)
    bi = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, blocks)), 1) // 16
    bj = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(0, blocks)), 0) // 16
    lower = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, half)), 1) >= 32
    m = gl.expand_dims(gl.expand_dims(gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, cube))), 0), 2)
    col = gl.expand_dims(gl.expand_dims(gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(1, cube))), 0), 1)
    eye = gl.where(m == col, 1.0, 0.0) + gl.zeros([4, 16, 16], gl.float32, cube)
    zero_blocks = gl.zeros([64, 64], gl.float32, blocks)
    zero_half = gl.zeros([64, 32], gl.float32, half)
    for j in range(0, G):
        chunk = ((ib * H + ih) * G + j) * NC + c
        scales = rows_at.index(j)
        keep = kept_pairs(ri, rj, doc_at, HAS_DOC, pair)
        decay = gl.where(keep, 1.0, 0.0)
        if HAS_G:
            decay = decays_of(scales, keep, pair)
        decay = decay * row_of(scales, 448, pair)
        weights = gl.where(keep, products * (column_of(scales, 384, pair) * scale) * decay, 0.0).to(dtype)
        decay = decay * row_of(scales, 192, pair) * column_of(scales, 448, pair)
        N = gl.where(keep & (ri > rj), grams * decay, 0.0)
        tma.store_wait(0)  # of the value head before this one
        barrier()
        P_at.store(weights)
        own = gl.reshape(_one_block(N, ri // 16 == rj // 16, 16), [4, 16, 16])
        diagonal_at._reinterpret(gl.float32, [16, 4, 16], solid).store(gl.permute(own, (1, 0, 2)))
        below_at.store(_transposed(_one_block(N, (ri // 16 == rj // 16 + 1) & (ri // 16 != 2), 16), 16))
        N_at._reinterpret(gl.float32, [64, 32], wide).store(
            _transposed(_one_block(N, (ri >= 32) & (rj < 32), 32), 32)
        )
        fence_async_shared()
        barrier()
        tma.async_copy_shared_to_global(P, [chunk * 64, 0], P_at)

        D = eye
        for i in gl.static_range(1, 16):
            above = gl.expand_dims(diagonal_at.index(i).load(gl.SliceLayout(2, cube)), 2)
            D = gl.where(m == i, D - gl.expand_dims(gl.sum(above * D, 1), 1), D)
        D = gl.reshape(D, [64, 16])
        small_at.store(D)
        small_turned.store(_transposed(D, 16))
        fence_async_shared()
        barrier()
        Z = warpgroup_mma(small_at, below_at.permute((1, 0)), zero_blocks, use_acc=False, is_async=True)
        Z = warpgroup_mma_wait(0, deps=[Z])
        Z = _one_block(Z, bi == bj, 16)
        D = small_at.load(Z.type.layout)
        Z = warpgroup_mma(
            gl.convert_layout(Z, of_blocks), small_turned.permute((1, 0)), zero_blocks, use_acc=False, is_async=True
        )
        Z = warpgroup_mma_wait(0, deps=[Z])
        Z = _one_block(Z, bi == bj + 1, 16)
        odd = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, Z.type.layout)) // 16 % 2 == 1, 1)
        D = _side_by_side(gl.where(odd, -Z, D), gl.where(odd, D, 0.0), 16)
        D_at.store(D)
        D_turned._reinterpret(gl.float32, [64, 32], wide).store(_transposed(D, 32))
        fence_async_shared()
        barrier()
        left = warpgroup_mma(D_at, N_at.index(1).permute((1, 0)), zero_half, use_acc=False, is_async=True)
        D = D_at.load(half)
        left = warpgroup_mma_wait(0, deps=[left])
        left = warpgroup_mma(
            gl.convert_layout(left, of_half), D_turned.index(0).permute((1, 0)), zero_half, use_acc=False, is_async=True
        )
        left = warpgroup_mma_wait(0, deps=[left])
        A_at.store(_side_by_side(gl.where(lower, -left, D), gl.where(lower, D, 0.0), 32).to(dtype))
        fence_async_shared()
        barrier()
        tma.async_copy_shared_to_global(A, [chunk * 64, 0], A_at)
    tma.store_wait(0)
