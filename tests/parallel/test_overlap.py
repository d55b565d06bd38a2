"""What needs no state is done while states travel: the order of it on real ranks, and proof that nothing is awaited."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from dnsp.config import ModelConfig
from dnsp.kernels import kept
from dnsp.kernels.scan import Coming
from dnsp.model.deltanet import DeltaNet
from dnsp.model.gated_delta import GatedDelta
from dnsp.parallel.delta_rule import begin_delta_rule, delta_rule
from dnsp.parallel.grid import make_grid
from dnsp.parallel.layout import KINDS, Layout
from dnsp.parallel.plan import Plan, make_plan
from dnsp.parallel.scan import ParallelScan
from dnsp.parallel.waits import Waits
from tests.ranks import run_ranks

THERE_AND_BACK = [
    *("forward starts", "gate", "forward arrives"),
    *("reverse starts", "gate's gradient", "reverse arrives"),
]
RECOMPUTED = [*THERE_AND_BACK[:3], "gate", *THERE_AND_BACK[3:]]
LAYERS: dict[str, tuple[Callable[[ModelConfig], torch.nn.Module], str, str]] = {  # its output gate, and what precedes
    "gated_delta": (GatedDelta, "in_proj_z", "in_proj_a"),
    "deltanet": (DeltaNet, "g_proj", "beta_proj"),
}


@contextmanager
def recorded(events: list[str]) -> Iterator[None]:
    def recording(name: str) -> Any:
        original = getattr(ParallelScan, name)

        def start(self: ParallelScan, *args: Any) -> Coming:
            events.append(f"{name} starts")
            coming = original(self, *args)

            def arrived() -> tuple[Tensor, Tensor | None]:
                events.append(f"{name} arrives")
                return coming()

            return arrived

        return patch.object(ParallelScan, name, start)

    with recording("forward"), recording("reverse"):
        yield


def on_two_ranks() -> dict[str, Any]:
    """Each layer there and back, the state's sender held up until its receiver has done what needs no state."""
    grid = make_grid(timeout=20)
    rank = grid.rank
    found: dict[str, Any] = {}
    tell = dist.new_group([0, 1])
    config = ModelConfig(hidden_size=32)

    def word(sender: int) -> Any:
        def hook(*_: object) -> None:
            token = torch.zeros(1)
            dist.send(token, 1 - rank, group=tell) if rank == sender else dist.recv(token, 1 - rank, group=tell)

        return hook

    for kind, (name, (make, gate, before)) in itertools.product(KINDS, LAYERS.items()):
        plan = make_plan([[0, 100]], Layout(kind, 2, 512), grid, 64)
        torch.manual_seed(0)
        layer: Any = make(config)
        layer.reset_parameters(0.1)
        events: list[str] = []
        x = torch.randn(1, plan.local_tokens, 32, requires_grad=True)
        getattr(layer, gate).register_forward_hook(lambda *_, events=events: events.append("gate"))
        getattr(layer, gate).register_full_backward_hook(lambda *_, events=events: events.append("gate's gradient"))
        held = []
        if kind == "contiguous":  # under zigzag each rank waits for the other
            held = [
                getattr(layer, gate).register_forward_hook(word(1))
                if rank == 1
                else getattr(layer, before).register_forward_pre_hook(word(1)),
                getattr(layer, gate).register_full_backward_hook(word(0))
                if rank == 0
                else layer.out_proj.register_full_backward_pre_hook(word(0)),
            ]
        with recorded(events):
            layer(x, plan, None).sum().backward()
            for hook in held:
                hook.remove()
            dist.barrier(group=tell)
            seen, grad = list(events), x.grad
            events.clear()
            x.grad = None
            kept.checkpoint(lambda x, layer=layer, plan=plan: layer(x, plan, None), x).sum().backward()
        assert grad is not None and x.grad is not None
        found[f"{name}, {kind}"] = seen, list(events), torch.equal(grad, x.grad)
    for kind in KINDS:
        found[f"two at once, {kind}"] = two_at_once(make_plan([[0, 300]], Layout(kind, 2, 512), grid))
    return found


def two_at_once(plan: Plan) -> bool:
    """Whether calls that are under way together give the bits of one after the other."""
    results = []
    for together in (False, True):
        draw = torch.Generator().manual_seed(plan.rank)
        calls = []
        for _ in range(2):
            *qkv, g, beta = (torch.randn(1, plan.local_tokens, 2, *w, generator=draw) for w in ((8,),) * 3 + ((),) * 2)
            calls.append([x.requires_grad_() for x in (*qkv, -g.abs(), beta.sigmoid())])
        if together:
            under_way = [begin_delta_rule(*inputs, plan=plan) for inputs in calls]
            outputs = [call.finish()[0] for call in under_way]
        else:
            outputs = [delta_rule(*inputs, plan=plan)[0] for inputs in calls]
        (outputs[0] * outputs[1]).sum().backward()
        results.append([*outputs, *(x.grad for inputs in calls for x in inputs)])
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_output_gate_is_computed_while_states_travel() -> None:
    for found in run_ranks(on_two_ranks, 2, timeout=60):
        assert all(found.pop(f"two at once, {kind}") for kind in KINDS)
        for name, (seen, recomputed, same) in found.items():
            assert seen == THERE_AND_BACK, (name, seen)
            assert recomputed == RECOMPUTED and same, (name, recomputed)


def test_waits_that_nothing_stands_still_for_are_not_counted() -> None:
    waits = Waits()
    waits.on = True
    with waits.aside(), waits.counted():
        pass
    assert waits.take() == (0.0, [])
    with waits.counted():
        pass
    assert waits.take()[0] > 0
