"""What ``dnsp bench scan`` measures beside ours where there is a GPU for every rank and fla is installed: its context
parallelism, and its kernels behind an exchange of heads (DeepSpeed-Ulysses, Jacobs et al. 2023): all tokens of a share
of the heads."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from dnsp.bench.ranks import Ranks
from dnsp.parallel.transport import Transport

Step = Callable[[], object]
NAMES = {"contiguous": "fla's context parallelism", "zigzag": "fla's context parallelism, zigzag"}
ULYSSES = "head all-to-all, fla's kernels"


def missing(ranks: Ranks) -> str | None:
    """Why fla is not measured, in words; None where it is."""
    if ranks.device.type == "cpu" or ranks.sharing > 1:
        return "it needs a GPU for every rank (NCCL refuses two on one)"
    return None if find_spec("fla") else "flash-linear-attention is not installed"


def peers(request: dict[str, Any], ranks: Ranks, inputs: dict[str, Tensor], do: Tensor) -> dict[str, Step]:
    """Each as a step, forward and backward, on this rank's tokens."""
    chunk_gated_delta_rule = import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    group, tokens, world = ranks.comm.group, request["tokens"], ranks.grid.world
    assert group is not None
    leaves = list(inputs.values())

    def differentiated(op: Callable[..., Tensor]) -> Step:
        return lambda: torch.autograd.grad(op(*leaves), leaves, do)

    found: dict[str, Step] = {}
    try:
        build_cp_context = import_module("fla.ops.cp").build_cp_context
        bounds = torch.tensor([0, tokens], dtype=torch.int32)
        for kind in request["layouts"]:
            context = build_cp_context(bounds.to(ranks.device), group, cu_seqlens_cpu=bounds, layout=kind)
            found[NAMES[kind]] = differentiated(
                lambda q, k, v, g, beta, context=context: chunk_gated_delta_rule(
                    q, k, v, g, beta, use_qk_l2norm_in_kernel=True, cp_context=context
                )[0]
            )
    except (ImportError, AttributeError, TypeError):  # an fla without it, or without this layout
        pass
    if request["heads"] % world == 0 and request["value_heads"] % world == 0:

        def ulysses(*x: Tensor) -> Tensor:
            mine = (ByHeads.apply(y, ranks.comm, True) for y in x)
            o, _ = chunk_gated_delta_rule(*mine, use_qk_l2norm_in_kernel=True)
            return ByHeads.apply(o, ranks.comm, False)

        found[ULYSSES] = differentiated(ulysses)
    return found


class ByHeads(torch.autograd.Function):
    """``[1, T/P, H, ...]`` to ``[1, T, H/P, ...]`` over a group of P (``split``), or back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Transport, split: bool) -> Tensor:
        ctx.comm, ctx.split = comm, split
        return _exchange(x, comm, split)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        return _exchange(dx, ctx.comm, not ctx.split), None, None


def _exchange(x: Tensor, comm: Transport, split: bool) -> Tensor:
    P = comm.size
    _, T, H, *rest = x.shape
    if split:
        leaving = x.view(T, P, H // P, *rest).transpose(0, 1).contiguous()
    else:
        leaving = x.contiguous().view(P, T // P, H, *rest)
    arriving = comm.all_to_all(leaving, "the exchange of heads")
    if split:
        return arriving.view(1, P * T, H // P, *rest)
    return arriving.transpose(0, 1).reshape(1, T // P, P * H, *rest)
