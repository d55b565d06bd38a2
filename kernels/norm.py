"""Root-mean-square norms and the l2 norm of keys: statistics in fp32 (fp64 for fp64), the result in the input's dtype.

Where a choice of rounding is open, it is that of transformers' Qwen3.5, so that checkpoints give the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import operators
from .backend import Backend, choose_fitting
from .checks import check_floating


def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-6, zero_centred: bool = False) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis (Zhang and Sennrich, arXiv:1910.07467).

    x ``[..., D]``, weight ``[D]`` or None for none. With ``zero_centred`` the factor is ``1 + weight``, so that weight
    decay pulls it to one. The product is rounded once, after the weight. Raises ValueError or TypeError for what does
    not fit.
    """
    check_floating({"x": x}, {"weight": weight})
    _check_weight(x, weight)
    y = _normalised(x, eps)
    if weight is not None:
        scale = weight.to(y.dtype)
        y = y * (1 + scale if zero_centred else scale)
    return y.to(x.dtype)


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float = 1e-6, *, backend: Backend | None = None
) -> Tensor:
    """``rms_norm(x) * weight * silu(gate)``: the output norm of a gated delta layer (arXiv:2412.06464).

    x and gate ``[..., D]``, weight ``[D]``. The norm is rounded to x's dtype before the weight, the gate taken in fp32.
    ``backend``: ``"torch"`` operations, or Triton's kernels, ``"triton"``, one launch each way, which read x and gate
    where they lie, any strides but channels one after another. None: on a GPU Triton for bf16, fp16 and fp32 with D up
    to 8192, torch for what has no kernel, and torch elsewhere, or everywhere where the environment's DNSP_DELTA_RULE is
    ``torch``. Raises ValueError or TypeError for what does not fit.
    """
    check_floating({"x": x, "gate": gate, "weight": weight}, {})
    _check_weight(x, weight)
    if gate.device != x.device:
        raise ValueError(f"gate is on {gate.device}, x on {x.device}: move all inputs to one device")
    if gate.shape != x.shape:
        raise ValueError(f"gate {list(gate.shape)} must have x's shape {list(x.shape)}: one gate a channel")
    if _backend(backend, x, gate, weight) == "triton":
        return _GatedRMSNorm.apply(x, gate, weight, eps)
    y = weight * _normalised(x, eps).to(x.dtype)
    return (y * F.silu(_accumulator(gate))).to(x.dtype)


def _backend(asked: str | None, x: Tensor, gate: Tensor, weight: Tensor) -> Backend:
    """What was asked for, or what fits; refuses what has no kernel."""
    if choose_fitting(asked, x) == "torch":
        return "torch"
    from . import triton_norm

    if asked is None and not triton_norm.takes(x, gate, weight):
        return "torch"
    triton_norm.refuse(x, gate, weight)
    return "triton" if x.numel() else "torch"  # nothing to launch


class _GatedRMSNorm(torch.autograd.Function):
    """Keeps its inputs alone: what backward needs of the norm is made again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, gate, weight)
        ctx.eps = eps
        return operators.gated_norm(x, gate, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight = ctx.saved_tensors
        return *operators.gated_norm_backward(dy, x, gate, weight, ctx.eps), None


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """``x / sqrt(sum(x^2) + eps)`` over the last axis of ``[..., D]``; flash-linear-attention's form, eps inside the
    root. Raises TypeError for what is no tensor of real numbers."""
    check_floating({"x": x}, {})
    y = _accumulator(x)
    return (y * torch.rsqrt((y * y).sum(-1, keepdim=True) + eps)).to(x.dtype)


def _accumulator(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normalised(x: Tensor, eps: float) -> Tensor:
    y = _accumulator(x)
    return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)


def _check_weight(x: Tensor, weight: Tensor | None) -> None:
    if not x.dim():
        raise ValueError("x[]: expected [..., D], with an axis of channels")
    if weight is not None and weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}, x on {x.device}: move all inputs to one device")
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weight {list(weight.shape)} must be one number a channel, [{x.shape[-1]}]")
