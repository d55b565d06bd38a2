"""One token at a time: the recurrent form of the layer's three memories, each updated in place.

What a step costs does not grow with the tokens before it. No step is differentiable; the chunked forms are.
Rows are independent: a batch of sequences at different positions takes one call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .conv import Activation, convolve, silu
from .norm import l2norm as normalise
from .reference import Rule


@torch.no_grad()
def conv_step(
    x_BD: Tensor, tail_BWD: Tensor, weight_DW: Tensor, bias_D: Tensor | None = None, activation: Activation = "silu"
) -> Tensor:
    """One token of :func:`~dnsp.kernels.conv.causal_conv1d`, with its bits: returns ``y_BD``.

    ``tail_BWD`` ``[B, W-1, D]`` holds the W-1 tokens before this one, zeros where a document begins; moves on in place.
    """
    wanted = (x_BD.shape[0], weight_DW.shape[1] - 1, x_BD.shape[1])
    if tail_BWD.shape != wanted:
        raise ValueError(f"tail {list(tail_BWD.shape)} must hold the W-1 tokens before x, {list(wanted)}")
    window = torch.cat([tail_BWD.to(x_BD.dtype), x_BD[:, None]], dim=1)
    tail_BWD.copy_(window[:, 1:])
    z = convolve(window.to(torch.promote_types(x_BD.dtype, torch.float32)), weight_DW, bias_D)[:, 0]
    return (silu(z) if activation == "silu" else z).to(x_BD.dtype)


@torch.no_grad()
def delta_step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    g_BH: Tensor | None,
    beta_BH: Tensor,
    state_BHKV: Tensor,
    *,
    scale: float | None = None,
    rule: Rule = Rule(),  # noqa: B008 (frozen)
    l2norm: bool = False,
) -> Tensor:
    """One token of the delta rule (Yang et al., arXiv:2412.06464, equation 10): returns ``o_BHV`` in v's dtype.

    Args:
        q_BHK, k_BHK: ``[B, H, K]``. v_BHV: ``[B, HV, V]``, HV a multiple of H.
        g_BH: log decay, ``[B, HV]``, or None for none. beta_BH: write strength, ``[B, HV]``.
        state_BHKV: ``[B, HV, K, V]``, updated in place; its dtype (fp32 or fp64) is the one computed in.
        scale: of the queries; None is ``K ** -0.5``.
        rule: erase or not, and which decay the error sees.
        l2norm: normalise q and k first.
    """
    batch, heads, width = q_BHK.shape
    value_heads, value_width = v_BHV.shape[1:]
    if value_heads % heads:
        raise ValueError(f"{value_heads} value heads for {heads} key heads: make them a multiple of the key heads")
    if state_BHKV.shape != (batch, value_heads, width, value_width):
        wanted = [batch, value_heads, width, value_width]
        raise ValueError(f"state {list(state_BHKV.shape)} must be [B, HV, K, V] = {wanted}")
    dtype = state_BHKV.dtype
    q, k, v, beta = (x.to(dtype) for x in (q_BHK, k_BHK, v_BHV, beta_BH))
    if l2norm:
        q, k = normalise(q), normalise(k)
    q = q * (width**-0.5 if scale is None else scale)
    q, k = (x.repeat_interleave(value_heads // heads, dim=1) for x in (q, k))

    decay = None if g_BH is None else g_BH.to(dtype).exp()[..., None, None]
    if decay is not None and rule.error_decay == "current":
        state_BHKV.mul_(decay)
    error = v - (k.unsqueeze(-1) * state_BHKV).sum(-2) if rule.erase else v  # autocast leaves sums alone
    if decay is not None and rule.error_decay == "previous":
        state_BHKV.mul_(decay)
    state_BHKV += k.unsqueeze(-1) * (beta.unsqueeze(-1) * error).unsqueeze(-2)
    return (q.unsqueeze(-1) * state_BHKV).sum(-2).to(v_BHV.dtype)


@torch.no_grad()
def normaliser_step(q_BHK: Tensor, k_BHK: Tensor, key_sum_BHK: Tensor) -> Tensor:
    """One token of the denominator, ``D_t = D_{t-1} + k_t``: adds k to ``key_sum_BHK`` in place, returns ``qD_BH``."""
    key_sum_BHK += k_BHK.to(key_sum_BHK.dtype)
    return (q_BHK.to(key_sum_BHK.dtype) * key_sum_BHK).sum(-1)
