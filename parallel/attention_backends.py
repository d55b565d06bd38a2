"""One block of softmax attention, forward and backward. A backend is two functions:

    forward(q, k, v, causal, scale) -> (o, lse)
    backward(do, q, k, v, o, lse, causal, scale) -> (dq, dk, dv)

``q_BHSD``, ``k_BGUD``, ``v_BGUD`` with H a multiple of G (query head h reads key head h // (H // G)); causal blocks are
squares on the diagonal. ``lse_BHS`` is the log of the sum of exponentials, fp32 (fp64 for fp64). The backward is given
the *merged* output and lse of all blocks of a query; its dq, dk, dv are then the block's share of the whole gradient
(Dao 2023, FlashAttention-2, section 3.1: P = exp(S - lse), delta = rowsum(dO * O)).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 512  # queries that the plain backend works on at a time


@dataclass(frozen=True)
class Backend:
    name: str
    forward: Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor, Tensor]]


def choose(q_BHSD: Tensor, v_BGUD: Tensor) -> Backend:
    """torch's flash attention on the CPU; the plain backend elsewhere, and where V is not as wide as K."""
    return FLASH_CPU if q_BHSD.device.type == "cpu" and q_BHSD.shape[-1] == v_BGUD.shape[-1] else PLAIN


def _flash_cpu_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _flash_cpu_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do, q, k, v, o, lse, 0.0, causal, scale=scale
    )


def _scores(q: Tensor, k: Tensor, first: int, causal: bool, scale: float) -> Tensor:
    """``[B, G, H/G, S, U]`` for the queries from ``first`` on."""
    scores = torch.einsum("bgrsd,bgud->bgrsu", q, k) * scale
    if causal:
        seen = torch.arange(first, first + q.shape[3], device=q.device)[:, None] >= torch.arange(
            k.shape[2], device=q.device
        )
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores


def _tiles(length: int) -> list[slice]:
    return [slice(at, min(at + TILE, length)) for at in range(0, length, TILE)]


def _grouped(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """``[B, H, S, D]`` -> ``[B, G, H/G, S, D]``."""
    return x.unflatten(1, (groups, -1)).to(dtype)


def _plain_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups, keys, values = k.shape[1], k.to(dtype), v.to(dtype)
    outputs, sums = [], []
    for tile in _tiles(q.shape[2]):
        scores = _scores(_grouped(q[:, :, tile], groups, dtype), keys, tile.start, causal, scale)
        lse = scores.logsumexp(-1)
        outputs.append(torch.einsum("bgrsu,bgud->bgrsd", torch.exp(scores - lse[..., None]), values).flatten(1, 2))
        sums.append(lse.flatten(1, 2))
    return torch.cat(outputs, 2).to(q.dtype), torch.cat(sums, 2)


def _plain_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups, keys, values = k.shape[1], k.to(dtype), v.to(dtype)
    dq, dk, dv = [], torch.zeros_like(keys), torch.zeros_like(values)
    for tile in _tiles(q.shape[2]):
        queries, grad, out = (_grouped(x[:, :, tile], groups, dtype) for x in (q, do, o))
        weights = _scores(queries, keys, tile.start, causal, scale)
        weights = torch.exp(weights - _grouped(lse[:, :, tile, None], groups, dtype))
        dv += torch.einsum("bgrsu,bgrsd->bgud", weights, grad)
        delta = (grad * out).sum(-1, keepdim=True)
        dscores = weights * (torch.einsum("bgrsd,bgud->bgrsu", grad, values) - delta) * scale
        dq.append(torch.einsum("bgrsu,bgud->bgrsd", dscores, keys).flatten(1, 2))
        dk += torch.einsum("bgrsu,bgrsd->bgud", dscores, queries)
    return torch.cat(dq, 2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


FLASH_CPU = Backend("flash_cpu", _flash_cpu_forward, _flash_cpu_backward)
PLAIN = Backend("plain", _plain_forward, _plain_backward)
