"""Triton pass 4: the gradients of a chunk's inputs, once its states are known. All chunks are independent of another.

With each chunk's S, errors, dS and dV kept, and in the words of passes 1 and 2, W_ij = scale rq_i rk_j G_ij:

    dqk = (dO errors^T) * W * beta_j                          dq = e * (dO S^T) + dqk K
    dkk = -strict_lower(dV errors^T) * rk_i rk_j E * beta_j   dk = dqk^T Q + beta * out * (errors dS^T) - e' * (dV S^T)
                                                                   + (dkk + dkk^T) K
    dbeta_j = sum_i (dqk * Q K^T + dkk * K K^T)_ij / beta_j + out_j k_j . (errors dS^T)_j

g_t decays every pair j < t <= i, what the tokens i >= t see of the incoming state, what the tokens j < t leave to the
outgoing one, and the passage of the whole chunk: sums of just those log gradients, never differences of longer sums.

Four kernels, because what all of it needs does not fit the registers. *pairs*, a program a chunk and value head, leaves
the ``tiles`` dqk^T and dkk + dkk^T; *queries* and then *keys*, a program a chunk and key head, take the value heads
that share it in turn and sum their dq and dk in registers. Each leaves ``parts`` of dbeta and dg, which *gates* adds.
:mod:`.gluon_backward` does all this but the last, by value head.

In a chunk with several documents the spoilt ones are those of pass 3, which its dV tells, and the one that comes from
before where S is not finite. *pairs* leaves them out and makes their dbeta and dg NaN, where *queries* and *keys* find
them: *gates* adds the other parts over all tokens of a chunk.

Long because the parts that *gates* adds are what the three others write.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .helpers import hashed
from .triton_prepare import SEVERAL, decays, in_documents, lost, lost_rows

# A chunk's sums on the way to dbeta and dg, one fp32 array [value heads, NC, part, 64]: dbeta and dg of the pairs, the
# log gradients of e (dO S^T), of out * (errors dS^T) without beta, and of e' (dV S^T); in the last, at 0, <S, dS>.
PARTS = ("dbeta", "dg", "log_in", "left", "taken", "inner")


@triton.jit
def _rows(pointer, stride, W: tl.constexpr, inside):
    """64 rows of W numbers."""
    at = pointer + tl.arange(0, 64)[:, None] * stride + tl.arange(0, W)[None, :]
    return tl.load(at, mask=inside[:, None], other=0.0)


@triton.jit
def _state(pointer, iv, K: tl.constexpr, BV: tl.constexpr):
    """Rows iv to iv + BV of a transposed state."""
    return tl.load(pointer + (iv + tl.arange(0, BV))[:, None] * K + tl.arange(0, K)[None, :])


@triton.jit
def _with_state(
    x, sx, inside, state, weight,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``weight * (x S^T)``"""
    if BV == V:
        part = tl.dot(_rows(x, sx, V, inside), _state(state, 0, K, V), input_precision=DOT)
    else:
        part = tl.zeros((64, K), tl.float32)
        for iv in tl.range(0, V, BV, num_stages=STAGES):
            S = _state(state, iv, K, BV)
            part = tl.dot(_rows(x + iv, sx, BV, inside), S, acc=part, input_precision=DOT)
    return tl.where(weight[:, None] != 0.0, weight[:, None] * part, 0.0)  # select: 0 * inf must not leak


@triton.jit
def _products(
    x, sx, y, sy, inside_x, inside_y,
    W: tl.constexpr, BW: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``x y^T``, of 64 rows of W numbers each."""
    if BW == W:
        pairs = tl.dot(_rows(x, sx, W, inside_x), tl.trans(_rows(y, sy, W, inside_y)), input_precision=DOT)
    else:
        pairs = tl.zeros((64, 64), tl.float32)
        for iw in tl.range(0, W, BW, num_stages=STAGES):
            right = tl.trans(_rows(y + iw, sy, BW, inside_y))
            pairs = tl.dot(_rows(x + iw, sx, BW, inside_x), right, acc=pairs, input_precision=DOT)
    return pairs


@hashed
@triton.jit
def _finite(parts, through):
    """The tokens that are not spoilt, from *pairs*' dbeta."""
    d_beta = tl.where(tl.load(through) <= SEVERAL, tl.load(parts + tl.arange(0, 64)), 0.0)
    return d_beta == d_beta


@triton.jit
def _straddling(pairs, strictly: tl.constexpr, DOT: tl.constexpr):
    """``sum_{j < t <= i} pairs_ij`` for each t, or ``j < t < i``; pairs strictly lower. By a product with ones, which
    takes the rows i together. Not in fp16: log gradients may pass its range."""
    r = tl.arange(0, 64)
    later = r[:, None] + strictly <= r[None, :]
    if DOT == "tf32x3":
        crossing = tl.dot(tl.where(later, 1.0, 0.0), pairs, input_precision=DOT)
    else:
        crossing = tl.dot(tl.where(later, 1.0, 0.0).to(tl.bfloat16), pairs.to(tl.bfloat16))
    return tl.sum(tl.where(r[:, None] > r[None, :], crossing, 0.0), 1)


@triton.jit(
    do_not_specialize=["T", "NC", "B", "row0", "sqb", "skb", "sob", "svb"],
    do_not_specialize_on_alignment=["doc"],
)
def pairs_kernel(
    q, k, do, dv, doc, rows, states, errors, tiles, parts,
    T, NC, B, row0, scale,
    sqb: tl.int64, sqt: tl.constexpr, sqh: tl.constexpr, skb: tl.int64, skt: tl.constexpr, skh: tl.constexpr,
    sob: tl.int64, sot: tl.constexpr, soh: tl.constexpr, svb: tl.int64, svt: tl.constexpr, svh: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_G: tl.constexpr, HAS_DOC: tl.constexpr, ERASE: tl.constexpr, PREVIOUS: tl.constexpr,
    DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0).to(tl.int64)
    local = tl.program_id(1).to(tl.int64)  # in this launch's arrays
    row = row0 + local
    HV: tl.constexpr = H * G
    ib, hv = row // HV, row % HV
    r = tl.arange(0, 64)
    t0 = c * 64
    inside = r < tl.minimum(T - t0, 64).to(tl.int32)
    all_rows = r >= 0
    k += tl.multiple_of(ib * skb, 16) + (hv // G) * skh + t0 * skt
    q += tl.multiple_of(ib * sqb, 16) + (hv // G) * sqh + t0 * sqt
    do += tl.multiple_of(ib * sob, 16) + hv * soh + t0 * sot
    dv += tl.multiple_of(ib * svb, 16) + hv * svh + t0 * svt
    tile = local * NC + c
    errors += tile * 64 * V
    tiles += tile * 8192
    at_row = rows + (row * NC + c) * 512 + r
    bt = tl.load(at_row + 192)
    rk = tl.load(at_row + 448)
    keep = r[:, None] >= r[None, :]
    if HAS_DOC:
        d = tl.load(doc + ib * T + tl.minimum(t0 + r, T - 1))
        keep = keep & (d[:, None] == d[None, :])
        spoilt = r < 0
        if tl.load(doc + ib * T + t0) != tl.load(doc + ib * T + tl.minimum(t0 + 63, T - 1)):
            S_lost = 0
            for iv in tl.range(0, V, BV, num_stages=1):
                part = lost(_state(states + tile * K * V, iv, K, BV)).to(tl.int32)
                S_lost = tl.maximum(S_lost, tl.max(tl.max(part, 1), 0))
            spoilt = lost_rows(dv, svt, V, inside) | (tl.where(S_lost != 0, tl.load(at_row + 64), 0.0) != 0.0)
            spoilt = in_documents(spoilt, d)
        ok = spoilt == 0
        keep = keep & ok[:, None] & ok[None, :]
    strict = keep & (r[:, None] > r[None, :])
    low_type = tiles.dtype.element_ty
    rq = tl.load(at_row + 384)
    if HAS_G:
        hi = tl.load(at_row + 256)
        lo = tl.load(at_row + 320)

    pairs = _products(do, sot, errors, V, inside, all_rows, V, BV, DOT, STAGES)
    if HAS_G:
        pairs *= decays(hi, lo, hi, lo, keep)
    pairs = tl.where(keep, pairs * (rq * scale)[:, None] * rk[None, :], 0.0)
    tl.store(tiles + r[None, :] * 64 + r[:, None], (pairs * bt[None, :]).to(low_type))
    pairs *= _products(q, sqt, k, skt, inside, inside, K, BK, DOT, STAGES)
    if HAS_DOC:
        pairs = tl.where(keep, pairs, 0.0)
    d_beta = tl.sum(pairs, 0)
    logs = pairs
    d_g = d_beta
    if HAS_G:
        logs = tl.where(strict, pairs * bt[None, :], 0.0)  # on the diagonal G is 1 throughout

    if ERASE:
        pairs = _products(dv, svt, errors, V, inside, all_rows, V, BV, DOT, STAGES)
        if HAS_G:
            e_hi = hi
            e_lo = lo
            if PREVIOUS:  # the decay that an error sees ends one token earlier
                e_hi = tl.load(at_row + 255, mask=r > 0, other=0.0)
                e_lo = tl.load(at_row + 319, mask=r > 0, other=0.0)
            pairs *= decays(e_hi, e_lo, hi, lo, strict)
        pairs = tl.where(strict, -pairs * rk[:, None] * rk[None, :], 0.0)
        low = pairs * bt[None, :]
        tl.store(tiles + 4096 + r[:, None] * 64 + r[None, :], (low + tl.trans(low)).to(low_type))
        pairs *= _products(k, skt, k, skt, inside, inside, K, BK, DOT, STAGES)
        if HAS_DOC:
            pairs = tl.where(strict, pairs, 0.0)
        d_beta += tl.sum(pairs, 0)
        if HAS_G:
            if PREVIOUS:
                d_g = _straddling(logs, False, DOT) + _straddling(pairs * bt[None, :], True, DOT)
            else:
                logs += pairs * bt[None, :]
    if HAS_DOC:
        d_beta = tl.where(ok, d_beta, float("nan"))
    tl.store(parts + tile * 384 + r, d_beta)
    if HAS_G:
        if not (ERASE and PREVIOUS):
            d_g = _straddling(logs, False, DOT)
        if HAS_DOC:
            d_g = tl.where(ok, d_g, float("nan"))
        tl.store(parts + tile * 384 + 64 + r, d_g)


@triton.jit
def _write(out, sums, x, norm, inside, H: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr):
    """The sums; of normalised x through y = x r, r = 1 / sqrt(|x|^2 + eps). They hold r dy so far, of which
    x r^2 (x . r dy) is taken off."""
    if NORM:
        r = tl.load(norm + tl.arange(0, 64))
        x = x.to(tl.float32)
        sums -= (r * r * tl.sum(sums * x, 1))[:, None] * x
    at = tl.arange(0, 64)[:, None] * (H * K) + tl.arange(0, K)[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["T", "NC", "B", "row0", "group", "sqb", "skb", "sob"])
def queries_kernel(
    q, k, do, rows, through, states, tiles, parts, dq,
    T, NC, B, row0, group,
    sqb: tl.int64, sqt: tl.constexpr, sqh: tl.constexpr, skb: tl.int64, skt: tl.constexpr, skh: tl.constexpr,
    sob: tl.int64, sot: tl.constexpr, soh: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    HAS_G: tl.constexpr, HAS_DOC: tl.constexpr, NORM: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0).to(tl.int64)
    local = tl.program_id(1).to(tl.int64) * G
    first_row = row0 + local
    HV: tl.constexpr = H * G
    ib, ih = first_row // HV, (first_row % HV) // G
    r = tl.arange(0, 64)
    t0 = c * 64
    inside = r < tl.minimum(T - t0, 64).to(tl.int32)
    k += tl.multiple_of(ib * skb, 16) + ih * skh + t0 * skt
    q += tl.multiple_of(ib * sqb, 16) + ih * sqh + t0 * sqt
    do += tl.multiple_of(ib * sob, 16) + ih * G * soh + t0 * sot
    sums = tl.zeros((64, K), tl.float32)
    wanted = inside
    # group is G, but not known when this is compiled: unrolled the loop would be G times as long.
    for j in tl.range(0, group, disable_licm=True, num_stages=1):
        tile = (local + j) * NC + c
        of_q = tl.load(rows + ((first_row + j) * NC + c) * 512 + r)
        if HAS_DOC:
            ok = _finite(parts + tile * 384, through + (first_row + j) * NC + c)
            of_q = tl.where(ok, of_q, 0.0)
            wanted = inside & ok
        qt = _rows(q, sqt, K, wanted)
        part = _with_state(do + j * soh, sot, inside, states + tile * K * V, of_q, K, V, BV, DOT, STAGES)
        if HAS_G:
            tl.store(parts + tile * 384 + 128 + r, tl.sum(part * qt.to(tl.float32), 1))
        sums += part
        dqk_T = tl.load(tiles + tile * 8192 + r[:, None] * 64 + r[None, :])
        sums = tl.dot(tl.trans(dqk_T), _rows(k, skt, K, wanted), acc=sums, input_precision=DOT)
        if HAS_DOC:
            sums = tl.where(ok[:, None], sums, float("nan"))
    norm = rows + (first_row * NC + c) * 512 + 384
    _write(dq + ((ib * T + t0) * H + ih) * K, sums, _rows(q, sqt, K, inside), norm, inside, H, K, NORM)


@triton.jit(do_not_specialize=["T", "NC", "B", "row0", "group", "sqb", "skb", "svb"])
def keys_kernel(
    q, k, rows, through, states, errors, d_states, dv, tiles, parts, dk,
    T, NC, B, row0, group,
    sqb: tl.int64, sqt: tl.constexpr, sqh: tl.constexpr, skb: tl.int64, skt: tl.constexpr, skh: tl.constexpr,
    svb: tl.int64, svt: tl.constexpr, svh: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    HAS_G: tl.constexpr, HAS_DOC: tl.constexpr, ERASE: tl.constexpr, NORM: tl.constexpr,
    DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0).to(tl.int64)
    local = tl.program_id(1).to(tl.int64) * G
    first_row = row0 + local
    HV: tl.constexpr = H * G
    ib, ih = first_row // HV, (first_row % HV) // G
    r = tl.arange(0, 64)
    t0 = c * 64
    inside = r < tl.minimum(T - t0, 64).to(tl.int32)
    k += tl.multiple_of(ib * skb, 16) + ih * skh + t0 * skt
    q += tl.multiple_of(ib * sqb, 16) + ih * sqh + t0 * sqt
    dv += tl.multiple_of(ib * svb, 16) + ih * G * svh + t0 * svt
    sums = tl.zeros((64, K), tl.float32)
    wanted = inside
    for j in tl.range(0, group, disable_licm=True, num_stages=1):
        tile = (local + j) * NC + c
        at_row = rows + ((first_row + j) * NC + c) * 512 + r
        at_part = parts + tile * 384 + r
        S = states + tile * K * V
        dS = d_states + tile * K * V
        bt = tl.load(at_row + 192)
        of_out = tl.load(at_row + 128)
        of_k = tl.load(at_row + 64)
        if HAS_DOC:
            ok = _finite(parts + tile * 384, through + (first_row + j) * NC + c)
            of_out = tl.where(ok, of_out, 0.0)
            of_k = tl.where(ok, of_k, 0.0)
            wanted = inside & ok
        # What was left to the outgoing state; <S, dS> on the way.
        part = tl.zeros((64, K), tl.float32)
        inner = tl.zeros((BV,), tl.float32)
        for iv in tl.range(0, V, BV, num_stages=STAGES):
            right = _state(dS, iv, K, BV)
            part = tl.dot(_rows(errors + tile * 64 * V + iv, V, BV, r >= 0), right, acc=part, input_precision=DOT)
            if HAS_G:
                inner += tl.sum(_state(S, iv, K, BV).to(tl.float32) * right.to(tl.float32), 1)
        part = tl.where(of_out[:, None] != 0.0, of_out[:, None] * part, 0.0)  # select: 0 * inf must not leak
        tl.store(at_part + 192, tl.sum(part * _rows(k, skt, K, wanted).to(tl.float32), 1))
        sums += bt[:, None] * part
        if HAS_G:
            tl.store(parts + tile * 384 + 320, tl.sum(inner, 0))
        if ERASE:  # what errors took back of the incoming one
            part = _with_state(dv + j * svh, svt, inside, S, of_k, K, V, BV, DOT, STAGES)
            if HAS_G:
                tl.store(at_part + 256, tl.sum(part * _rows(k, skt, K, wanted).to(tl.float32), 1))
            sums -= part
        # The pairs of the chunk, dqk^T with its queries and dkk + dkk^T with its keys. A loop, because of two products
        # in a row, the second adding to the first, Triton lets both warp groups do the whole of one.
        for i in tl.range(0, 1 + ERASE, num_stages=STAGES):
            x = tl.where(i == 0, q, k)
            pairs = tl.load(tiles + tile * 8192 + i * 4096 + r[:, None] * 64 + r[None, :])
            right = _rows(x, tl.where(i == 0, sqt, skt), K, wanted)
            sums = tl.dot(pairs, right, acc=sums, input_precision=DOT)
        if HAS_DOC:
            sums = tl.where(ok[:, None], sums, float("nan"))
    norm = rows + (first_row * NC + c) * 512 + 448
    _write(dk + ((ib * T + t0) * H + ih) * K, sums, _rows(k, skt, K, inside), norm, inside, H, K, NORM)


@triton.jit
def _part(parts, which: tl.constexpr, shift: tl.constexpr, there, HALVES: tl.constexpr):
    """A part behind the first, as pairs, queries and keys leave it or, in halves, gluon_backward; that of token
    i + shift at i, zero where there is none. In halves, until :func:`_whole` adds them, they lie as in memory, where
    one load has both."""
    each: tl.constexpr = 2 if HALVES else 1
    size: tl.constexpr = 64 * each
    at = tl.arange(0, size)[None, :] + each * shift
    return tl.load(parts + size * (which + each - 1) + at, mask=there & (at >= 0) & (at < size), other=0.0)


@triton.jit
def _whole(part, HALVES: tl.constexpr):
    if HALVES:
        first, second = tl.split(tl.reshape(part, (part.shape[0], 64, 2)))
        return first + second
    else:
        return part


@triton.jit(do_not_specialize=["T", "NC", "row0", "every", "count"])
def gates_kernel(
    rows, through, parts, dg, dbeta, T, NC, row0, every, count,
    HV: tl.constexpr, HAS_G: tl.constexpr, HAS_DOC: tl.constexpr, ERASE: tl.constexpr, PREVIOUS: tl.constexpr,
    TOGETHER: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """dbeta and dg from their parts, for a chunk of a few of the launch's ``count`` value heads: theirs lie side by
    side, and are written together."""
    c = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * TOGETHER  # in this launch's arrays
    local = first + tl.arange(0, TOGETHER)[:, None]
    there = local < count
    r = tl.arange(0, 64)[None, :]
    size: tl.constexpr = 896 if HALVES else 384
    parts += (local * NC.to(tl.int64) + c) * size
    chunk = (row0 + local * every) * NC.to(tl.int64) + c
    # All is asked for before anything is added: the compiler moves no load over the barriers in between.
    left = _part(parts, 3, 0, there, HALVES)
    if HAS_G:
        d_g = _part(parts, 1, 0, there, HALVES)
        log_in = _part(parts, 2, 0, there, HALVES)
        left_before = _part(parts, 3, -1, there, HALVES)
        if ERASE:
            taken = _part(parts, 4, 1 if PREVIOUS else 0, there, HALVES)
        bt = tl.load(rows + chunk * 512 + 191 + r, mask=there & (r > 0), other=0.0)
        passes = tl.load(through + chunk, mask=there, other=0.0)
        if HALVES:
            inner = tl.load(parts + 768 + tl.arange(0, 32)[None, :], mask=there, other=0.0)
        else:
            inner = tl.load(parts + 320, mask=there, other=0.0)
    d_beta = tl.load(parts + r, mask=there, other=0.0)
    if HALVES:
        second = tl.load(parts + 64 + r, mask=there, other=0.0)
        third = tl.load(parts + 128 + r, mask=there, other=0.0)
        fourth = tl.load(parts + 192 + r, mask=there, other=0.0)
        d_beta = d_beta + second + third + fourth
    d_beta += _whole(left, HALVES)
    if HAS_G:
        d_g = _whole(d_g, HALVES)
        d_g += tl.cumsum(_whole(log_in, HALVES), 1, reverse=True)
        if ERASE:
            d_g -= tl.cumsum(_whole(taken, HALVES), 1, reverse=True)
        d_g += tl.cumsum(bt * _whole(left_before, HALVES), 1)
        if HALVES:
            inner = tl.sum(inner, 1)[:, None]
        if HAS_DOC:
            d_g += tl.where(passes <= 0.0, 0.0, passes * inner)  # through says more where nothing passes
        else:
            d_g += tl.where(passes != 0.0, passes * inner, 0.0)
    # Neighbouring lanes write neighbouring heads. Along one axis: of two the compiler would choose the faster itself.
    i = tl.arange(0, 64 * TOGETHER)
    local = first + i % TOGETHER
    row = row0 + local * every
    t = c * 64 + i // TOGETHER
    at = (row // HV * T.to(tl.int64) + t) * HV + row % HV
    inside = (local < count) & (t < T)
    if HAS_G:
        tl.store(dg + at, tl.reshape(tl.trans(d_g), (64 * TOGETHER,)).to(dg.dtype.element_ty), mask=inside)
    tl.store(dbeta + at, tl.reshape(tl.trans(d_beta), (64 * TOGETHER,)).to(dbeta.dtype.element_ty), mask=inside)
