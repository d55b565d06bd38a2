"""Attention over ranks in bf16 is as near to fp64 as one process in bf16 is: outputs and every gradient."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dnsp.launch.mps import shared_gpu
from dnsp.parallel.attention import attention
from dnsp.parallel.grid import Grid, make_grid
from dnsp.parallel.layout import KINDS, Layout
from dnsp.parallel.plan import Plan, make_plan
from dnsp.watchdog import queues
from tests.ranks import run_ranks

MOST = 1.2  # times the error of one process
NAMES = ("output", "dq", "dk", "dv")
# tokens, query heads, key heads, width, transports of keys, backends
CPU = (1024, 4, 2, 16, ("ring",), ("flash_cpu", "plain"))
GPU = (4096, 4, 2, 128, ("peer", "ring", "gather"), ("cudnn", "flash", "flash_deterministic"))


def documents(tokens: int) -> dict[str, list[list[int]]]:
    """Two rows each: none that ends, long ones over several cuts, many short ones."""
    return {
        "one": [[0], [0]],
        "long": [[0, 100, 101, tokens * 5 // 8], [0, tokens // 2]],
        "short": [list(range(0, tokens, 37)), list(range(0, tokens, 150))],
    }


def differentiated(plan: Plan, given: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of a plan's part of q, k, v and the output's gradient."""
    *leaves, do = (plan.local(x).to(dtype) for x in given)
    for leaf in leaves:
        leaf.requires_grad_()
    o = attention(*leaves, plan=plan)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def dense(given: list[Tensor], starts: list[list[int]]) -> list[Tensor]:
    """The same in fp64 by one softmax a row, with a mask."""
    q, k, v, do = (x.double() for x in given)
    for leaf in (q, k, v):
        leaf.requires_grad_()
    B, T, H, D = q.shape
    begins = torch.zeros(B, T, dtype=torch.long, device=q.device)
    for row, own in enumerate(starts):
        begins[row, own] = torch.tensor(own, device=q.device)
    document = begins.cummax(1).values
    outputs = []
    for row in range(B):  # a head at a time: scores are [T, T]
        seen = (document[row, :, None] == document[row]) & torch.ones(T, T, device=q.device).tril().bool()
        heads = []
        for head in range(H):
            group = head // (H // k.shape[2])
            scores = (q[row, :, head] @ k[row, :, group].T * D**-0.5).masked_fill(~seen, float("-inf"))
            heads.append(scores.softmax(-1) @ v[row, :, group])
        outputs.append(torch.stack(heads, 1))
    o = torch.stack(outputs)
    return [o.detach(), *torch.autograd.grad(o, (q, k, v), do)]


def squares(device: str, problem: tuple[Any, ...]) -> dict[str, list[tuple[float, float]]]:
    """For each case and tensor: the squared error of this rank's part, and that of one process on the same part."""
    if device == "cuda":
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", str(queues(int(os.environ["WORLD_SIZE"]))))
        torch.cuda.set_device(int(os.environ["RANK"]) % torch.cuda.device_count())
    grid = make_grid(timeout=60)
    tokens, heads, groups, width, transports, backends = problem
    draw = torch.Generator().manual_seed(0)
    counts = (heads, groups, groups, heads)
    given = [torch.randn(2, tokens, n, width, generator=draw).to(device, torch.bfloat16) for n in counts]
    found = {}
    for name, starts in documents(tokens).items():
        truth = dense(given, starts)
        for backend in backends:
            one = make_plan(
                starts, Layout("contiguous", 1, tokens), Grid(1, 0, 1), attention_backend=backend
            ).to(device)  # fmt: skip
            alone = differentiated(one, given, torch.bfloat16)
            for kind, keys in itertools.product(KINDS, transports):
                layout = Layout(kind, grid.world, tokens)
                plan = make_plan(
                    starts, layout, grid, attention_transport=keys, attention_backend=backend
                ).to(device)  # fmt: skip
                mine = differentiated(plan, given, torch.bfloat16)
                found[f"{name}, {kind}, {keys}, {backend}"] = [
                    tuple(float((x.double() - plan.local(want)).square().sum()) for x in (got, plan.local(whole)))
                    for got, whole, want in zip(mine, alone, truth, strict=True)
                ]
    return found


@functools.cache
def ratios(device: str, size: int) -> dict[str, dict[str, float]]:
    """Of the whole sequence's error: the ranks' over one process's, by case and tensor."""
    by_rank = run_ranks(squares, size, device, CPU if device == "cpu" else GPU, timeout=110 if device == "cpu" else 400)
    found = {}
    for case in by_rank[0]:
        sums = torch.tensor([rank[case] for rank in by_rank]).sum(0)
        found[case] = dict(zip(NAMES, (sums[:, 0] / sums[:, 1]).sqrt().tolist(), strict=True))
    return found


def check(device: str, size: int) -> None:
    for case, by_tensor in ratios(device, size).items():
        assert max(by_tensor.values()) <= MOST, (case, by_tensor)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_on_a_cpu(size: int) -> None:
    check("cpu", size)


@pytest.fixture(scope="module")
def together() -> Iterator[None]:
    with shared_gpu() as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


@pytest.mark.gpu
@pytest.mark.timeout(500)
@pytest.mark.usefixtures("together")
@pytest.mark.parametrize("size", [2, 4])
def test_on_a_gpu(size: int) -> None:
    check("cuda", size)
