"""Matrix products that are summed over tiles of tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def add_product(total: Tensor, a_MN: Tensor, b_ND: Tensor) -> None:
    """``total += a @ b`` in place; ``total_MD`` is fp32 (fp64 for fp64), whatever the factors are.

    On a GPU with bf16 or fp16 factors the product is added as the matrix units have it, in fp32; elsewhere it is
    rounded to the factors' dtype first, as autograd rounds a weight's gradient.
    """
    if a_MN.is_cuda and a_MN.dtype in (torch.bfloat16, torch.float16):
        torch.addmm(total, a_MN, b_ND, out_dtype=torch.float32, out=total)
    else:
        total += a_MN @ b_ND


def product_dtype(x: Tensor) -> torch.dtype:
    """What the factors of a product of activations and weights are cast to: autocast's dtype, or x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
