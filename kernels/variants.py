"""The delta rule's relatives as arguments of the one recurrence: which rule, which decay, which write strength.

| variant                                     | rule             | g                     | beta              |
|---------------------------------------------|------------------|-----------------------|-------------------|
| DeltaNet, ``S += beta k (v - S k)``         | DELTA            | None                  | learned_beta      |
| Gated DeltaNet                              | DELTA            | softplus_decay        | learned_beta      |
| forget gate, ``S = f S + beta k (v - S k)`` | FORGET_GATE      | forget_gate           | learned_beta      |
| state times 0.9 every 1000 tokens           | any              | periodic_decay of any | any               |
| fixed write strength; a cap on it           | any              | any                   | fixed_beta; `cap` |
| linear attention, ``S += beta k v``         | LINEAR_ATTENTION | None                  | any               |

Normalised output, ``q S / (q D + eps)`` with ``D_t = D_{t-1} + k_t``: one more call of the rule with the arguments of
:func:`normaliser`, then :func:`normalise_output`.

Everything here is elementwise in the tokens and knows no layout. A decay for each key channel (Kimi Linear) is another
algebra and refused by the public operator.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import Rule

DELTA = Rule()
FORGET_GATE = Rule(error_decay="previous")
LINEAR_ATTENTION = Rule(erase=False)


def softplus_decay(a_BTH: Tensor, A_log_H: Tensor, dt_bias_H: Tensor) -> Tensor:
    """``g = -exp(A_log) softplus(a + dt_bias)``, Gated DeltaNet's (arXiv:2412.06464); a is ``[..., HV]``."""
    return -_gate(A_log_H).exp() * F.softplus(_gate(a_BTH) + _gate(dt_bias_H))


def forget_gate(logits_BTH: Tensor) -> Tensor:
    """``g = log sigmoid(logits)``, for the rule ``FORGET_GATE``; no precision is lost as the gate nears 1."""
    return F.logsigmoid(_gate(logits_BTH))


def periodic_decay(g_BTH: Tensor | None, position_BT: Tensor, heads: int, every: int, factor: float) -> Tensor:
    """``g`` with ``log(factor)`` more at every ``every``-th token of a document, before it is written.

    ``position_BT`` counts from the document's first token, so that packed documents stay independent of each other.
    The first token is left out: it has no state to shrink. ``g_BTH`` None is no other decay, for ``heads`` value heads
    and in fp32.
    """
    if every < 1 or not 0 < factor <= 1:
        raise ValueError(f"decay by {factor} every {every} tokens: give a factor in (0, 1], an interval from 1")
    due = (position_BT > 0) & (position_BT % every == 0)
    extra = (due.double() * math.log(factor)).unsqueeze(-1)
    if g_BTH is None:
        return extra.float().expand(*position_BT.shape, heads)
    return g_BTH + extra.to(g_BTH.dtype)


def learned_beta(logits_BTH: Tensor, cap: float = 1.0) -> Tensor:
    """``cap * sigmoid(logits)``. A token erases ``beta |k|^2`` of what its key holds; above 2, what is left grows."""
    _check_cap(cap)
    beta = torch.sigmoid(_gate(logits_BTH))
    return beta if cap == 1 else cap * beta


def fixed_beta(beta_H: Tensor, batch: int, tokens: int, cap: float | None = None) -> Tensor:
    """One write strength a head for every token, ``[B, T, HV]``; with a cap, never above it."""
    beta = _gate(beta_H)
    if cap is not None:
        _check_cap(cap)
        beta = beta.clamp(max=cap)
    return beta.expand(batch, tokens, beta.shape[0])


def normaliser(q_BTHK: Tensor) -> dict[str, Any]:
    """The arguments that, with the same q and k, make the delta rule return ``q D`` ``[B, T, H, 1]``.

    Each key is written once, with value 1, and nothing is erased: documents, layouts and the scan are the rule's own.
    """
    ones = torch.ones_like(q_BTHK[..., 0])
    return dict(v_BTHV=ones.unsqueeze(-1), g_BTH=None, beta_BTH=_gate(ones), scale=1.0, rule=LINEAR_ATTENTION)


def normalise_output(o_BTHV: Tensor, qD_BTH: Tensor, eps: float = 1e-6) -> Tensor:
    """``o / (qD + eps)`` in fp32. ``qD`` has one entry a key head; value heads sharing a key share its denominator.

    Nothing keeps ``qD`` from zero or from changing sign: outputs near such a token are as large as they come out.
    """
    value_heads, heads = o_BTHV.shape[-2], qD_BTH.shape[-1]
    if value_heads % heads:
        raise ValueError(f"{value_heads} value heads for {heads} denominators: make them a multiple of the key heads")
    denominator = (_gate(qD_BTH) + eps).repeat_interleave(value_heads // heads, dim=-1)
    return (o_BTHV / denominator.unsqueeze(-1)).to(o_BTHV.dtype)


def _gate(x: Tensor) -> Tensor:
    """Gates are fp32, fp64 for fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_cap(cap: float) -> None:
    if not cap > 0:
        raise ValueError(f"beta cap {cap}: a write strength of 0 or less writes nothing; give a cap above 0")
