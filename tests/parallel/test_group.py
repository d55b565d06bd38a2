"""Several ranks against one process: real processes, gloo between them.

Ranks are started once for each group size and work through every layout, transport and op; each rank holds its part of
the outputs and gradients against those of one process, computed beside it from the same inputs.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dnsp.kernels import kept
from dnsp.kernels.delta_rule import chunk_gated_delta_rule
from dnsp.parallel.attention import attention
from dnsp.parallel.delta_rule import delta_rule
from dnsp.parallel.grid import make_grid
from dnsp.parallel.halo import causal_conv1d
from dnsp.parallel.layout import Layout
from dnsp.parallel.plan import Plan, local_plan, make_plan
from tests.ranks import dawdling, run_ranks

LIMITS = {  # relative error of the norm, against one process
    "attention fp32": 1e-6,
    "attention fp64": 1e-14,
    "attention bf16": 8e-3,
    "convolution": 1e-6,  # weight and bias: summed over ranks; x: three tokens before a cut
}
TOKENS, BATCH, SEGMENT = 1024, 2, 64
SIZES = (1, 2, pytest.param(4, marks=pytest.mark.slow))  # all cases of a size in one start of its ranks
LAYOUTS = ("contiguous", "zigzag")
WAYS = list(itertools.product(LAYOUTS, ("p2p", "gather")))
DOCUMENTS = {
    "one": [[0], [0]],
    "crossing": [[0, 100, 101, 640, 1000], [0, 512]],  # across cuts, one token long, at a cut
    "short": [list(range(0, TOKENS, 37)), [0, 700]],
    "goes on": [[-1, 300], [0, 900]],  # from an initial state
}
Compared = dict[str, tuple[bool, float]]  # tensor -> (same bits, relative error)


def inputs(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def over_tokens(x: Tensor) -> bool:
    return x.dim() > 1 and x.shape[1] == TOKENS


def run(op: Callable[..., Any], plan: Plan, leaves: dict[str, Tensor], seed: int = 7) -> dict[str, Tensor | None]:
    """Outputs and gradients of ``op(plan=..., **leaves)`` on a plan's part of the leaves; the output gradients are part
    of one recorded global draw."""
    mine = {name: (plan.local(x) if over_tokens(x) else x).clone().requires_grad_() for name, x in leaves.items()}
    results = op(plan=plan, **mine)
    results = results if isinstance(results, tuple) else (results,)
    outputs, grads = [], []
    for n, y in enumerate(results):
        if y is not None:
            whole = (y.shape[0], TOKENS, *y.shape[2:]) if n == 0 else tuple(y.shape)
            (dy,) = inputs(whole, seed=seed + n, dtype=y.dtype)
            outputs.append(y)
            grads.append(plan.local(dy) if n == 0 else dy)
    torch.autograd.backward(outputs, grads)
    found: dict[str, Tensor | None] = {"output": results[0].detach()}
    found |= {f"final {n}": None if y is None else y.detach() for n, y in enumerate(results[1:])}
    return found | {f"d{name}": x.grad for name, x in mine.items()}


_truth: dict[Any, dict[str, Tensor | None]] = {}  # one process's results, by op and documents


def compare(op: Callable[..., Any], plan: Plan, one: Plan, leaves: dict[str, Tensor]) -> Compared:
    key = op, one.segments.tokens, leaves["x" if "x" in leaves else "q"].dtype, one.doc_start_BT.numpy().tobytes()
    if key not in _truth:
        _truth[key] = run(op, one, leaves)
    truth, found = _truth[key], run(op, plan, leaves)
    compared = {}
    for name, value in found.items():
        reference = truth[name]
        if reference is None:  # not asked for
            assert value is None
            continue
        if name.startswith("d") and not over_tokens(reference) and name != "dinitial_state":  # a parameter: summed
            assert value is not None
            value = sum(plan.comm.all_gather(value, "test"), start=torch.zeros_like(value))
        elif value is None or (name == "dinitial_state" and 0 not in plan.intervals[0]):
            assert not (plan.holds_last if name.startswith("final") else 0 in plan.intervals[0])
            continue
        elif over_tokens(reference):
            reference = plan.local(reference)
        scale = float(reference.double().norm())
        error = float((value.double() - reference.double()).norm())
        compared[name] = torch.equal(value, reference), error / scale if scale else error
    return compared


def delta_leaves(seed: int, dtype: torch.dtype = torch.float32, initial: bool = False) -> dict[str, Tensor]:
    q, k, v, g, beta, state = inputs(
        (BATCH, TOKENS, 2, 16), (BATCH, TOKENS, 2, 16), (BATCH, TOKENS, 4, 24), (BATCH, TOKENS, 4),
        (BATCH, TOKENS, 4), (BATCH, 4, 16, 24), seed=seed,
    )  # fmt: skip
    leaves = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype), "g": -0.1 * g.abs(), "beta": beta.sigmoid()}
    return leaves | ({"initial_state": state} if initial else {})


def delta_op(*, plan: Plan, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **state: Tensor) -> Any:
    return delta_rule(q, k, v, g, beta, plan=plan, l2norm=True, output_final_state=bool(state), **state)


def attention_leaves(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    q, k, v = inputs((BATCH, TOKENS, 4, 16), (BATCH, TOKENS, 2, 16), (BATCH, TOKENS, 2, 16), seed=seed, dtype=dtype)
    return {"q": q, "k": k, "v": v}


def attention_op(*, plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, plan=plan)


def conv_op(*, plan: Plan, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return causal_conv1d(x, weight, bias, plan=plan)


def layer_op(*, plan: Plan, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, weight: Tensor) -> Tensor:
    """Convolution, delta rule and attention in a row: everything that communicates."""
    values = causal_conv1d(v.flatten(2), weight, plan=plan).unflatten(2, v.shape[2:])
    o, _ = delta_rule(q, k, values, g, beta, plan=plan, l2norm=True)
    return attention(o, o[:, :, ::2].contiguous(), values[:, :, ::2], plan=plan)


def layer_leaves() -> dict[str, Tensor]:
    return delta_leaves(3) | {"weight": inputs((4 * 24, 4), seed=4)[0]}


def kept_layer_op(*, plan: Plan, **leaves: Tensor) -> Tensor:
    def layer(*values: Tensor) -> Tensor:
        return layer_op(plan=plan, **dict(zip(leaves, values, strict=True)))

    return kept.checkpoint(layer, *leaves.values())


def on_every_rank() -> dict[str, Any]:
    """Every case on this rank; tensor by tensor what is equal, and by how much it is not."""
    grid = make_grid(timeout=60)
    found: dict[str, Any] = {}
    ways = [way for way in WAYS if grid.world > 1 or way[1] == "p2p"]
    for (kind, transport), (name, starts) in itertools.product(ways, DOCUMENTS.items()):
        keys = "ring" if transport == "p2p" else "gather"
        layout = Layout(kind, grid.world, TOKENS)
        make = functools.partial(make_plan, starts, layout, grid, transport=transport, attention_transport=keys)
        plan, one = make(SEGMENT), local_plan(starts, TOKENS, SEGMENT)
        case = f"{kind} {transport} {name} "
        found[case + "delta"] = compare(delta_op, plan, one, delta_leaves(1, initial=name == "goes on"))
        if name == "crossing":
            wide = make(128), local_plan(starts, TOKENS, 128)
            found[case + "delta bf16"] = compare(delta_op, *wide, delta_leaves(2, torch.bfloat16))
        for dtype, label in ((torch.float32, "fp32"), (torch.float64, "fp64"), (torch.bfloat16, "bf16")):
            found[case + f"attention {label}"] = compare(attention_op, plan, one, attention_leaves(5, dtype))
        x, weight, bias = inputs((BATCH, TOKENS, 8), (8, 4), (8,), seed=6)
        found[case + "convolution"] = compare(conv_op, plan, one, {"x": x, "weight": weight, "bias": bias})

        if name != "crossing":
            continue
        calls, steps = [], []
        for op in (layer_op, kept_layer_op):
            before = plan.comm.calls
            steps.append(run(op, plan, layer_leaves()))
            calls.append(plan.comm.calls - before)
        same = all(torch.equal(steps[0][n], steps[1][n]) for n in steps[0])  # type: ignore[arg-type]
        found[case + "recomputed"] = {"calls": calls, "same": same}
        found[case + "perturbed"] = perturbed(plan, steps[0], starts)
    return found


def random_cases(count: int) -> dict[str, Compared]:
    """Random documents, segments, layouts, transports and order of layers, on two sequence groups side by side, whose
    ranks are late now and then."""
    grid = make_grid(2, timeout=60)
    found = {}
    for seed in range(count):
        pick = random.Random(10 * seed + grid.data_rank)  # the groups work on different sequences
        starts = [sorted({0, *(pick.randrange(TOKENS) for _ in range(pick.choice((1, 3, 30))))}) for _ in range(BATCH)]
        kind, transport, keys = pick.choice(LAYOUTS), pick.choice(("p2p", "gather")), pick.choice(("ring", "gather"))
        segment = pick.choice((64, 128, 256))
        layout = Layout(kind, 2, TOKENS)
        plan = make_plan(starts, layout, grid, segment, transport=transport, attention_transport=keys)
        one = local_plan(starts, TOKENS, segment)
        case = f"{seed} {kind} {transport} {keys} {segment} {starts} "
        x, weight, bias = inputs((BATCH, TOKENS, 8), (8, 4), (8,), seed=seed)
        layers: dict[str, tuple[Callable[..., Any], dict[str, Tensor]]] = {
            "delta": (delta_op, delta_leaves(seed)),
            "attention": (attention_op, attention_leaves(seed)),
            "convolution": (conv_op, {"x": x, "weight": weight, "bias": bias}),
        }
        for name in pick.sample(sorted(layers), 3):
            op, leaves = layers[name]
            _truth.clear()  # of other numbers
            with dawdling(random.Random(100 * seed + grid.rank)):
                found[case + name] = compare(op, plan, one, leaves)
    return found


def perturbed(plan: Plan, before: dict[str, Tensor | None], starts: list[list[int]]) -> dict[str, bool]:
    """Changes everything in one document of row 0, which crosses cuts: what changes elsewhere (nothing may)?"""
    leaves = layer_leaves()
    first, last = starts[0][2], starts[0][3]
    changed = {n: x.clone() for n, x in leaves.items()}
    for name, x in changed.items():
        if name != "weight":
            x[0, first:last] = x[0, first:last] * (0.5 if name in ("g", "beta") else -3.0)
    after = run(layer_op, plan, changed)
    inside = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    inside[0, first:last] = True
    mine = plan.local(inside)
    return {
        name: torch.equal(before[name][~mine], after[name][~mine])  # type: ignore[index]
        and (not mine.any() or not torch.equal(before[name][mine], after[name][mine]))  # type: ignore[index]
        for name in before
        if name != "dweight"
    }


@functools.cache
def results(size: int) -> list[dict[str, Any]]:
    return run_ranks(on_every_rank, size, timeout=110)


def cases(size: int, op: str) -> Iterator[tuple[str, Any]]:
    for rank, found in enumerate(results(size)):
        picked = {case: value for case, value in found.items() if case.endswith(op)}
        assert picked
        yield from ((f"{case} on rank {rank} of {size}", value) for case, value in picked.items())


@pytest.mark.parametrize("op", ["delta", "delta bf16"])
@pytest.mark.parametrize("size", SIZES)
def test_delta_rule_has_the_bits_of_one_process(size: int, op: str) -> None:
    for case, compared in cases(size, op):
        assert {"output", "dq", "dk", "dv", "dg", "dbeta"} <= set(compared)
        assert not [name for name, (same, _) in compared.items() if not same], (case, compared)


@pytest.mark.parametrize("size", SIZES)
def test_the_last_intervals_rank_has_the_final_state(size: int) -> None:
    for kind in LAYOUTS:
        got = ["final 0" in found[f"{kind} p2p goes on delta"] for found in results(size)]
        assert got == [rank == (size - 1 if kind == "contiguous" else 0) for rank in range(size)]


@pytest.mark.parametrize("label", ["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("size", SIZES)
def test_attention_equals_one_process(size: int, label: str) -> None:
    for case, compared in cases(size, f"attention {label}"):
        assert set(compared) == {"output", "dq", "dk", "dv"}
        assert max(error for _, error in compared.values()) <= LIMITS[f"attention {label}"], (case, compared)


@pytest.mark.parametrize("size", SIZES)
def test_convolution_equals_one_process(size: int) -> None:
    for case, compared in cases(size, "convolution"):
        assert compared["output"][0], (case, compared)
        assert max(error for _, error in compared.values()) <= LIMITS["convolution"], (case, compared)


@pytest.mark.parametrize("size", SIZES)
def test_recomputation_communicates_nothing_and_changes_nothing(size: int) -> None:
    for case, seen in cases(size, "recomputed"):
        assert seen["same"], case
        assert seen["calls"][0] == seen["calls"][1] and (seen["calls"][0] > 0) == (size > 1), (case, seen)


@pytest.mark.parametrize("size", SIZES)
def test_a_document_changes_no_bit_of_another(size: int) -> None:
    for case, unchanged in cases(size, "perturbed"):
        assert all(unchanged.values()), (case, unchanged)


@pytest.mark.parametrize("count", [2, pytest.param(40, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_random_documents_on_two_groups(count: int) -> None:
    for found in run_ranks(random_cases, 4, count, timeout=600):
        for case, compared in found.items():
            if case.endswith("delta"):
                assert all(same for same, _ in compared.values()), (case, compared)
            else:
                limit = LIMITS["convolution" if case.endswith("convolution") else "attention fp32"]
                assert max(error for _, error in compared.values()) <= limit, (case, compared)


def test_one_rank_is_the_public_op() -> None:
    starts = DOCUMENTS["crossing"]
    plan, leaves = local_plan(starts, TOKENS, SEGMENT), delta_leaves(1)
    o, _ = delta_op(plan=plan, **leaves)
    public, _ = chunk_gated_delta_rule(
        *leaves.values(), use_qk_l2norm_in_kernel=True, doc_start=plan.doc_start_BT, segment_tokens=SEGMENT
    )
    assert torch.equal(o, public)
