"""The loss: cross entropy in fp32, summed over this rank's targets, without ever holding all logits.

The vocabulary is the widest axis of a model: logits of 32,768 tokens by 248,320 words in fp32 are 30 GiB. So tokens go
through the output projection a chunk at a time, and each chunk's gradient is taken while its logits are at hand
(Hsu et al., Liger Kernel, arXiv:2410.10989).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100  # the target of a token that predicts nothing: a document's last
CHUNK_LOGITS = 2**23  # logits that exist at once: 32 MiB in fp32


def cross_entropy_sum(hidden: Tensor, weight_VD: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    """``sum_t -log softmax(W h_t)[target_t]`` over the targets that are not -100, a scalar, fp32 (fp64 for fp64).

    hidden ``[..., D]``, weight ``[V, D]``, targets ``[...]`` int64. ``chunk`` tokens at a time; None chooses from V.
    Differentiable once, in hidden and weight. Under autocast the products run in its dtype, the softmax in fp32.
    """
    h, w = _operands(hidden, weight_VD)
    chunk = chunk or _chunk_tokens(weight_VD)
    return _CrossEntropySum.apply(h, w, targets.flatten(), chunk, torch.is_grad_enabled())


@torch.no_grad()
def token_losses(hidden: Tensor, weight_VD: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    """Each token's own loss, in the shape of targets, 0 where the target is -100; without gradient."""
    h, w = _operands(hidden, weight_VD)
    flat = targets.flatten()
    losses = h.new_zeros(flat.shape, dtype=torch.promote_types(h.dtype, torch.float32))
    with torch.autocast(h.device.type, enabled=False):
        for part in _parts(len(flat), chunk or _chunk_tokens(weight_VD)):
            logits, at, kept = _logits(h[part], w, flat[part])
            losses[part] = torch.where(kept, logits.logsumexp(-1) - logits.gather(-1, at).squeeze(-1), 0)
    return losses.view(targets.shape)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor, targets: Tensor, chunk: int, with_grad: bool) -> Tensor:
        need_h, need_w = (with_grad and needed for needed in ctx.needs_input_grad[:2])
        exact = torch.promote_types(h.dtype, torch.float32)
        dh = torch.empty_like(h) if need_h else None
        dw = torch.zeros_like(w, dtype=exact) if need_w else None
        total = torch.zeros((), dtype=torch.float64, device=h.device)  # a million terms lose digits in fp32
        with torch.autocast(h.device.type, enabled=False):
            for part in _parts(len(targets), chunk):
                logits, at, kept = _logits(h[part], w, targets[part])
                norm = logits.logsumexp(-1, keepdim=True)
                total += torch.where(kept, (norm - logits.gather(-1, at)).squeeze(-1), 0).sum(dtype=torch.float64)
                if dh is None and dw is None:
                    continue
                # d loss / d logits = softmax - one at the target
                dlogits = logits.sub_(norm).exp_().scatter_add_(-1, at, logits.new_full(at.shape, -1.0))
                dlogits = torch.where(kept.unsqueeze(-1), dlogits, 0).to(w.dtype)
                if dh is not None:
                    dh[part] = dlogits @ w
                if dw is not None:
                    dw += dlogits.T @ h[part]
        ctx.save_for_backward(dh, dw)
        ctx.weight_dtype = w.dtype
        return total.to(exact)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dh, dw = ctx.saved_tensors
        return (
            None if dh is None else (dh * grad).to(dh.dtype),
            None if dw is None else (dw * grad).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def _operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens as rows, and both factors in the dtype of the product."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return hidden.flatten(0, -2).to(dtype), weight.to(dtype)


def _logits(h_ND: Tensor, w_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in fp32, the index of each target (0 where there is none), and whether there is one."""
    kept = targets_N != IGNORE
    logits = h_ND @ w_VD.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits, torch.where(kept, targets_N, 0).unsqueeze(-1), kept


def _chunk_tokens(weight_VD: Tensor) -> int:
    return max(16, CHUNK_LOGITS // len(weight_VD))


def _parts(tokens: int, chunk: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk))
