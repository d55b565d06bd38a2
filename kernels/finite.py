"""What is not finite, and what it spoils, where torch's operations compute the delta rule (:mod:`.chunk_torch`)."""

from __future__ import annotations

import torch
from torch import Tensor


def not_finite(x: Tensor) -> Tensor:
    """Whether a row, along the last axis, holds what is not finite; ``[..., 1]``."""
    return ~x.abs().amax(-1, keepdim=True).isfinite()


def all_finite(*tensors: Tensor) -> bool:
    """Whether all is known to be finite: it is looked at where that does not wait for a device, by sums, which are
    quickly taken. (They may overflow: then it is not known.)"""
    return all(x.device.type == "cpu" and bool(x.sum().isfinite()) for x in tensors)


def is_lost(state: Tensor) -> Tensor:
    """Whether a state ``[..., K, V]`` is not finite, ``[..., 1, 1]``."""
    return not_finite(state.flatten(-2)).unsqueeze(-1)


def among(lost: Tensor, tokens: Tensor | None) -> Tensor:
    """Those tokens (all: None) whose state is lost."""
    return lost if tokens is None else lost & tokens


def in_documents(same: Tensor | None, tokens: Tensor) -> Tensor:
    """Whether any of these tokens, ``[..., C, 1]``, is in the document of each; ``same`` ``[..., C, C]`` says which
    are in one, None that all are."""
    if same is None:
        return tokens.any(-2, keepdim=True).expand_as(tokens)
    return torch.matmul(same.float(), tokens.float()) > 0


def any_of(*where: Tensor | None) -> Tensor | None:
    """Where any is true; None where there is none of them."""
    found = None
    for x in where:
        found = x if found is None else found if x is None else found | x
    return found


def made_nan(x: Tensor, where: Tensor | None) -> Tensor:
    return x if where is None else x.masked_fill(where, torch.nan)
