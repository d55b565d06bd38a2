"""Triton pass 3: the reverse recurrence, dS the gradient of the state that leaves the chunk.

    dV' = P^T dO + exp(b_C - b) * (K dS)     dV = A^T (beta * dV')     dS <- exp(b_C) dS + Q^T (e * dO) - K^T (e' * dV)

with pass 1's tiles and scales. The last dS from zero is the segment's D. As in pass 2 the state lies transposed.

In a chunk with several documents those are spoilt too of which an output's gradient is not finite, and the one that
goes on where dS is not. They are left out of all products, and their dV is NaN; so is dS, where one comes from before.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .helpers import hashed
from .triton_prepare import in_documents, lost
from .triton_states import LOOK, UNDERFLOW


@hashed
@triton.jit
def first_underflow(bound, first, stop):
    """The mirror of :func:`.triton_states.last_underflow`: the end of the first chunks of a segment behind which
    nothing reaches the segment's start."""
    c = first + tl.arange(0, LOOK)
    there = c < stop
    left = tl.cumsum(tl.load(bound + c, mask=there, other=0.0), 0)
    return tl.min(tl.where(there & (left < UNDERFLOW), c + 1, stop), 0)


@triton.jit(
    do_not_specialize=["T", "NC", "segment_chunks", "B", "N", "row0", "sqb", "skb", "sob", "svb"],
    do_not_specialize_on_alignment=["doc"],
)
def reverse_kernel(
    q, k, do, A, P, rows, through, bound, doc, need, outgoing, d_states, dv, D,
    T, NC, segment_chunks, B, N, row0,
    sqb: tl.int64, sqt: tl.constexpr, sqh: tl.constexpr, skb: tl.int64, skt: tl.constexpr, skh: tl.constexpr,
    sob: tl.int64, sot: tl.constexpr, soh: tl.constexpr, svb: tl.int64, svt: tl.constexpr, svh: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    HAS_DOC: tl.constexpr, ERASE: tl.constexpr,
    SUMMARY: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1)
    local = tl.program_id(2).to(tl.int64)
    row = row0 + local
    HV: tl.constexpr = H * G
    ib, hv = row // HV, row % HV
    ck = tl.arange(0, K)
    cv = tl.program_id(0) * BV + tl.arange(0, BV)
    r = tl.arange(0, 64)
    state_row = (n.to(tl.int64) * B + ib) * HV + hv
    at_state = state_row * K * V + ck[None, :] * V + cv[:, None]
    if SUMMARY:
        if tl.load(need + n) == 0:
            return
        dS = tl.zeros((BV, K), tl.float32)
    else:
        dS = tl.load(outgoing + at_state)
    dtype = k.dtype.element_ty
    q += tl.multiple_of(ib * sqb, 16) + (hv // G) * sqh
    k += tl.multiple_of(ib * skb, 16) + (hv // G) * skh
    do += tl.multiple_of(ib * sob, 16) + hv * soh
    dv += tl.multiple_of(ib * svb, 16) + hv * svh
    first = n.to(tl.int64) * segment_chunks
    last = tl.minimum(first + segment_chunks, NC)
    if SUMMARY:
        last = first_underflow(bound + row * NC, first, last)
    # As in pass 2 what only scales is fetched a chunk ahead. any_sees: whether a token sees the incoming state.
    passes_next = tl.load(through + row * NC + last - 1, mask=last > first, other=0.0)
    any_sees_next = tl.load(rows + (row * NC + last - 1) * 512 + 64, mask=last > first, other=0.0)
    for i in range(0, last - first):
        c = last - 1 - i
        following = row * NC + tl.maximum(c - 1, first)
        passes, any_sees = passes_next, any_sees_next
        passes_next = tl.load(through + following)
        any_sees_next = tl.load(rows + following * 512 + 64)
        t0 = c * 64
        inside = r < tl.minimum(T - t0, 64).to(tl.int32)
        at_row = rows + (row * NC + c) * 512 + r
        of_q = tl.load(at_row)[None, :]
        of_out = tl.load(at_row + 128)[None, :]
        bt = tl.load(at_row + 192)[None, :]
        kt = tl.load(k + t0 * skt + r[:, None] * skt + ck[None, :], mask=inside[:, None], other=0.0)
        qt = tl.load(q + t0 * sqt + r[:, None] * sqt + ck[None, :], mask=inside[:, None], other=0.0)
        grad = tl.load(do + t0 * sot + r[None, :] * sot + cv[:, None], mask=inside[None, :], other=0.0)
        Pt = tl.load(P + (row * NC + c) * 4096 + r[:, None] * 64 + r[None, :])
        if HAS_DOC:
            spoilt = r < 0
            any_spoilt = False
            if passes < 0.0:  # several documents
                passes = 0.0
                of_q_r = tl.load(at_row)
                dS_lost = tl.max(tl.max(lost(dS).to(tl.int32), 1), 0) != 0
                spoilt = (of_q_r != of_q_r) | (tl.max(lost(grad).to(tl.int32), 0) != 0)
                spoilt = spoilt | (tl.where(dS_lost, tl.load(at_row + 128), 0.0) != 0.0)
                spoilt = in_documents(spoilt, tl.load(doc + ib * T + tl.minimum(t0 + r, T - 1)))
                any_spoilt = tl.max(spoilt.to(tl.int32), 0) != 0
                if (any_sees != 0.0) & (tl.max((spoilt & (r == 0)).to(tl.int32), 0) != 0):
                    passes = float("nan")
            ok = spoilt == 0
            of_q = tl.where(ok[None, :], of_q, 0.0)
            of_out = tl.where(ok[None, :], of_out, 0.0)
            grad = tl.where(ok[None, :], grad, 0.0)
        low = dS.to(dtype)
        if not SUMMARY:
            tl.store(d_states + (local * NC + c) * K * V + cv[:, None] * K + ck[None, :], low)
        dnew = tl.dot(low, tl.trans(kt), input_precision=DOT)
        dnew = tl.where(of_out != 0.0, of_out * dnew, 0.0)
        dnew = tl.dot(grad, Pt, acc=dnew, input_precision=DOT) * bt
        if ERASE:
            At = tl.load(A + (row * NC + c) * 4096 + r[:, None] * 64 + r[None, :])
            dnew = tl.dot(dnew.to(dtype), At, input_precision=DOT)
        if not SUMMARY:
            at = dv + t0 * svt + r[None, :] * svt + cv[:, None]
            d_value = dnew
            if HAS_DOC:
                d_value = tl.where(ok[None, :], dnew, float("nan"))
            tl.store(at, d_value.to(dv.dtype.element_ty), mask=inside[None, :])
        dS = tl.where(passes != 0.0, dS * passes, 0.0)
        seen = tl.where(of_q != 0.0, of_q * grad.to(tl.float32), 0.0).to(dtype)
        dS = tl.dot(seen, qt, acc=dS, input_precision=DOT)
        if ERASE:
            of_k = tl.load(at_row + 64)[None, :]
            erased = tl.where(of_k != 0.0, -of_k * dnew, 0.0).to(dtype)
            dS = tl.dot(erased, kt, acc=dS, input_precision=DOT)
        if HAS_DOC:  # noqa: SIM102 (a constant, and a number of the device's)
            if any_spoilt:  # seldom: once more, without them, and from zero, since nothing passes
                wanted = (inside & ok)[:, None]
                qt = tl.load(q + t0 * sqt + r[:, None] * sqt + ck[None, :], mask=wanted, other=0.0)
                dS = tl.dot(seen, qt, acc=tl.zeros((BV, K), tl.float32) + passes, input_precision=DOT)
                if ERASE:
                    kt = tl.load(k + t0 * skt + r[:, None] * skt + ck[None, :], mask=wanted, other=0.0)
                    dS = tl.dot(erased, kt, acc=dS, input_precision=DOT)
        # Where no token sees the incoming state, nothing in the chunk, not even 0 * nan, reaches its gradient.
        dS = tl.where(any_sees != 0.0, dS, 0.0)
    if SUMMARY:
        tl.store(D + at_state, dS)
