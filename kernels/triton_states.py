"""Triton pass 2: the recurrence over the chunks of each segment, for a block of the state's columns.

With the tiles and scales of pass 1, in a chunk:

    errors = A [V - e' * (K S)]     V' = beta * errors
    O = e * (Q S) + P V'            S <- exp(b_C) S + K^T (exp(b_C - b) * V')

One kernel, three uses: *summarise* keeps the last state alone (of the values from zero: U; of no values from the
identity: M, and whether nothing of it is left), *apply* writes outputs, and the backward pass keeps each chunk's
incoming state and errors.

The state is held transposed, ``[BV, K]``: then every product has its freshly made operand on the left, where it goes to
the matrix units from registers, and the operand from memory on the right.

In a chunk with several documents no product over its tokens may meet what is not finite (:mod:`.triton_prepare`):
errors that are not, of values or of the state, are taken to be zero, and so are spoilt keys. The outputs of such a
state are not finite by themselves, and it does not go on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .helpers import hashed
from .triton_prepare import SEVERAL, lost

UNDERFLOW = tl.constexpr(-88.0)  # exp of it is less than the smallest normal number of fp32
LOOK = tl.constexpr(128)  # chunks looked at for an underflow


@hashed
@triton.jit
def last_underflow(bound, first, stop):
    """The last chunk of a segment before whose start nothing reaches the segment's end, as a normal number of fp32; its
    first chunk where all may. ``bound`` are a head's logs of how much longer each chunk can make a state."""
    c = stop - LOOK + tl.arange(0, LOOK)
    there = c >= first
    left = tl.cumsum(tl.load(bound + c, mask=there, other=0.0), 0, reverse=True)
    return tl.max(tl.where(there & (left < UNDERFLOW), c, first), 0)


@triton.jit(do_not_specialize=["T", "NC", "segment_chunks", "B", "N", "row0", "sqb", "skb", "svb", "sob"])
def states_kernel(
    q, k, v, A, P, rows, through, bound, need, incoming, o, states, errors, M, U, forgets,
    T, NC, segment_chunks, B, N, row0,
    sqb: tl.int64, sqt: tl.constexpr, sqh: tl.constexpr, skb: tl.int64, skt: tl.constexpr, skh: tl.constexpr,
    svb: tl.int64, svt: tl.constexpr, svh: tl.constexpr, sob: tl.int64, sot: tl.constexpr, soh: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    HAS_DOC: tl.constexpr, ERASE: tl.constexpr,
    SUMMARY: tl.constexpr, OUTPUT: tl.constexpr, KEEP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    n = tl.program_id(1)
    local = tl.program_id(2).to(tl.int64)  # row of the arrays of this launch alone; row0 is the launch's first
    row = row0 + local
    HV: tl.constexpr = H * G
    ib, hv = row // HV, row % HV
    ck = tl.arange(0, K)
    r = tl.arange(0, 64)
    state_row = (n.to(tl.int64) * B + ib) * HV + hv
    is_M = False
    column = block * BV
    if SUMMARY:
        is_M = block >= V // BV
        if is_M:
            column = column - V
        if tl.load(need + n * 2 + is_M.to(tl.int32)) == 0:
            return
    cv = column + tl.arange(0, BV)
    if SUMMARY:
        S = tl.where((ck[None, :] == cv[:, None]) & is_M, 1.0, 0.0)
    else:
        S = tl.load(incoming + state_row * K * V + ck[None, :] * V + cv[:, None])
    dtype = k.dtype.element_ty
    q += tl.multiple_of(ib * sqb, 16) + (hv // G) * sqh
    k += tl.multiple_of(ib * skb, 16) + (hv // G) * skh
    v += tl.multiple_of(ib * svb, 16) + hv * svh
    first = n.to(tl.int64) * segment_chunks
    stop = tl.minimum(first + segment_chunks, NC)
    if SUMMARY:
        start = last_underflow(bound + row * NC, first, stop)
        if block == V // BV:  # the first of M's
            tl.store(forgets + state_row, (start > first).to(tl.int32))
        if start > first:
            S = tl.zeros((BV, K), tl.float32)
            if is_M:
                start = stop
        first = start
    # The compiler fetches ahead what is multiplied; what only scales a product is fetched here, a chunk ahead.
    of_q_next = tl.zeros((64,), tl.float32)
    if OUTPUT:
        of_q_next = tl.load(rows + (row * NC + first) * 512 + r)
    passes_next = tl.load(through + row * NC + first, mask=first < stop, other=0.0)
    for c in range(first, stop):
        t0 = c * 64
        following = row * NC + tl.minimum(c + 1, stop - 1)
        of_q, passes = of_q_next, passes_next
        if OUTPUT:
            of_q_next = tl.load(rows + following * 512 + r)
        passes_next = tl.load(through + following)
        if HAS_DOC:
            several, spoilt = passes < 0.0, passes < SEVERAL
            passes = tl.where(several, 0.0, passes)
        inside = r < tl.minimum(T - t0, 64).to(tl.int32)
        at_row = rows + (row * NC + c) * 512 + r
        bt = tl.load(at_row + 192)
        of_out = tl.load(at_row + 128)
        kt = tl.load(k + t0 * skt + r[:, None] * skt + ck[None, :], mask=inside[:, None], other=0.0)
        wanted = inside[None, :]
        if SUMMARY:
            wanted = wanted & (not is_M)
        error = tl.load(v + t0 * svt + r[None, :] * svt + cv[:, None], mask=wanted, other=0.0).to(tl.float32)
        low = S.to(dtype)
        if KEEP:
            at = states + (local * NC + c) * K * V + cv[:, None] * K + ck[None, :]
            tl.store(at, low)
        if ERASE:
            of_k = tl.load(at_row + 64)[None, :]
            held = tl.dot(low, tl.trans(kt), input_precision=DOT)
            error -= tl.where(of_k != 0.0, of_k * held, 0.0)  # select: 0 * inf must not leak
        if HAS_DOC:
            error = tl.where(several, tl.where(lost(error), 0.0, error), error)
        if ERASE:
            At = tl.load(A + (row * NC + c) * 4096 + r[:, None] * 64 + r[None, :])
            error = tl.dot(error.to(dtype), tl.trans(At), input_precision=DOT)
        if KEEP:
            at = errors + ((local * NC + c) * 64 + r[None, :]) * V + cv[:, None]
            tl.store(at, error.to(dtype))
        new = bt[None, :] * error
        if OUTPUT:
            qt = tl.load(q + t0 * sqt + r[:, None] * sqt + ck[None, :], mask=inside[:, None], other=0.0)
            Pt = tl.load(P + (row * NC + c) * 4096 + r[:, None] * 64 + r[None, :])
            ot = tl.dot(low, tl.trans(qt), input_precision=DOT)
            ot = tl.where(of_q[None, :] != 0.0, of_q[None, :] * ot, 0.0)
            ot = tl.dot(new.to(dtype), tl.trans(Pt), acc=ot, input_precision=DOT)
            at = o + tl.multiple_of(ib * sob, 16) + hv * soh + t0 * sot + r[None, :] * sot + cv[:, None]
            tl.store(at, ot.to(o.dtype.element_ty), mask=inside[None, :])
        S = tl.where(passes != 0.0, S * passes, 0.0)
        left = tl.where(of_out[None, :] != 0.0, of_out[None, :] * new, 0.0).to(dtype)
        S = tl.dot(left, kt, acc=S, input_precision=DOT)
        if HAS_DOC:  # noqa: SIM102 (a constant, and a number of the device's)
            if spoilt:  # seldom: once more, without spoilt keys, and from zero, since nothing passes
                of_q = tl.load(at_row)
                at_k = k + t0 * skt + r[:, None] * skt + ck[None, :]
                kt = tl.load(at_k, mask=(inside & (of_q == of_q))[:, None], other=0.0)
                S = tl.dot(left, kt, input_precision=DOT)
    if SUMMARY:
        if is_M:
            tl.store(M + state_row * K * K + ck[None, :] * K + cv[:, None], S)
        else:
            tl.store(U + state_row * K * V + ck[None, :] * V + cv[:, None], S)
