"""Non-finite inputs come out as non-finite outputs and gradients, from their own chunk on, in the value heads that
share their key head: never in another head or row, never in another document, never as wrong finite numbers.

Every key head has another input that is not finite, and one has none, so that a run shows all of them. On the torch
path, under Triton's interpreter, and on a GPU, where the fused backward and the passes apart are looked at each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dnsp.kernels import proof, proof_run
from dnsp.kernels.launches import candidates
from dnsp.kernels.reference import recurrence
from dnsp.kernels.scan import LocalScan
from tests.kernels.cases import Case, call, segments
from tests.kernels.interpreter import Interpreter

VALUES = {"nan": float("nan"), "inf": float("inf")}
# What is not finite in a key head and its two value heads; of v, g, beta and do the first value head's alone.
BAD = ("q", "k", "v", "g", "beta", "do", "nothing")


class Layout(NamedTuple):
    """Where the documents of the token's row begin, the token, and those that may go with it: its document's. Products
    over a chunk's tokens would multiply what is not finite by the zeros that stand between documents."""

    starts: tuple[int, ...]
    token: int
    spoilt: slice


BESIDE = Layout((0, 64, 100, 128, 140), 70, slice(64, 100))  # one document shares the one chunk of the token's
ALONE = Layout((0, 50, 100, 140), 70, slice(50, 100))  # every chunk has two
BEGINS = Layout((0, 50, 140), 55, slice(50, 140))  # the token's goes on, over a whole chunk and into the next
GOES_ON = Layout((0, 50, 140), 70, slice(50, 140))  # the same from within that chunk, and back to the one before
CASE = Case(150, ("weak", "weak"), H=len(BAD), HV=2 * len(BAD), V=16)
CASES = {
    "documents": (CASE, BESIDE, 64),
    "one segment": (replace(CASE, l2norm=True), BESIDE, None),
    "documents that share chunks": (CASE, ALONE, 64),
    "the same, one segment": (replace(CASE, l2norm=True), ALONE, None),
    "one begins": (CASE, BEGINS, 64),
    "one begins, one segment": (replace(CASE, l2norm=True), BEGINS, None),
    "one goes on": (replace(CASE, l2norm=True), GOES_ON, 64),
    "one goes on, one segment": (replace(CASE, decays=("strong", "weak")), GOES_ON, None),
}
# |error| of what is finite, over the largest number of the tensor.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

Results = dict[str, Tensor]


def inputs_of(case: Case, dtype: torch.dtype, token: int = 0, value: float | None = None) -> dict[str, Tensor]:
    inputs = {name: x.detach() for name, x in case.inputs(dtype).items()}
    inputs["do"] = case.output_gradients()[0].to(dtype)
    for head, name in enumerate(BAD[:-1] if value is not None else ()):
        x = inputs[name]
        x[0, token, head * (x.shape[2] // len(BAD))] = -value if name == "g" else value  # type: ignore[operator]
    return inputs


def run(case: Case, inputs: dict[str, Tensor], tokens: int | None, backend: Any, device: str = "cpu") -> Results:
    leaves = {n: x.to(device).requires_grad_() for n, x in inputs.items() if n != "do"}
    o, _ = call(case, leaves, segments(case, tokens), LocalScan(), backend=backend)
    grads = torch.autograd.grad(o, list(leaves.values()), inputs["do"].to(device))
    return {"o": o.detach().cpu()} | {"d" + name: x.cpu() for name, x in zip(leaves, grads, strict=True)}


def truth_of(case: Case, inputs: dict[str, Tensor]) -> Results:
    leaves = {n: x.double().requires_grad_() for n, x in inputs.items() if n != "do"}
    options: Any = {"scale": case.scale, "doc_start_BT": case.doc_start(), "normalise_qk": case.l2norm}
    o, _ = recurrence(*(leaves[name] for name in ("q", "k", "v", "g", "beta")), **options)
    grads = torch.autograd.grad(o, list(leaves.values()), inputs["do"].double())
    return {"o": o.detach()} | {"d" + name: x for name, x in zip(leaves, grads, strict=True)}


def wrong(layout: Layout, clean: Results, found: Results, exact: Results, tolerance: float) -> list[str]:
    """What is not as it should be, in words; ``clean`` is what all was before a number was not finite."""
    said = []
    for name, x in found.items():
        each = x.shape[2] // len(BAD)
        may = torch.zeros(x.shape[:3], dtype=torch.bool)
        may[0, layout.spoilt, : -each or None] = True
        same = (x == clean[name]).flatten(3).all(-1) if x.dim() > 3 else x == clean[name]
        if not same[~may].all():
            at = (~same & ~may).nonzero().tolist()
            said.append(f"{name} has other bits where nothing was changed: {len(at)} of [row, token, head], {at[:3]}")
        finite = x.isfinite()
        should_not = finite & ~exact[name].isfinite()
        if name == "dg":  # of a document's first token it is zero, whatever comes behind: there is nothing to decay
            should_not[0, list(layout.starts)] &= x[0, list(layout.starts)] != 0
        if should_not.any():
            at = should_not.nonzero()[:, :3].unique(dim=0).tolist()
            said.append(f"{name} is finite where the truth is not: {len(at)} of [row, token, head], {at[:3]}")
        both = finite & exact[name].isfinite()
        largest = clean[name].abs().max()
        off = ((x - exact[name])[both].abs().max() / largest).item()
        if not off < tolerance:
            said.append(f"{name} is finite and off by {off:.1e}")
    for head, name in enumerate(BAD[:-1]):
        x = found["o" if name != "do" else "dv"][0, layout.token, 2 * head]
        if x.isfinite().any():
            said.append(f"{name} is not finite, and the token's result is")
    return said


def check(name: str, value: str, dtype: torch.dtype, backend: str, device: str = "cpu") -> list[str]:
    case, layout, tokens = CASES[name]
    case = replace(case, starts=(layout.starts, (0,)))
    if dtype == torch.bfloat16:  # the widths of the fused backward
        case = replace(case, K=128, V=128)
    clean = run(case, inputs_of(case, dtype), tokens, backend, device)
    changed = inputs_of(case, dtype, layout.token, VALUES[value])
    found = run(case, changed, tokens, backend, device)
    return wrong(layout, clean, found, truth_of(case, changed), TOLERANCE[dtype])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("value", VALUES)
def test_torch(name: str, value: str) -> None:
    assert check(name, value, torch.float32, "torch") == []


def check_interpreted() -> list[str]:
    return check("one begins", "nan", torch.float32, "triton")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_interpreted(interpreter: Interpreter) -> None:
    assert interpreter("test_nonfinite:check_interpreted") == []


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("dtype", "table"),
    [(torch.bfloat16, "as tuned"), (torch.bfloat16, "passes apart"), (torch.float32, "as tuned")],
)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("value", VALUES)
def test_on_gpu(name: str, value: str, dtype: torch.dtype, table: str) -> None:
    with proof.mode(proof_run.Recording(candidates()[table])):
        assert check(name, value, dtype, "triton", "cuda") == []
