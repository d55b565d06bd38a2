"""The loss: cross entropy in fp32, summed over this rank's targets, without ever holding all logits.

The vocabulary is the widest axis of a model: logits of 32,768 tokens by 248,320 words in fp32 are 30 GiB. So tokens go
through the output projection a chunk at a time, and each chunk's gradient is taken while its logits are at hand
(Hsu et al., Liger Kernel, arXiv:2410.10989). On a GPU the softmax of a chunk and its gradient are one kernel of theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dnsp.model import liger
from dnsp.products import add_product, product_dtype

IGNORE = -100  # the target of a token that predicts nothing: a document's last
CHUNK_LOGITS = 2**23  # logits that exist at once: 32 MiB in fp32
GPU_CHUNK_LOGITS = 2**27  # 256 MiB in bf16: the weight's gradient is read and written once a chunk


def cross_entropy_sum(
    hidden: Tensor, weight_VD: Tensor, targets: Tensor, chunk: int | None = None, asked_N: Tensor | None = None
) -> Tensor:
    """``sum_t -log softmax(W h_t)[target_t]`` over the targets that are not -100, a scalar, fp32 (fp64 for fp64).

    hidden ``[..., D]``, weight ``[V, D]``, targets ``[...]`` int64. ``chunk`` tokens at a time; None chooses from V.
    ``asked_N``: indices of all tokens with a target, where few have one: the others then cost nothing.
    Differentiable once, in hidden and weight. Under autocast the products run in its dtype, the softmax in fp32; the
    weight's gradient is summed in fp32, and rounded once, to the weight's dtype.
    """
    chunk = chunk or _chunk_tokens(weight_VD)
    flat_hidden, flat_targets = hidden.flatten(0, -2), targets.flatten()
    return _CrossEntropySum.apply(flat_hidden, weight_VD, flat_targets, asked_N, chunk, torch.is_grad_enabled())


@torch.no_grad()
def token_losses(hidden: Tensor, weight_VD: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    """Each token's own loss, in the shape of targets, 0 where the target is -100; without gradient."""
    h, w = _operands(hidden.flatten(0, -2), weight_VD)
    flat = targets.flatten()
    losses = h.new_zeros(flat.shape, dtype=torch.promote_types(h.dtype, torch.float32))
    with torch.autocast(h.device.type, enabled=False):
        for part in _parts(len(flat), chunk or _chunk_tokens(weight_VD)):
            if liger.takes(h):
                losses[part] = liger.cross_entropy(h[part] @ w.T, flat[part], IGNORE, with_grad=False)
                continue
            logits, at, kept = _logits(h[part], w, flat[part])
            losses[part] = torch.where(kept, logits.logsumexp(-1) - logits.gather(-1, at).squeeze(-1), 0)
    return losses.view(targets.shape)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        asked: Tensor | None,
        chunk: int,
        with_grad: bool,
    ) -> Tensor:
        need_h, need_w = (with_grad and needed for needed in ctx.needs_input_grad[:2])
        whole = hidden
        if asked is not None:
            hidden, targets = hidden[asked], targets[asked]
        h, w = _operands(hidden, weight)
        exact = torch.promote_types(h.dtype, torch.float32)
        dh = torch.empty_like(h) if need_h else None
        dw = torch.zeros_like(w, dtype=exact) if need_w else None
        total = torch.zeros((), dtype=torch.float64, device=h.device)  # a million terms lose digits in fp32
        with torch.autocast(h.device.type, enabled=False):
            for part in _parts(len(targets), chunk):
                losses, dlogits = _losses(h[part], w, targets[part], need_h or need_w)
                total += losses.sum(dtype=torch.float64)
                if dh is not None:
                    torch.mm(dlogits, w, out=dh[part])
                if dw is not None:
                    add_product(dw, dlogits.T, h[part])
        if asked is not None and dh is not None:
            dh = torch.zeros_like(whole, dtype=dh.dtype).index_copy_(0, asked, dh)
        ctx.save_for_backward(dh, dw)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total.to(exact)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dh, dw = ctx.saved_tensors
        return (
            None if dh is None else (dh * grad).to(ctx.dtypes[0]),
            None if dw is None else (dw * grad).to(ctx.dtypes[1]),
            *(None,) * 4,
        )


def _operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors in the dtype of the product."""
    dtype = product_dtype(hidden)
    return hidden.to(dtype), weight.to(dtype)


def _losses(h_ND: Tensor, w_VD: Tensor, targets_N: Tensor, with_grad: bool) -> tuple[Tensor, Tensor]:
    """Each token's loss, and the gradient of their sum with respect to the logits in the weight's dtype (where it is
    wanted: otherwise anything)."""
    if liger.takes(h_ND):
        logits = h_ND @ w_VD.T
        return liger.cross_entropy(logits, targets_N, IGNORE, with_grad), logits
    logits, at, kept = _logits(h_ND, w_VD, targets_N)
    norm = logits.logsumexp(-1, keepdim=True)
    losses = torch.where(kept, (norm - logits.gather(-1, at)).squeeze(-1), 0)
    if not with_grad:
        return losses, logits
    # d loss / d logits = softmax - one at the target
    dlogits = logits.sub_(norm).exp_().scatter_add_(-1, at, logits.new_full(at.shape, -1.0))
    return losses, torch.where(kept.unsqueeze(-1), dlogits, 0).to(w_VD.dtype)


def _logits(h_ND: Tensor, w_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in fp32, the index of each target (0 where there is none), and whether there is one."""
    kept = targets_N != IGNORE
    logits = h_ND @ w_VD.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits, torch.where(kept, targets_N, 0).unsqueeze(-1), kept


def _chunk_tokens(weight_VD: Tensor) -> int:
    if weight_VD.is_cuda:
        return max(128, GPU_CHUNK_LOGITS // len(weight_VD) // 128 * 128)
    return max(16, CHUNK_LOGITS // len(weight_VD))


def _parts(tokens: int, chunk: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk))
