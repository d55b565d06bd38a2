"""What enters the delta rule during a training step, recorded on one process and replayed through any plan."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from dnsp.kernels.passes import UnderWay
from dnsp.kernels.reference import Rule
from dnsp.parallel.delta_rule import delta_rule
from dnsp.parallel.plan import Plan


@dataclass
class Call:
    """One recorded call of the delta rule: inputs over the whole sequences, and the gradient of its outputs."""

    inputs: dict[str, Tensor]  # q, k, v, g, beta; g may be missing
    scale: float
    rule: Rule
    normalise: bool
    grad_BTHV: Tensor | None = None
    replayed: dict[str, Tensor] = field(default_factory=dict)  # one process: o, and each input's gradient


@dataclass(frozen=True)
class _UnderWay:
    """A call under way, whose output's gradient is noted."""

    of: UnderWay
    call: Call

    def finish(self) -> tuple[Tensor, Tensor | None]:
        o, final = self.of.finish()
        o.register_hook(lambda grad: setattr(self.call, "grad_BTHV", _kept(grad)))
        return o, final


@contextmanager
def recording() -> Iterator[list[Call]]:
    """The calls of the delta rule meanwhile, with the output gradient of each once the backward has passed it."""
    calls: list[Call] = []
    module = importlib.import_module("dnsp.parallel.delta_rule")
    original = module.kernels_begin

    def record(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, **options: Any) -> Any:
        given = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
        inputs = {name: _kept(x) for name, x in given.items() if x is not None}
        call = Call(inputs, options["scale"], options["rule"], options["normalise_qk"])
        calls.append(call)
        return _UnderWay(original(q, k, v, g, beta, **options), call)

    with patch.object(module, "kernels_begin", record):
        yield calls


def _kept(x: Tensor) -> Tensor:
    """A copy that waits on the CPU."""
    return x.detach().to("cpu", copy=True)


def replay(call: Call, plan: Plan) -> dict[str, Tensor]:
    """This rank's part of a recorded call: ``o``, and the gradient of each input under its name, on the CPU."""
    assert call.grad_BTHV is not None
    where = plan.doc_start_BT.device
    inputs = {name: plan.local(x).to(where).requires_grad_() for name, x in call.inputs.items()}
    o, _ = delta_rule(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        inputs.get("g"),
        inputs["beta"],
        plan=plan,
        scale=call.scale,
        rule=call.rule,
        l2norm=call.normalise,
    )
    grad_o = plan.local(call.grad_BTHV).to(where)
    gradients = torch.autograd.grad(o, list(inputs.values()), grad_o, allow_unused=True)
    found = zip(inputs, gradients, strict=True)
    return {"o": o.detach().cpu(), **{name: grad.cpu() for name, grad in found if grad is not None}}
