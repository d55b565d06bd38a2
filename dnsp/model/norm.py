"""Norms with parameters named and centred as checkpoints have them; the arithmetic is ``dnsp.kernels.norm``'s, on a GPU
liger-kernel's where it is the same."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dnsp.kernels.norm import gated_rms_norm, rms_norm
from dnsp.model import liger


def at_least_fp32(x: Tensor) -> Tensor:
    """Gates, angles and sums are fp32 whatever the weights are; fp64 stays fp64, so that tests can use it."""
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    """Root mean square norm over the last axis, its gain stored as ``1 + weight`` when zero-centred."""

    def __init__(self, width: int, eps: float, zero_centred: bool = True) -> None:
        super().__init__()
        self.eps, self.zero_centred = eps, zero_centred
        self.weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.zero_centred else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        if liger.takes(x):
            return liger.rms_norm(x, self.weight, self.eps, self.zero_centred)
        return rms_norm(x, self.weight, self.eps, self.zero_centred)


class GatedRMSNorm(nn.Module):
    """RMS norm of a delta-rule head's output, times ``silu(gate)`` (arXiv:2412.06464, figure 1)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return gated_rms_norm(x, gate, self.weight, self.eps)
