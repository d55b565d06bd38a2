"""The gated delta rule, token by token: what every other form of it is compared with.

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   o_t = scale * S_t^T q_t,   alpha_t = exp(g_t)

(Yang, Kautz and Hatamizadeh, "Gated Delta Networks", 2024, equation 10, transposed: the state is [K, V].)
Plain torch operations under autograd, in fp64 unless told otherwise; slow on purpose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """Which member of the family.

    erase: subtract what the state already holds for the key (the delta rule); without it, linear attention.
    error_decay: the error is taken from the decayed state (``"current"``: ``v - alpha_t S^T k``, Gated DeltaNet) or
        from the state before this token's decay (``"previous"``: ``v - S^T k``, the forget-gate form).
    """

    erase: bool = True
    error_decay: Literal["current", "previous"] = "current"


def step(
    q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, alpha_BH: Tensor, beta_BH: Tensor, state_BHKV: Tensor, rule: Rule
) -> tuple[Tensor, Tensor]:
    """One token for every value head: ``(S^T q, S)`` after the update; q is already scaled."""
    decayed = alpha_BH[..., None, None] * state_BHKV
    error = v_BHV
    if rule.erase:
        seen = decayed if rule.error_decay == "current" else state_BHKV
        error = v_BHV - (k_BHK[..., None] * seen).sum(-2)
    state = decayed + k_BHK[..., None] * (beta_BH[..., None] * error)[..., None, :]
    return (q_BHK[..., None] * state).sum(-2), state


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """``x / sqrt(|x|^2 + eps)`` over the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def recurrence(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor | None,
    beta_BTH: Tensor,
    *,
    scale: float,
    doc_start_BT: Tensor | None = None,
    initial_state_BHKV: Tensor | None = None,
    rule: Rule = Rule(),  # noqa: B008 (frozen)
    normalise_qk: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """The rule of this module's head, over T tokens, differentiable by autograd.

    Args:
        q_BTHK, k_BTHK: queries and keys, ``[B, T, H, K]``.
        v_BTHV: values, ``[B, T, HV, V]``; HV is a multiple of H, value head ``h`` reads key head ``h // (HV // H)``.
        g_BTH: log decay ``<= 0``, ``[B, T, HV]``; None is no decay.
        beta_BTH: write strength, ``[B, T, HV]``.
        scale: factor of the queries.
        doc_start_BT: index of the first token of each token's document, ``[B, T]``; the state restarts from zero
            there. A first document with start -1 goes on from the initial state.
        initial_state_BHKV: ``[B, HV, K, V]``; None is zero.
        normalise_qk: l2-normalise q and k first.
        dtype: of the computation and of what is returned.

    Returns:
        outputs ``[B, T, HV, V]`` and the last state ``[B, HV, K, V]``.
    """
    B, T, H, K = k_BTHK.shape
    HV, V = v_BTHV.shape[2:]
    q, k, v, beta = (x.to(dtype) for x in (q_BTHK, k_BTHK, v_BTHV, beta_BTH))
    if normalise_qk:
        q, k = l2norm(q), l2norm(k)
    q = (q * scale).repeat_interleave(HV // H, dim=2)
    k = k.repeat_interleave(HV // H, dim=2)
    alpha = torch.ones_like(beta) if g_BTH is None else g_BTH.to(dtype).exp()
    state = v.new_zeros(B, HV, K, V) if initial_state_BHKV is None else initial_state_BHKV.to(dtype)
    outputs = []
    # Taken apart at once: the gradient of a slice would be as large as all tokens, for each of them.
    apart = zip(q.unbind(1), k.unbind(1), v.unbind(1), alpha.unbind(1), beta.unbind(1), strict=True)
    for t, (q_t, k_t, v_t, alpha_t, beta_t) in enumerate(apart):
        if doc_start_BT is not None:
            begins = (doc_start_BT[:, t] == t)[:, None, None, None]
            state = torch.where(begins, torch.zeros_like(state), state)
        o, state = step(q_t, k_t, v_t, alpha_t, beta_t, state, rule)
        outputs.append(o)
    o_BTHV = torch.stack(outputs, 1) if outputs else v.new_zeros(B, 0, HV, V)
    return o_BTHV, state
