"""The chunked delta rule in torch operations, on any device: one segment at a time.

The form is that of Yang et al., arXiv:2406.06484, and with decay arXiv:2412.06464. In a chunk of C = 64 tokens, with b
the cumulative log decay, G_ij = exp(b_i - b_j) for i >= j, e = exp(b), and E_ij = G_ij, or exp(b_{i-1} - b_j) where the
error is taken from the undecayed state (then e' = exp(b_{i-1})):

    A     = (I + strict_lower(beta_i (k_i . k_j) E_ij))^-1
    V'    = A [beta * (V - e' * (K S_in))]
    O     = scale * [e * (Q S_in) + P V'],  P = tril(Q K^T) * G
    S_out = exp(b_C) S_in + K^T (exp(b_C - b) * V')

The functions come in two pairs. ``summarise`` says what a segment does to any incoming state, ``apply`` computes its
outputs from the true one; ``summarise_backward`` and ``apply_backward`` are the same for gradients, right to left.
Every segment is computed by operations whose shapes depend on the segment alone, so that its bits do not depend on
how many segments are here.

Precision: states, gates and products in fp32 (fp64 for fp64 inputs), cumulative decays in fp64, because a sum of
decays loses the small ones that follow a strong one. The gradient of g sums the pairs that straddle a token, never
the difference of two sums that nearly cancel.

What is not finite stays in its document. Products over a chunk's tokens would multiply it by the zeros that stand
between documents, so it is taken out first, a token, a state or a gradient as a whole, and what follows from it is made
NaN behind the products (:class:`Spoilt`).

Tensors inside are ``[n, B, HV, C, .]``: chunk first, so that the loop over chunks reads contiguous memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .finite import all_finite, among, any_of, in_documents, is_lost, made_nan, not_finite
from .reference import l2norm
from .segments import CHUNK, Gradients, Inputs

L2NORM_EPS = 1e-6


@dataclass(frozen=True)
class Spoilt:
    """Where a segment's tokens were not finite, bool ``[n, B, HV, C, 1]``."""

    token: Tensor  # k, v, g or beta
    query: Tensor
    after: Tensor  # such a token, not only of q, is here or before this one in its document


@dataclass(frozen=True)
class Chunks:
    """What the passes need of a segment before any state is known."""

    q: Tensor  # [n, B, HV, C, K], normalised where asked
    k: Tensor
    v: Tensor  # [n, B, HV, C, V]
    beta: Tensor  # [n, B, HV, C, 1]
    G: Tensor  # [n, B, HV, C, C], zero above the diagonal and between documents
    E: Tensor  # the same for errors, zero on the diagonal too
    A: Tensor | None  # None without erase
    kk: Tensor | None  # K K^T
    P: Tensor  # tril(Q K^T) * G
    in_q: Tensor  # e: the incoming state as a query sees it, [n, B, HV, C, 1]
    in_k: Tensor  # e': as an error sees it
    out: Tensor  # exp(b_C - b): each token's weight in the outgoing state
    through: Tensor  # exp(b_C): the incoming state's, [n, B, HV, 1, 1]
    sees: Tensor | None  # bool [n, B, 1, C, 1]: the incoming state is of the token's document; None: always
    ends: Tensor | None  # the same of the outgoing state
    same: Tensor | None  # bool [n, B, 1, C, C]: tokens of one document; None: all are
    spoilt: Spoilt | None  # None: all is finite


def _to_chunks(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """``[B, T, H, D]`` to ``[n, B, H * groups, C, D]``, padded with zeros to whole chunks, heads repeated."""
    B, T, H, D = x.shape
    n = -(-T // CHUNK)
    x = F.pad(x.to(dtype), (0, 0, 0, 0, 0, n * CHUNK - T)).view(B, n, CHUNK, H, D).permute(1, 0, 3, 2, 4)
    return (x.repeat_interleave(groups, dim=2) if groups > 1 else x).contiguous()


def _from_chunks(x: Tensor, groups: int, T: int, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`_to_chunks`; gradients of repeated heads are summed."""
    n, B, HV, C, D = x.shape
    if groups > 1:
        x = x.view(n, B, HV // groups, groups, C, D).sum(3)
    return x.permute(1, 0, 3, 2, 4).reshape(B, n * C, HV // groups, D)[:, :T].to(dtype)


def _matrix_exp_of_differences(later: Tensor, earlier: Tensor, keep: Tensor, dtype: torch.dtype) -> Tensor:
    """``exp(later_i - earlier_j)`` where ``keep``, else 0; only kept, non-positive differences are exponentiated."""
    difference = (later - earlier.mT).masked_fill(~keep, -torch.inf)
    return difference.to(dtype).exp()


def prepare(x: Inputs) -> Chunks:
    """All of a segment that does not depend on a state."""
    B, T, HV, _ = x.v.shape
    groups, dtype, device = HV // x.k.shape[2], x.state_dtype, x.v.device
    q, k = _to_chunks(x.q, 1, dtype), _to_chunks(x.k, 1, dtype)
    if x.normalise_qk:
        q, k = l2norm(q, L2NORM_EPS), l2norm(k, L2NORM_EPS)
    if groups > 1:
        q, k = q.repeat_interleave(groups, dim=2), k.repeat_interleave(groups, dim=2)
    v = _to_chunks(x.v, 1, dtype)
    beta = _to_chunks(x.beta[..., None], 1, dtype)
    n = len(q)
    g = v.new_zeros(n, B, HV, CHUNK, 1, dtype=torch.float64)
    if x.g is not None:
        g = _to_chunks(x.g[..., None], 1, torch.float64)
    bad = bad_q = None
    if not all_finite(q, k, v, beta, g):
        bad_q, bad = not_finite(q), not_finite(k) | not_finite(v) | not_finite(beta) | not_finite(g)
        q, (k, v, beta, g) = q.masked_fill(bad_q, 0), (y.masked_fill(bad, 0) for y in (k, v, beta, g))

    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=device).tril()
    sees = ends = same = None
    if x.doc_start is None:
        b = g.cumsum(-2)
        keep = lower
        last = b[..., -1:, :]
        out = (last - b).to(dtype).exp()
        in_q, through = b.to(dtype).exp(), last.to(dtype).exp()
        in_k = (b - g).to(dtype).exp()
    else:
        start = F.pad(x.doc_start[:, :, None, None], (0, 0, 0, 0, 0, n * CHUNK - T))
        if n * CHUNK > T:
            start[:, T:] = x.doc_start[:, -1:, None, None]  # padding belongs to the last document
        start = start.view(B, n, CHUNK, 1, 1).permute(1, 0, 3, 2, 4)  # [n, B, 1, C, 1]
        same = start == start.mT
        keep = same & lower
        # Within the document alone: another one's decays must not touch these sums, not even their rounding.
        b = torch.matmul(keep.double(), g)
        chunk_start = x.segments.starts[0] + CHUNK * torch.arange(n, device=device).view(n, 1, 1, 1, 1)
        sees = start < chunk_start
        ends = same[..., -1:]  # of the document that the outgoing state belongs to
        last = b[..., -1:, :]
        out = (last - b).masked_fill(~ends, -torch.inf).to(dtype).exp()
        in_q = b.masked_fill(~sees, -torch.inf).to(dtype).exp()
        in_k = (b - g).masked_fill(~sees, -torch.inf).to(dtype).exp()
        through = last.masked_fill(~sees[..., -1:, :], -torch.inf).to(dtype).exp()

    G = _matrix_exp_of_differences(b, b, keep, dtype)
    strict = keep & ~torch.eye(CHUNK, dtype=torch.bool, device=device)
    if x.rule.error_decay == "previous":
        E = _matrix_exp_of_differences(b - g, b, strict, dtype)
    else:
        E, in_k = G * strict, in_q
    P = torch.matmul(q, k.mT).masked_fill(~keep, 0.0) * G
    spoilt = None
    if bad is not None and bad_q is not None:
        spoilt = Spoilt(bad, bad_q, torch.matmul(keep.to(dtype), bad.to(dtype)) > 0)
    A = kk = None
    if x.rule.erase:
        kk = torch.matmul(k, k.mT)
        L = (beta * kk).masked_fill(~strict, 0.0) * E
        identity = torch.eye(CHUNK, dtype=dtype, device=device).expand_as(L)
        A = torch.linalg.solve_triangular(L, identity, upper=False, unitriangular=True)
    return Chunks(q, k, v, beta, G, E, A, kk, P, in_q, in_k, out, through, sees, ends, same, spoilt)


def _select(sees: Tensor | None, term: Tensor) -> Tensor:
    """A term of the incoming state, where that state is of the token's document (select: 0 * inf must not leak)."""
    return term if sees is None else torch.where(sees, term, 0.0)


def _state_pass(c: Chunks, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The recurrence over a segment's chunks: ``(V', incoming state of each chunk, where it was lost, outgoing
    state)``. Where one is lost, zeros stand in its place, but for the state that goes out."""
    new_values, states, losses = [], [], []
    watch = c.spoilt is not None or not all_finite(state)
    for i in range(len(v)):
        if watch:
            losses.append(is_lost(state))
            state = state.masked_fill(losses[-1], 0)
        states.append(state)
        error = v[i]
        sees = None if c.sees is None else c.sees[i]
        if c.A is not None:
            error = error - _select(sees, c.in_k[i] * torch.matmul(c.k[i], state))
        new = c.beta[i] * error
        if c.A is not None:
            new = torch.matmul(c.A[i], new)
        new_values.append(new)
        carried = _select(None if sees is None else sees[..., -1:, :], c.through[i] * state)
        state = carried + torch.matmul(c.k[i].mT, c.out[i] * new)
        if watch:
            gone = among(losses[-1], None if sees is None else sees[..., -1:, :])
            state = made_nan(state, any_of(gone, None if c.spoilt is None else c.spoilt.after[i, ..., -1:, :]))
    return torch.stack(new_values), torch.stack(states), torch.stack(losses) if watch else None, state


def summarise(x: Inputs, need_M: tuple[bool, ...], need_U: tuple[bool, ...]) -> tuple[Tensor, Tensor, None]:
    """What each segment does to a state: ``S_out = M S_in + U``.

    Returns:
        ``M [N, B, HV, K, K]`` and ``U [N, B, HV, K, V]`` in the state dtype, zero where not needed; and None, since it
        is not looked for where M is zero.
    """
    B, _, HV, V = x.v.shape
    N, K = len(x.segments), x.k.shape[-1]
    M = x.v.new_zeros(N, B, HV, K, K, dtype=x.state_dtype)
    U = x.v.new_zeros(N, B, HV, K, V, dtype=x.state_dtype)
    # Columns of the state are independent: M is the pass from the identity with no values, U that from zero.
    for n, _, part in x.by_segment():
        if not need_M[n] and not need_U[n]:
            continue
        c = prepare(part)
        if need_U[n]:
            U[n] = _state_pass(c, c.v, torch.zeros_like(U[n]))[-1]
        if need_M[n]:
            identity = torch.eye(K, dtype=x.state_dtype, device=x.v.device).expand(B, HV, K, K)
            M[n] = _state_pass(c, torch.zeros_like(c.k), identity)[-1]
    return M, U, None


def apply(x: Inputs, incoming_NBHKV: Tensor) -> Tensor:
    """Outputs ``[B, T, HV, V]`` in v's dtype, from the state that enters each segment."""
    outputs = []
    for n, _, part in x.by_segment():
        c = prepare(part)
        new, states, lost, _ = _state_pass(c, c.v, incoming_NBHKV[n])
        from_state = _select(c.sees, c.in_q * torch.matmul(c.q, states))
        o = x.scale * (from_state + torch.matmul(c.P, new))
        own = None if c.spoilt is None else c.spoilt.query | c.spoilt.after
        o = made_nan(o, any_of(own, None if lost is None else among(lost, c.sees)))
        outputs.append(_from_chunks(o, 1, part.v.shape[1], x.v.dtype))
    return torch.cat(outputs, dim=1)


def _gradient_pass(
    x: Inputs, c: Chunks, do: Tensor, spoilt: Tensor | None, dstate: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The reverse recurrence: ``(dR, dS_out of each chunk, where it was lost, dS_in of the segment)`` with R = beta *
    error. ``spoilt``: the tokens in whose document something is not finite."""
    d_new_local = x.scale * torch.matmul(c.P.mT, do)
    d_state_local = x.scale * torch.matmul(c.q.mT, _select(c.sees, c.in_q * do))
    d_errors: list[Tensor] = []
    d_states: list[Tensor] = []
    losses: list[Tensor] = []
    watch = spoilt is not None or not all_finite(dstate)
    for i in reversed(range(len(do))):
        if watch:
            losses.append(is_lost(dstate))
            dstate = dstate.masked_fill(losses[-1], 0)
        d_states.append(dstate)
        dR = d_new_local[i] + c.out[i] * torch.matmul(c.k[i], dstate)
        if c.A is not None:
            dR = torch.matmul(c.A[i].mT, dR)
        d_errors.append(dR)
        sees = None if c.sees is None else c.sees[i]
        dstate = _select(None if sees is None else sees[..., -1:, :], c.through[i] * dstate) + d_state_local[i]
        if c.A is not None:
            dstate = dstate - torch.matmul(c.k[i].mT, _select(sees, c.beta[i] * c.in_k[i] * dR))
        if watch:
            gone = among(losses[-1], None if sees is None else sees[..., -1:, :])
            own = None if spoilt is None else among(spoilt[i], sees).any(-2, keepdim=True)
            dstate = made_nan(dstate, any_of(gone, own))
    lost = torch.stack(losses[::-1]) if watch else None
    return torch.stack(d_errors[::-1]), torch.stack(d_states[::-1]), lost, dstate


def _gradient_in(c: Chunks, do_BTHV: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The outputs' gradient by chunks, what is not finite taken out; the tokens in whose document something is not."""
    do = _to_chunks(do_BTHV, 1, dtype)
    if c.spoilt is None and all_finite(do):
        return do, None
    bad = not_finite(do)
    own = bad if c.spoilt is None else bad | c.spoilt.token | c.spoilt.query
    return do.masked_fill(bad, 0), in_documents(c.same, own)


def summarise_backward(x: Inputs, do_BTHV: Tensor, need_D: tuple[bool, ...]) -> Tensor:
    """``D [N, B, HV, K, V]``: the gradient of the state that enters each segment, were that of the state which
    leaves it zero (``dS_in = M^T dS_out + D``); zero where not needed."""
    B, _, HV, V = x.v.shape
    D = x.v.new_zeros(len(x.segments), B, HV, x.k.shape[-1], V, dtype=x.state_dtype)
    for n, tokens, part in x.by_segment():
        if need_D[n]:
            c = prepare(part)
            do, spoilt = _gradient_in(c, do_BTHV[:, tokens], x.state_dtype)
            D[n] = _gradient_pass(part, c, do, spoilt, torch.zeros_like(D[n]))[-1]
    return D


def apply_backward(x: Inputs, incoming_NBHKV: Tensor, do_BTHV: Tensor, coming: Callable[[], Tensor]) -> Gradients:
    """Gradients of the inputs.

    Args:
        incoming_NBHKV: the state that enters each segment.
        do_BTHV: gradient of the outputs.
        coming: awaits the gradient of the state that leaves each segment, ``[N, B, HV, K, V]``, from everything
            to its right; called once, behind what can be done without it.
    """
    outgoing_grad_NBHKV = coming()
    grads = [
        _segment_backward(part, incoming_NBHKV[n], do_BTHV[:, tokens], outgoing_grad_NBHKV[n])
        for n, tokens, part in x.by_segment()
    ]
    return Gradients(
        q=torch.cat([d.q for d in grads], 1),
        k=torch.cat([d.k for d in grads], 1),
        v=torch.cat([d.v for d in grads], 1),
        g=None if x.g is None else torch.cat([d.g for d in grads if d.g is not None], 1),
        beta=torch.cat([d.beta for d in grads], 1),
    )


def _l2norm_backward(x: Tensor, dy: Tensor) -> Tensor:
    """Of ``y = x / sqrt(|x|^2 + eps)``."""
    r = torch.rsqrt(x.square().sum(-1, keepdim=True) + L2NORM_EPS)
    return r * (dy - x * (r * r * (x * dy).sum(-1, keepdim=True)))


def _segment_backward(x: Inputs, incoming_BHKV: Tensor, do_BTHV: Tensor, outgoing_grad_BHKV: Tensor) -> Gradients:
    c = prepare(x)
    B, T, HV, _ = x.v.shape
    groups = HV // x.k.shape[2]
    do, spoilt = _gradient_in(c, do_BTHV, x.state_dtype)
    new, states, lost, _ = _state_pass(c, c.v, incoming_BHKV)
    dR, d_states, lost_behind, _ = _gradient_pass(x, c, do, spoilt, outgoing_grad_BHKV)
    behind = None if lost_behind is None else among(lost_behind, c.ends)
    spoilt = any_of(spoilt, None if lost is None else among(lost, c.sees), behind)
    ones = torch.ones(CHUNK, CHUNK, dtype=x.state_dtype, device=x.v.device)
    upper, strict_lower, strict_upper = ones.triu(), ones.tril(-1), ones.triu(1)

    # Queries, and the keys they met inside the chunk.
    dP = x.scale * torch.matmul(do, new.mT)
    dqk = dP * c.G
    pairs = strict_lower * (dP * c.P)  # the log gradient of G_ij, strictly lower: on the diagonal G is 1 throughout
    do_state = torch.matmul(do, states.mT)
    dq = x.scale * _select(c.sees, c.in_q * do_state) + torch.matmul(dqk, c.k)
    dk = torch.matmul(dqk.mT, c.q)
    log_in = x.scale * _select(c.sees, c.in_q * (do_state * c.q).sum(-1, keepdim=True))

    # The outgoing state.
    out_grad = torch.matmul(new, d_states.mT)  # [n, B, HV, C, K]: dS_out v'
    dk = dk + _select(c.out > 0 if c.sees is not None else None, c.out * out_grad)
    log_out = _select(c.out > 0 if c.sees is not None else None, c.out * (out_grad * c.k).sum(-1, keepdim=True))
    through = c.through * (states * d_states).sum((-1, -2), keepdim=True)
    log_through = _select(None if c.sees is None else c.sees[..., -1:, :], through)

    # Errors and their inverse.
    error, log_in_error, pairs_error = c.v, None, None
    dbeta_inverse: Tensor | float = 0.0
    if c.A is not None:
        assert c.kk is not None
        held = torch.matmul(c.k, states)
        error = error - _select(c.sees, c.in_k * held)
        dL = -torch.matmul(dR, new.mT)
        dL_E = dL * c.E
        dbeta_inverse = (dL_E * c.kk).sum(-1, keepdim=True)
        pairs_error = c.beta * c.kk * dL_E
        dkk = c.beta * dL_E
        dk = dk + torch.matmul(dkk + dkk.mT, c.k)
        d_held = -_select(c.sees, c.beta * c.in_k * dR)
        dk = dk + _select(c.sees, torch.matmul(d_held, states.mT))
        log_in_error = (d_held * held).sum(-1, keepdim=True)
        if c.sees is not None:
            log_in_error = torch.where(c.sees, log_in_error, 0.0)
    dbeta = (dR * error).sum(-1, keepdim=True) + dbeta_inverse
    dv = c.beta * dR

    dg = None
    if x.g is not None:
        # g_t decays every pair j < t <= i, the incoming state seen from i >= t, each token's part j < t in the
        # outgoing state, and the passage of the whole chunk. Sums of ones' products, never differences.
        log_in_current = log_in
        straddling = torch.matmul(upper, pairs)
        after = None
        if pairs_error is not None and log_in_error is not None:
            if x.rule.error_decay == "current":
                straddling = straddling + torch.matmul(upper, pairs_error)
                log_in_current = log_in + log_in_error
            else:  # the error at i sees decays up to i - 1 only
                straddling = straddling + torch.matmul(strict_upper, pairs_error)
                after = torch.matmul(strict_upper, log_in_error)
        dg = (strict_lower * straddling).sum(-1, keepdim=True)
        dg = dg + torch.matmul(upper, log_in_current) + torch.matmul(strict_lower, log_out) + log_through
        dg = made_nan(dg if after is None else dg + after, spoilt)
        dg = _from_chunks(dg, 1, T, x.g.dtype)[..., 0]

    def of_heads(grad: Tensor, raw: Tensor) -> Tensor:
        grad_BTHK = _from_chunks(made_nan(grad, spoilt), groups, T, x.state_dtype)
        if x.normalise_qk:
            grad_BTHK = _l2norm_backward(raw.to(x.state_dtype), grad_BTHK)
        return grad_BTHK.to(raw.dtype)

    return Gradients(
        q=of_heads(dq, x.q),
        k=of_heads(dk, x.k),
        v=_from_chunks(made_nan(dv, spoilt), 1, T, x.v.dtype),
        g=dg,
        beta=_from_chunks(made_nan(dbeta, spoilt), 1, T, x.beta.dtype)[..., 0],
    )
