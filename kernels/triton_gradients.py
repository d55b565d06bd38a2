"""Triton pass 4: the gradients of a chunk's inputs, once its states are known. One program a chunk and key head.

With each chunk's S, errors, dS and dV kept, all chunks are independent of each other. Value heads that share a key head
are taken in turn, their dq and dk summed in registers. In the words of passes 1 and 2, W_ij = scale rq_i rk_j G_ij:

    dqk = (dO errors^T) * W * beta_j                          dq = e * (dO S^T) + dqk K
    dkk = -strict_lower(dV errors^T) * rk_i rk_j E * beta_j   dk = dqk^T Q + beta * out * (errors dS^T) - e' * (dV S^T)
                                                                   + (dkk + dkk^T) K
    dbeta_j = sum_i (dqk * Q K^T + dkk * K K^T)_ij / beta_j + out_j k_j . (errors dS^T)_j

g_t decays every pair j < t <= i, what the tokens i >= t see of the incoming state, what the tokens j < t leave to the
outgoing one, and the passage of the whole chunk: sums of just those log gradients, never differences of longer sums.

Two kernels, because dq and dk together do not fit the registers, and each holds the columns of K in two halves for
the same reason. *queries* leaves dqk (where P was) and its parts of dg and dbeta to *keys*.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_prepare import decays


@triton.jit
def _rows(pointer, stride, K: tl.constexpr, inside):
    r = tl.arange(0, 64)
    at = pointer + r[:, None] * stride + tl.arange(0, K)[None, :]
    return tl.load(at, mask=inside[:, None], other=0.0)


@triton.jit
def _state(pointer, iv, K: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr):
    """Rows iv to iv + BV of some columns of a transposed state."""
    return tl.load(pointer + (iv + tl.arange(0, BV))[:, None] * K + tl.arange(0, BK)[None, :])


@triton.jit
def _with_state(
    x, sx, inside, state, weight,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``weight * (x S^T)`` for some columns of K."""
    part = tl.zeros((64, BK), tl.float32)
    for iv in tl.range(0, V, BV, num_stages=STAGES):
        S = _state(state, iv, K, BV, BK)
        part = tl.dot(_rows(x + iv, sx, BV, inside), S, acc=part, input_precision=DOT)
    return tl.where(weight[:, None] != 0.0, weight[:, None] * part, 0.0)  # select: 0 * inf must not leak


@triton.jit
def _pairs(
    x, sx, inside, y, V: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """x y^T"""
    pairs = tl.zeros((64, 64), tl.float32)
    everywhere = tl.arange(0, 64) >= 0
    for iv in tl.range(0, V, BV, num_stages=STAGES):
        right = tl.trans(_rows(y + iv, V, BV, everywhere))
        pairs = tl.dot(_rows(x + iv, sx, BV, inside), right, acc=pairs, input_precision=DOT)
    return pairs


@triton.jit
def _products(x, sx, y, sy, inside, K: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr):
    """X Y^T over K"""
    found = tl.dot(_rows(x, sx, BK, inside), tl.trans(_rows(y, sy, BK, inside)), input_precision=DOT)
    if BK < K:
        right = tl.trans(_rows(y + BK, sy, BK, inside))
        found = tl.dot(_rows(x + BK, sx, BK, inside), right, acc=found, input_precision=DOT)
    return found


@triton.jit
def _inner(x, y, K: tl.constexpr, V: tl.constexpr):
    """The inner product of two states."""
    sums = tl.zeros((16, K), tl.float32)
    for iv in tl.static_range(0, V, 16):
        sums += _state(x, iv, K, 16, K).to(tl.float32) * _state(y, iv, K, 16, K).to(tl.float32)
    return tl.sum(tl.sum(sums, 1), 0)


@triton.jit
def _row_sums(x, pointer, stride, inside, BK: tl.constexpr):
    """sum_k x * y"""
    return tl.sum(x * _rows(pointer, stride, BK, inside).to(tl.float32), 1)


@triton.jit
def _crossing(rows, pairs, DOT: tl.constexpr):
    """``sum_i rows_ti pairs_ij``, rows of zeros and ones. Not in fp16: log gradients may pass its range."""
    if DOT == "tf32x3":
        return tl.dot(tl.where(rows, 1.0, 0.0), pairs, input_precision=DOT)
    else:
        return tl.dot(tl.where(rows, 1.0, 0.0).to(tl.bfloat16), pairs.to(tl.bfloat16))


@triton.jit
def _kept_pairs(doc, t0, T, HAS_DOC: tl.constexpr):
    """j <= i in one document."""
    r = tl.arange(0, 64)
    keep = r[:, None] >= r[None, :]
    if HAS_DOC:
        d = tl.load(doc + tl.minimum(t0 + r, T - 1))
        keep = keep & (d[:, None] == d[None, :])
    return keep


@triton.jit
def _write(
    out, sums0, sums1, x, sx, norm, inside, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr
):  # fmt: skip
    """The sums, both halves of K; of normalised x through y = x r, r = 1 / sqrt(|x|^2 + eps). They hold r dy so far, of
    which x r^2 (x . r dy) is taken off."""
    at = tl.arange(0, 64)[:, None] * (H * K) + tl.arange(0, BK)[None, :]
    if NORM:
        r = tl.load(norm + tl.arange(0, 64))
        along = _row_sums(sums0, x, sx, inside, BK)
        if BK < K:
            along += _row_sums(sums1, x + BK, sx, inside, BK)
        along = (r * r * along)[:, None]
        sums0 -= along * _rows(x, sx, BK, inside).to(tl.float32)
        if BK < K:
            sums1 -= along * _rows(x + BK, sx, BK, inside).to(tl.float32)
    tl.store(out + at, sums0.to(out.dtype.element_ty), mask=inside[:, None])
    if BK < K:
        tl.store(out + BK + at, sums1.to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["T", "NC", "B", "row0", "group", "sqb", "skb", "sob"])
def queries_kernel(
    q, k, do, doc, rows, states, errors, dqk, parts, dq,
    T, NC, B, row0, group, scale,
    sqb, sqt: tl.constexpr, sqh: tl.constexpr, skb, skt: tl.constexpr, skh: tl.constexpr,
    sob, sot: tl.constexpr, soh: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
    HAS_G: tl.constexpr, HAS_DOC: tl.constexpr, NORM: tl.constexpr,
    DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0).to(tl.int64)
    local = tl.program_id(1).to(tl.int64) * G  # in this launch's arrays
    first_row = row0 + local
    HV: tl.constexpr = H * G
    ib, ih = first_row // HV, (first_row % HV) // G
    r = tl.arange(0, 64)
    t0 = c * 64
    inside = r < tl.minimum(T - t0, 64).to(tl.int32)
    dtype = k.dtype.element_ty
    k += tl.multiple_of(ib * skb, 16) + ih * skh + t0 * skt
    q += tl.multiple_of(ib * sqb, 16) + ih * sqh + t0 * sqt
    do += tl.multiple_of(ib * sob, 16) + ih * G * soh + t0 * sot
    keep = _kept_pairs(doc + ib * T, t0, T, HAS_DOC)
    below = r[:, None] > r[None, :]
    dq0 = tl.zeros((64, BK), tl.float32)
    dq1 = dq0
    # group is G, but not known when this is compiled: unrolled the loop would be G times as long.
    for j in tl.range(0, group, disable_licm=True, num_stages=1):
        tile = (local + j) * NC + c
        row = (first_row + j) * NC + c
        at_row = rows + row * 512 + r
        bt = tl.load(at_row + 192)

        # The keys of the chunk.
        pairs = _pairs(do + j * soh, sot, inside, errors + tile * 64 * V, V, BV, DOT, STAGES)
        if HAS_G:
            hi = tl.load(at_row + 256)
            lo = tl.load(at_row + 320)
            pairs = pairs * decays(hi, lo, hi, lo, keep)
        rq = tl.load(at_row + 384)
        rk = tl.load(at_row + 448)
        pairs = tl.where(keep, pairs * (rq * scale)[:, None] * rk[None, :], 0.0)
        low = (pairs * bt[None, :]).to(dtype)
        tl.store(dqk + row * 4096 + r[:, None] * 64 + r[None, :], low)
        dq0 = tl.dot(low, _rows(k, skt, BK, inside), acc=dq0, input_precision=DOT)
        if BK < K:
            dq1 = tl.dot(low, _rows(k + BK, skt, BK, inside), acc=dq1, input_precision=DOT)
        pairs *= _products(q, sqt, k, skt, inside, K, BK, DOT)
        tl.store(parts + tile * 128 + r, tl.sum(pairs, 0))
        crossing = pairs
        if HAS_G:
            pairs = tl.where(below, pairs * bt[None, :], 0.0)
            crossing = _crossing(r[:, None] <= r[None, :], pairs, DOT)

        # The incoming state.
        of_q = tl.load(at_row)
        state = states + tile * K * V
        part = _with_state(do + j * soh, sot, inside, state, of_q, K, V, BV, BK, DOT, STAGES)
        dq0 += part
        log_in = _row_sums(part, q, sqt, inside, BK)
        if BK < K:
            part = _with_state(do + j * soh, sot, inside, state + BK, of_q, K, V, BV, BK, DOT, STAGES)
            dq1 += part
            log_in += _row_sums(part, q + BK, sqt, inside, BK)
        if HAS_G:
            terms = tl.where(below, crossing, log_in[None, :])
            tl.store(parts + tile * 128 + 64 + r, tl.sum(terms, 1))
    norm = rows + (first_row * NC + c) * 512 + 384
    _write(dq + ((ib * T + t0) * H + ih) * K, dq0, dq1, q, sqt, norm, inside, H, K, BK, NORM)


@triton.jit(do_not_specialize=["T", "NC", "B", "row0", "group", "sqb", "skb", "svb"])
def keys_kernel(
    q, k, doc, rows, through, states, errors, d_states, dv, dqk, parts, dk, dg, dbeta,
    T, NC, B, row0, group,
    sqb, sqt: tl.constexpr, sqh: tl.constexpr, skb, skt: tl.constexpr, skh: tl.constexpr,
    svb, svt: tl.constexpr, svh: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
    HAS_G: tl.constexpr, HAS_DOC: tl.constexpr, ERASE: tl.constexpr, PREVIOUS: tl.constexpr, NORM: tl.constexpr,
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
    dtype = k.dtype.element_ty
    k += tl.multiple_of(ib * skb, 16) + ih * skh + t0 * skt
    q += tl.multiple_of(ib * sqb, 16) + ih * sqh + t0 * sqt
    dv += tl.multiple_of(ib * svb, 16) + ih * G * svh + t0 * svt
    below = r[:, None] > r[None, :]
    strict = below & _kept_pairs(doc + ib * T, t0, T, HAS_DOC)
    dk0 = tl.zeros((64, BK), tl.float32)
    dk1 = dk0
    for j in tl.range(0, group, disable_licm=True, num_stages=1):
        tile = (local + j) * NC + c
        row = (first_row + j) * NC + c
        at_row = rows + row * 512 + r
        at_error = errors + tile * 64 * V
        S = states + tile * K * V
        dS = d_states + tile * K * V
        bt = tl.load(at_row + 192)

        # What was left to the outgoing state.
        of_out = tl.load(at_row + 128)
        part = _with_state(at_error, V, r >= 0, dS, of_out, K, V, BV, BK, DOT, STAGES)
        left = _row_sums(part, k, skt, inside, BK)
        dk0 += bt[:, None] * part
        if BK < K:
            part = _with_state(at_error, V, r >= 0, dS + BK, of_out, K, V, BV, BK, DOT, STAGES)
            left += _row_sums(part, k + BK, skt, inside, BK)
            dk1 += bt[:, None] * part
        low = tl.trans(tl.load(dqk + row * 4096 + r[:, None] * 64 + r[None, :]))
        dk0 = tl.dot(low, _rows(q, sqt, BK, inside), acc=dk0, input_precision=DOT)
        if BK < K:
            dk1 = tl.dot(low, _rows(q + BK, sqt, BK, inside), acc=dk1, input_precision=DOT)
        d_beta = left + tl.load(parts + tile * 128 + r)
        d_g = tl.sum(tl.where(below, (bt * left)[None, :], 0.0), 1)

        if ERASE:
            # What errors took back of the incoming state.
            of_k = tl.load(at_row + 64)
            part = _with_state(dv + j * svh, svt, inside, S, of_k, K, V, BV, BK, DOT, STAGES)
            log_error = -_row_sums(part, k, skt, inside, BK)
            dk0 -= part
            if BK < K:
                part = _with_state(dv + j * svh, svt, inside, S + BK, of_k, K, V, BV, BK, DOT, STAGES)
                log_error -= _row_sums(part, k + BK, skt, inside, BK)
                dk1 -= part

            # And of the errors before them.
            pairs = _pairs(dv + j * svh, svt, inside, at_error, V, BV, DOT, STAGES)
            if HAS_G:
                hi = tl.load(at_row + 256)
                lo = tl.load(at_row + 320)
                e_hi = hi
                e_lo = lo
                if PREVIOUS:  # the decay that an error sees ends one token earlier
                    e_hi = tl.load(at_row + 255, mask=r > 0, other=0.0)
                    e_lo = tl.load(at_row + 319, mask=r > 0, other=0.0)
                pairs = pairs * decays(e_hi, e_lo, hi, lo, strict)
            rk = tl.load(at_row + 448)
            pairs = tl.where(strict, -pairs * rk[:, None] * rk[None, :], 0.0)
            low = (pairs * bt[None, :]).to(dtype)
            kt = _rows(k, skt, BK, inside)
            dk0 = tl.dot(low, kt, acc=dk0, input_precision=DOT)
            dk0 = tl.dot(tl.trans(low), kt, acc=dk0, input_precision=DOT)
            if BK < K:
                kt = _rows(k + BK, skt, BK, inside)
                dk1 = tl.dot(low, kt, acc=dk1, input_precision=DOT)
                dk1 = tl.dot(tl.trans(low), kt, acc=dk1, input_precision=DOT)
            pairs *= _products(k, skt, k, skt, inside, K, BK, DOT)
            d_beta += tl.sum(pairs, 0)
            if HAS_G:
                pairs = pairs * bt[None, :]
                if PREVIOUS:
                    later = r[None, :] > r[:, None]
                    crossing = _crossing(later, pairs, DOT)
                    d_g += tl.sum(tl.where(below, crossing, tl.where(later, log_error[None, :], 0.0)), 1)
                else:
                    crossing = _crossing(r[:, None] <= r[None, :], pairs, DOT)
                    d_g += tl.sum(tl.where(below, crossing, log_error[None, :]), 1)
        at = (ib * T + t0 + r) * HV + ih * G + j
        tl.store(dbeta + at, d_beta.to(dbeta.dtype.element_ty), mask=inside)
        if HAS_G:
            passes = tl.load(through + row)
            d_g += tl.load(parts + tile * 128 + 64 + r) + tl.where(passes != 0.0, passes * _inner(S, dS, K, V), 0.0)
            tl.store(dg + at, d_g.to(dg.dtype.element_ty), mask=inside)
    norm = rows + (first_row * NC + c) * 512 + 448
    _write(dk + ((ib * T + t0) * H + ih) * K, dk0, dk1, k, skt, norm, inside, H, K, BK, NORM)
