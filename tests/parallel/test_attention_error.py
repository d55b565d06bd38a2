"""Attention over ranks in bf16 is as near to fp64 as one process in bf16 is: outputs and every gradient. And over
random documents in fp64 it is fp64's; and what repeats its bits does so over ranks."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from dnsp.launch.mps import shared_gpu
from dnsp.parallel import blocks
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
LONG = {"cpu": 32, "cuda": 512}  # tokens of a document's part that has a call of its own in cases "apart": a multiple


def documents(tokens: int) -> dict[str, list[list[int]]]:
    """Two rows each: none that ends, long ones over several cuts, many short ones, and those whose long parts are calls
    of their own: two in a row, and some among short ones."""
    part = tokens // 8
    return {
        "one": [[0], [0]],
        "long": [[0, 100, 101, tokens * 5 // 8], [0, tokens // 2]],
        "short": [list(range(0, tokens, 37)), list(range(0, tokens, 150))],
        "apart": [[0, tokens // 2], [0, part, part + 3, part + 10, 2 * part, 6 * part - 5, 6 * part]],
    }


def apart(device: str) -> Any:
    """Inside, calls that are worked out are of their own from so many tokens on."""
    return patch.multiple(blocks, LONG=LONG[device], APART=LONG[device], CUDNN_TOKENS=LONG[device])


def worked_out(plan: Plan, device: str, name: str) -> Plan:
    """Its calls are worked out here, and kept."""
    with apart(device) if name == "apart" else contextlib.nullcontext():
        assert all(len(work.calls) <= len(work.blocks) for work in plan.rounds)
    return plan.to(device)


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


def joined(device: str) -> Grid:
    if device == "cuda":
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", str(queues(int(os.environ["WORLD_SIZE"]))))
        torch.cuda.set_device(int(os.environ["RANK"]) % torch.cuda.device_count())
    return make_grid(timeout=60)


def drawn(problem: tuple[Any, ...], device: str) -> list[Tensor]:
    """q, k, v and the output's gradient, two rows."""
    tokens, heads, groups, width, *_ = problem
    draw = torch.Generator().manual_seed(0)
    counts = (heads, groups, groups, heads)
    return [torch.randn(2, tokens, n, width, generator=draw).to(device, torch.bfloat16) for n in counts]


def squares(device: str, problem: tuple[Any, ...]) -> dict[str, list[tuple[float, float]]]:
    """For each case and tensor: the squared error of this rank's part, and that of one process on the same part."""
    grid, given = joined(device), drawn(problem, device)
    tokens, *_, transports, backends = problem
    found = {}
    for name, starts in documents(tokens).items():
        truth = dense(given, starts)
        for backend in backends:
            one = make_plan(starts, Layout("contiguous", 1, tokens), Grid(1, 0, 1), attention_backend=backend)
            alone = differentiated(one.to(device), given, torch.bfloat16)
            for kind, keys in itertools.product(KINDS, transports):
                layout = Layout(kind, grid.world, tokens)
                plan = make_plan(starts, layout, grid, attention_transport=keys, attention_backend=backend)
                mine = differentiated(worked_out(plan, device, name), given, torch.bfloat16)
                found[f"{name}, {kind}, {keys}, {backend}"] = [
                    tuple(float((x.double() - plan.local(want)).square().sum()) for x in (got, plan.local(whole)))
                    for got, whole, want in zip(mine, alone, truth, strict=True)
                ]
    return found


def repeated(device: str, problem: tuple[Any, ...]) -> dict[str, bool]:
    """Whether a backend has the same bits twice, outputs and gradients, in each case."""
    grid, given = joined(device), drawn(problem, device)
    tokens, *_, transports, backends = problem
    found = {}
    for (name, starts), backend in itertools.product(documents(tokens).items(), backends):
        for kind, keys in itertools.product(KINDS, transports):
            layout = Layout(kind, grid.world, tokens)
            plan = make_plan(starts, layout, grid, attention_transport=keys, attention_backend=backend)
            plan = worked_out(plan, device, name)
            first, second = (differentiated(plan, given, torch.bfloat16) for _ in range(2))
            same = [torch.equal(a, b) for a, b in zip(first, second, strict=True)]
            found[f"{name}, {kind}, {keys}, {backend}"] = all(same)
    return found


def random_errors(count: int) -> dict[str, list[float]]:
    """In fp64, of random rows, documents and layouts, long parts calls of their own or not: how far this rank's part is
    from one softmax a row."""
    grid, found = make_grid(timeout=60), {}
    tokens = 64 * 2 * grid.world
    for seed in range(count):
        pick, draw = random.Random(seed), torch.Generator().manual_seed(seed)
        rows, step, most = pick.choice((1, 2, 3)), pick.choice((1, 16, 64)), pick.choice((1, 4, 30))
        starts = [sorted({0, *(step * pick.randrange(tokens // step) for _ in range(most))}) for _ in range(rows)]
        long, taken, most = pick.choice((16, 48, 64, 2048)), pick.choice((1, 16)), pick.choice((100, 2**16))
        kind, keys, backend = pick.choice(KINDS), pick.choice(("ring", "gather")), pick.choice(("flash_cpu", "plain"))
        given = [torch.randn(rows, tokens, n, 8, generator=draw, dtype=torch.float64) for n in (4, 2, 2, 4)]
        layout = Layout(kind, grid.world, tokens)
        plan = make_plan(starts, layout, grid, attention_transport=keys, attention_backend=backend)
        with patch.multiple(blocks, LONG=long, APART=long, CUDNN_TOKENS=taken, JOINED=most):
            mine = differentiated(plan, given, torch.float64)
        found[f"{seed} {kind} {keys} {backend} {long} {taken} {starts}"] = [
            float((got - plan.local(want)).norm() / want.norm())
            for got, want in zip(mine, dense(given, starts), strict=True)
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


@pytest.mark.parametrize(
    ("size", "count"), [(1, 20), (2, 12), (4, 6), *(pytest.param(n, 60, marks=pytest.mark.slow) for n in (2, 3, 4))]
)
def test_random_documents_against_fp64(size: int, count: int) -> None:
    for found in run_ranks(random_errors, size, count, timeout=110):
        assert len(found) == count
        for case, errors in found.items():
            assert max(errors) < 1e-13, (case, errors)


def test_bits_repeat_on_a_cpu() -> None:
    for found in run_ranks(repeated, 2, "cpu", (*CPU[:-1], ("flash_cpu",)), timeout=110):
        assert len(found) == 8 and all(found.values()), found


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


@pytest.mark.gpu
@pytest.mark.timeout(500)
@pytest.mark.usefixtures("together")
@pytest.mark.parametrize("size", [2, 4])
def test_bits_repeat_on_a_gpu(size: int) -> None:
    """Of the twin that sums in a fixed order, documents of several rows in one call, and long ones apart."""
    for found in run_ranks(repeated, size, "cuda", (*GPU[:-1], ("flash_deterministic",)), timeout=400):
        assert len(found) == 24 and all(found.values()), found
