"""What ``dnsp bench scan`` measures beside ours where there is a GPU for every rank and fla is installed: its context
parallelism, and its kernels behind an exchange of heads (DeepSpeed-Ulysses, Jacobs et al. 2023): all tokens of a share
of the heads."""

from __future__ import annotations

import functools
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


def peers(
    request: dict[str, Any], ranks: Ranks, inputs: dict[str, Tensor], do: Tensor
) -> tuple[dict[str, Step], dict[str, str]]:
    """Each as a step, forward and backward, on this rank's tokens, and why others are not among them.

    A step is made at its first call: what an fla has not, or not for a layout, fails there, where
    :meth:`~dnsp.bench.ranks.Ranks.willing` tells all ranks.
    """
    group, tokens, world = ranks.comm.group, request["tokens"], ranks.grid.world
    assert group is not None
    leaves = list(inputs.values())

    def made(make: Callable[[], Callable[..., Tensor]]) -> Step:
        op = functools.cache(make)
        return lambda: torch.autograd.grad(op()(*leaves), leaves, do)

    def op_of_fla() -> Callable[..., Any]:
        return import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule

    def context_parallel(kind: str) -> Callable[..., Tensor]:
        chunk_gated_delta_rule = op_of_fla()
        bounds = torch.tensor([0, tokens], dtype=torch.int32)
        context = import_module("fla.ops.cp").build_cp_context(
            bounds.to(ranks.device), group, cu_seqlens_cpu=bounds, layout=kind
        )
        return lambda *x: chunk_gated_delta_rule(*x, use_qk_l2norm_in_kernel=True, cp_context=context)[0]

    def ulysses() -> Callable[..., Tensor]:
        chunk_gated_delta_rule = op_of_fla()

        def op(*x: Tensor) -> Tensor:
            mine = (ByHeads.apply(y, ranks.comm, True) for y in x)
            o, _ = chunk_gated_delta_rule(*mine, use_qk_l2norm_in_kernel=True)
            return ByHeads.apply(o, ranks.comm, False)

        return op

    found = {NAMES[kind]: made(functools.partial(context_parallel, kind)) for kind in request["layouts"]}
    heads, value_heads = request["heads"], request["value_heads"]
    if heads % world or value_heads % world:
        words = f"{heads} heads and {value_heads} value heads do not divide over {world} ranks (--heads, --value-heads)"
        return found, {ULYSSES: words}
    return {**found, ULYSSES: made(ulysses)}, {}


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
