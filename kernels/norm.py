"""Root-mean-square norms and the l2 norm of keys: statistics in fp32 (fp64 for fp64), the result in the input's dtype.

Where a choice of rounding is open, it is that of transformers' Qwen3.5, so that checkpoints give the same numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-6, zero_centred: bool = False) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis (Zhang and Sennrich, arXiv:1910.07467).

    x ``[..., D]``, weight ``[D]`` or None for none. With ``zero_centred`` the factor is ``1 + weight``, so that weight
    decay pulls it to one. The product is rounded once, after the weight.
    """
    _check_weight(x, weight)
    y = _normalised(x, eps)
    if weight is not None:
        scale = weight.to(y.dtype)
        y = y * (1 + scale if zero_centred else scale)
    return y.to(x.dtype)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """``rms_norm(x) * weight * silu(gate)``: the output norm of a gated delta layer (arXiv:2412.06464).

    x and gate ``[..., D]``, weight ``[D]``. The norm is rounded to x's dtype before the weight, the gate taken in fp32.
    """
    _check_weight(x, weight)
    if gate.shape != x.shape:
        raise ValueError(f"gate {list(gate.shape)} must have x's shape {list(x.shape)}: one gate a channel")
    y = weight * _normalised(x, eps).to(x.dtype)
    return (y * F.silu(_accumulator(gate))).to(x.dtype)


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """``x / sqrt(sum(x^2) + eps)`` over the last axis; flash-linear-attention's form, eps inside the root."""
    y = _accumulator(x)
    return (y * torch.rsqrt((y * y).sum(-1, keepdim=True) + eps)).to(x.dtype)


def _accumulator(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normalised(x: Tensor, eps: float) -> Tensor:
    y = _accumulator(x)
    return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)


def _check_weight(x: Tensor, weight: Tensor | None) -> None:
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weight {list(weight.shape)} must be one number a channel, [{x.shape[-1]}]")
