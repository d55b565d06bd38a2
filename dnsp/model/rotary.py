"""Rotary position embedding (Su et al., arXiv:2104.09864) by the position in the document."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dnsp.model import liger

Rotary = tuple[Tensor, Tensor]  # cosine and sine, [..., rotary_dim // 2]


def rotary_angles(position: Tensor, theta: float, width: int, dtype: torch.dtype) -> Rotary:
    """Cosine and sine of ``position * theta^(-2i/width)``, each ``[*position.shape, width // 2]``.

    The angle is made and reduced to one turn in fp64: at a million tokens an fp32 angle is off by 0.06.
    """
    exponent = torch.arange(0, width, 2, dtype=torch.float64, device=position.device) / width
    angle = (position.double().unsqueeze(-1) * theta**-exponent).remainder(2 * math.pi)
    angle = angle.to(torch.promote_types(dtype, torch.float32))
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotates the first ``width`` channels of every head of ``x [..., H, K]``, channel i with i + width/2."""
    cos, sin = (part.unsqueeze(-2) for part in rotary)  # the same for every head
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


def rotate_both(q: Tensor, k: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """:func:`rotate` of queries ``[B, T, H, K]`` and keys ``[B, T, G, K]``, or those of one token a row, which are not
    needed afterwards: on a GPU they are rotated where they lie."""
    if not rotary[0].shape[-1] or not liger.takes(q):
        return rotate(q, rotary), rotate(k, rotary)
    if q.dim() == 3:
        q, k = liger.rotate(*(x.unsqueeze(1) for x in (q, k, *rotary)))
        return q.squeeze(1), k.squeeze(1)
    return liger.rotate(q, k, *rotary)
