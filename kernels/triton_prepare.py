"""Triton pass 1: all of a chunk that does not depend on a state.

With b the cumulative log decay within the chunk and document, rq and rk the inverse norms of q and k (1 where they are
taken as they are), and G and E as in :mod:`.chunk_torch`, two 64 x 64 tiles for each chunk and value head,

    P = scale * rq_i rk_j * tril(Q K^T) * G        A = (I + N)^-1,   N = strict_lower(rk_i rk_j (k_i . k_j) E_ij beta_j)

and the scales of their rows (``ROWS`` names them). Here beta stands on the columns, so that A maps ``V - e' * (K S)``
to the errors themselves and ``V' = beta * errors``. Norms are never multiplied into q and k: they scale products.

What is not finite stays in its document, of which a chunk's products know nothing: they multiply it by the zeros that
stand between documents. Where a chunk has several, a document that holds what is not finite is *spoilt* there: tiles
and scales are made without it, as of tokens that are zero, and two scales of its tokens, which reach no other's, are
NaN: of_q, by which outputs become so and later passes know these tokens, and, where the document goes on, of_out, by
which the outgoing state does. ``through``, which would be zero in such a chunk, is ``SEVERAL`` or ``SPOILT``.
"""

from __future__ import annotations

import triton
import triton.language as tl

EPS = tl.constexpr(1e-6)  # of the norms, as chunk_torch's
# Of e and e' where a token sees the state; 0 is for other documents, and would hide a state that is not finite.
LEAST = tl.constexpr(1e-30)
SEVERAL = tl.constexpr(-1.0)  # through of a chunk with several documents
SPOILT = tl.constexpr(-2.0)  # the same, where one is spoilt
# Scales of a chunk's rows, one fp32 array [B * HV, NC, row, 64]: of Q S; of K S in an error; of V' in the outgoing
# state; beta; b as a pair of fp32 numbers (one loses the small decays behind a strong one); rq and rk.
ROWS = ("of_q", "of_k", "of_out", "beta", "b_hi", "b_lo", "rq", "rk")


@triton.jit
def difference(hi_i, lo_i, hi_j, lo_j):
    """b_i - b_j for every pair, from pairs of fp32 numbers."""
    return (hi_i[:, None] - hi_j[None, :]) + (lo_i[:, None] - lo_j[None, :])


@triton.jit
def decays(hi_i, lo_i, hi_j, lo_j, keep):
    """exp(b_i - b_j) where kept, else 0."""
    return tl.where(keep, tl.exp(tl.where(keep, difference(hi_i, lo_i, hi_j, lo_j), 0.0)), 0.0)


@triton.jit
def _pair(b):
    hi = b.to(tl.float32)
    return hi, (b - hi.to(tl.float64)).to(tl.float32)


@triton.jit
def _add_within_document(b_left, d_left, b_right, d_right):
    """Of a running sum that starts anew with each document: not even the rounding of another one's touches it."""
    return tl.where(d_left == d_right, b_left + b_right, b_right), d_right


@triton.jit
def lost(x):
    """What is not finite."""
    x = x.to(tl.float32)
    return (x != x) | (tl.abs(x) == float("inf"))


@triton.jit
def lost_rows(x, stride, W: tl.constexpr, inside):
    """Which of 64 rows of W numbers hold what is not finite."""
    at = x + tl.arange(0, 64)[:, None] * stride + tl.arange(0, W)[None, :]
    return tl.max(lost(tl.load(at, mask=inside[:, None], other=0.0)).to(tl.int32), 1) != 0


@triton.jit
def in_documents(tokens, d):
    """The tokens in whose document one of these is; ``d``: the tokens' documents."""
    return tl.max(((d[:, None] == d[None, :]) & tokens[None, :]).to(tl.int32), 1) != 0


@triton.jit(
    do_not_specialize=["T", "NC", "segment_chunks", "sqb", "skb", "svb", "sgb", "sbb"],
    do_not_specialize_on_alignment=["g", "beta", "doc", "starts"],
)
def prepare_kernel(
    q, k, v, g, beta, doc, starts, N, P, rows, through, bound,
    T, NC, segment_chunks, scale,
    sqb: tl.int64, sqt: tl.constexpr, sqh: tl.constexpr, skb: tl.int64, skt: tl.constexpr, skh: tl.constexpr,
    svb: tl.int64, svt: tl.constexpr, svh: tl.constexpr,
    sgb: tl.int64, sgt: tl.constexpr, sgh: tl.constexpr, sbb: tl.int64, sbt: tl.constexpr, sbh: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    HAS_G: tl.constexpr, HAS_DOC: tl.constexpr, ERASE: tl.constexpr, PREVIOUS: tl.constexpr, NORM: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """N (its lower half of blocks), P and the scales: one program a chunk and value head."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1)
    HV: tl.constexpr = H * G
    ib, hv = row // HV, row % HV
    ih = hv // G
    chunk = row * NC + c
    r = tl.arange(0, 64)
    ck = tl.arange(0, K)
    inside = c * 64 + r < T
    t = (c * 64 + r).to(tl.int64)
    n = c // segment_chunks
    chunk_start = tl.load(starts + n) + (c - n * segment_chunks) * 64

    keep = r[:, None] >= r[None, :]
    if HAS_DOC:  # padding behind T belongs to the last document
        d = tl.load(doc + ib * T + tl.minimum(t, T - 1))
        d_last = tl.load(doc + ib * T + tl.minimum(c * 64 + 63, T - 1))
        keep = keep & (d[:, None] == d[None, :])
        several = tl.load(doc + ib * T + c * 64) != d_last
        spoilt = r < 0
        if several:
            t0 = (c * 64).to(tl.int64)
            spoilt = lost_rows(q + ib * sqb + ih * sqh + t0 * sqt, sqt, K, inside)
            spoilt = spoilt | lost_rows(k + ib * skb + ih * skh + t0 * skt, skt, K, inside)
            spoilt = spoilt | lost_rows(v + ib * svb + hv * svh + t0 * svt, svt, V, inside)
            spoilt = spoilt | lost(tl.load(beta + ib * sbb + hv * sbh + t * sbt, mask=inside, other=0.0))
            if HAS_G:
                spoilt = spoilt | lost(tl.load(g + ib * sgb + hv * sgh + t * sgt, mask=inside, other=0.0))
            spoilt = in_documents(spoilt, d)
        inside = inside & (spoilt == 0)  # below all is read without what is spoilt
    hi = tl.zeros((64,), tl.float32)
    lo = hi
    e_hi = hi  # b as an error sees it
    e_lo = hi
    hi_last = 0.0
    lo_last = 0.0
    gt = tl.zeros((64,), tl.float64)
    if HAS_G:
        gt = tl.load(g + ib * sgb + hv * sgh + t * sgt, mask=inside, other=0.0).to(tl.float64)
        if HAS_DOC:
            b, _ = tl.associative_scan((gt, d), 0, _add_within_document)
        else:
            b = tl.cumsum(gt, 0)
        hi, lo = _pair(b)
        e_hi, e_lo = hi, lo
        if PREVIOUS:  # the decay that an error sees ends one token earlier
            e_hi, e_lo = _pair(b - gt)
        hi_last, lo_last = _pair(tl.sum(tl.where(r == 63, b, 0.0), 0))
    bt = tl.load(beta + ib * sbb + hv * sbh + t * sbt, mask=inside, other=0.0).to(tl.float32)

    k += tl.multiple_of(ib * skb, 16) + ih * skh
    q += tl.multiple_of(ib * sqb, 16) + ih * sqh
    kt = tl.load(k + t[:, None] * skt + ck[None, :], mask=inside[:, None], other=0.0)
    qt = tl.load(q + t[:, None] * sqt + ck[None, :], mask=inside[:, None], other=0.0)
    rq = tl.full((64,), 1.0, tl.float32)
    rk = rq
    k_norm = tl.sum(kt.to(tl.float32) * kt.to(tl.float32), 1)
    if NORM:
        rq = tl.rsqrt(tl.sum(qt.to(tl.float32) * qt.to(tl.float32), 1) + EPS)
        rk = tl.rsqrt(k_norm + EPS)

    of_q = tl.exp(hi + lo)
    of_k = tl.exp(e_hi + e_lo)
    of_out = tl.exp((hi_last - hi) + (lo_last - lo))
    passes = tl.exp(hi_last + lo_last)
    if HAS_DOC:
        of_q = tl.where(d < chunk_start, tl.where(of_q < LEAST, LEAST, of_q), 0.0)
        of_k = tl.where(d < chunk_start, tl.where(of_k < LEAST, LEAST, of_k), 0.0)
        of_out = tl.where(d == d_last, of_out, 0.0)
        passes = tl.where(d_last < chunk_start, passes, 0.0)
        if several:
            passes = tl.where(tl.max(spoilt.to(tl.int32), 0) != 0, SPOILT, SEVERAL)
    tl.store(through + chunk, passes)
    # How much longer the chunk can make a state, at most: the log of the product of its tokens' operator norms.
    decay_t = tl.exp(gt.to(tl.float32))
    erased = tl.zeros((64,), tl.float32)
    if ERASE:
        erased = bt * rk * rk * k_norm * (1.0 if PREVIOUS else decay_t)
    longer = tl.sum(tl.log(tl.maximum(decay_t, tl.abs(decay_t - erased))), 0)
    if HAS_DOC:
        longer = tl.where(d_last < chunk_start, longer, float("-inf"))
    tl.store(bound + chunk, longer)
    of_q = of_q * rq * scale
    of_out = of_out * rk
    if HAS_DOC:
        of_q = tl.where(spoilt, float("nan"), of_q)
        of_out = tl.where(spoilt & (d == d_last), float("nan"), of_out)
    at = rows + chunk * 512 + r
    tl.store(at, of_q)
    tl.store(at + 64, of_k * rk)
    tl.store(at + 128, of_out)
    tl.store(at + 192, bt)
    tl.store(at + 256, hi)
    tl.store(at + 320, lo)
    tl.store(at + 384, rq)
    tl.store(at + 448, rk)

    tile = chunk * 4096 + r[:, None] * 64 + r[None, :]
    decay = decays(hi, lo, hi, lo, keep)
    weights = tl.dot(qt, tl.trans(kt), input_precision=DOT) * (rq * scale)[:, None] * rk[None, :] * decay
    tl.store(P + tile, tl.where(keep, weights, 0.0).to(P.dtype.element_ty))
    if ERASE:
        strict = keep & (r[:, None] > r[None, :])
        if PREVIOUS:
            decay = decays(e_hi, e_lo, hi, lo, strict)
        weights = tl.dot(kt, tl.trans(kt), input_precision=DOT) * rk[:, None] * (rk * bt)[None, :] * decay
        tl.store(N + tile, tl.where(strict, weights, 0.0), mask=(r[:, None] // 16) >= (r[None, :] // 16))


@triton.jit
def _block(pointer, i: tl.constexpr, j: tl.constexpr):
    r = tl.arange(0, 16)
    return pointer + (i * 16 + r[:, None]) * 64 + j * 16 + r[None, :]


@triton.jit
def _substitute(N, X, i, block: tl.constexpr):
    """Row i of the inverse of a diagonal block, from the rows above it."""
    r = tl.arange(0, 16)
    row = tl.load(N + (block * 16 + i) * 64 + block * 16 + r)
    return tl.where(r[:, None] == i, X - tl.sum(row[:, None] * X, 0)[None, :], X)


@triton.jit
def _store(A, X, i: tl.constexpr, j: tl.constexpr):
    tl.store(_block(A, i, j), X.to(A.dtype.element_ty))


@triton.jit(do_not_specialize=["size"])
def invert_kernel(N, A, size, DOT: tl.constexpr):
    """A = (I + N)^-1 of one tile. The four diagonal blocks of 16 x 16 by forward substitution, row by row; a block
    below them is ``A_ij = -A_ii sum_{j <= m < i} N_im A_mj``. No power of N is formed, so that nothing grows which the
    inverse itself does not hold."""
    N += tl.program_id(0).to(tl.int64) * 4096
    A += tl.program_id(0).to(tl.int64) * 4096
    r = tl.arange(0, 16)
    eye = tl.where(r[:, None] == r[None, :], 1.0, 0.0)
    a00, a11, a22, a33 = eye, eye, eye, eye
    for i in range(1, size):  # size is 16, but not known when this is compiled: unrolled it would be 15 times as long
        a00 = _substitute(N, a00, i, 0)
        a11 = _substitute(N, a11, i, 1)
        a22 = _substitute(N, a22, i, 2)
        a33 = _substitute(N, a33, i, 3)
    zero = tl.zeros((16, 16), tl.float32)
    _store(A, a00, 0, 0)
    _store(A, zero, 0, 1)
    _store(A, zero, 0, 2)
    _store(A, zero, 0, 3)
    _store(A, a11, 1, 1)
    _store(A, zero, 1, 2)
    _store(A, zero, 1, 3)
    _store(A, a22, 2, 2)
    _store(A, zero, 2, 3)
    _store(A, a33, 3, 3)
    n10 = tl.load(_block(N, 1, 0))
    n21 = tl.load(_block(N, 2, 1))
    n32 = tl.load(_block(N, 3, 2))
    n20 = tl.load(_block(N, 2, 0))
    n31 = tl.load(_block(N, 3, 1))
    n30 = tl.load(_block(N, 3, 0))
    a10 = -tl.dot(a11, tl.dot(n10, a00, input_precision=DOT), input_precision=DOT)
    a21 = -tl.dot(a22, tl.dot(n21, a11, input_precision=DOT), input_precision=DOT)
    a32 = -tl.dot(a33, tl.dot(n32, a22, input_precision=DOT), input_precision=DOT)
    _store(A, a10, 1, 0)
    _store(A, a21, 2, 1)
    _store(A, a32, 3, 2)
    terms = tl.dot(n20, a00, input_precision=DOT)
    a20 = -tl.dot(a22, tl.dot(n21, a10, acc=terms, input_precision=DOT), input_precision=DOT)
    terms = tl.dot(n31, a11, input_precision=DOT)
    a31 = -tl.dot(a33, tl.dot(n32, a21, acc=terms, input_precision=DOT), input_precision=DOT)
    _store(A, a20, 2, 0)
    _store(A, a31, 3, 1)
    terms = tl.dot(n30, a00, input_precision=DOT)
    terms = tl.dot(n31, a10, acc=terms, input_precision=DOT)
    terms = tl.dot(n32, a20, acc=terms, input_precision=DOT)
    _store(A, -tl.dot(a33, terms, input_precision=DOT), 3, 0)
