"""``dnsp bench attention``: causal softmax attention over P ranks, forward and backward, against one process.

Each layout and transport of keys, and one process on all tokens, turn about, medians. On one GPU together the time over
one process's is the extra work of being parallel; on a GPU each, efficiency is a P-th of one process's time (its whole
causal square is the work that P ranks share) over the ranks' time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from dnsp.bench.ranks import Ranks, check, measure, middle, new_table, publish
from dnsp.bench.scan import ONE
from dnsp.errors import UsageError
from dnsp.parallel.attention import attention
from dnsp.parallel.attention_backends import Heads, choose
from dnsp.parallel.layout import KINDS, Layout
from dnsp.parallel.plan import ATTENTION_TRANSPORTS, Plan, local_plan, make_plan
from dnsp.parallel.probe import refusal


def run(
    tokens: int = 65_536,
    ranks: Sequence[int] = (2, 4),
    layouts: Sequence[str] = KINDS,
    transports: Sequence[str] = ("peer", "ring", "gather"),
    *,
    heads: int = 16,
    key_heads: int = 2,
    widths: Sequence[int] = (256, 128),
    backend: str = "auto",
    document: int | None = None,
    steps: int = 5,
    json_path: Path | None = None,
) -> int:
    """Measure and print; returns the exit status. ``tokens``: in all; ``document``: tokens of each document, None for
    one document.

    Raises: UsageError for what cannot be measured.
    """
    check(tokens, ranks, layouts, transports, ATTENTION_TRANSPORTS)
    if heads % key_heads:
        raise UsageError(f"--heads {heads} is no multiple of --key-heads {key_heads}")
    if document is not None and document < 1:
        raise UsageError(f"--document {document}: a document has at least one token")
    shape = {"tokens": tokens, "heads": heads, "key_heads": key_heads, "document": document}
    request = {
        **shape, "layouts": list(layouts), "transports": list(transports), "widths": list(widths), "backend": backend,
        "steps": steps,
    }  # fmt: skip
    worlds = measure("attention", request, ranks)
    publish(worlds, lambda found: [table(found, figures, shape) for figures in found["widths"]], shape, json_path)
    return 0


def table(world: dict[str, Any], figures: dict[str, Any], shape: dict[str, Any]) -> Table:
    """One world's figures at one width of heads."""
    alone = world["sharing"] == 1
    title = (
        f"{world['ranks']} ranks, {shape['tokens']:,} tokens in all, {shape['heads']}/{shape['key_heads']} heads of "
        f"{figures['width']}, {figures['backend']}; {world['where']}"
    )
    rows = new_table(title, "forward, ms", "and backward, ms", "efficiency" if alone else "over one process")
    for way in figures["ways"]:
        ideal = figures["ways"][0]["both_ms"] / (world["ranks"] if alone else 1)
        share = ideal / way["both_ms"] if alone else way["both_ms"] / ideal
        said = "" if alone and way["name"] == ONE else f"{share:.1%}" if alone else f"{share:.3f}"
        rows.add_row(way["name"], f"{way['forward_ms']:.3f}", f"{way['both_ms']:.3f}", said)
    return rows


# What a rank does.


@dataclass
class Step:
    """Attention on a plan's tokens."""

    plan: Plan
    inputs: tuple[Tensor, Tensor, Tensor]
    do: Tensor

    def forward(self) -> None:
        with torch.no_grad():
            attention(*self.inputs, plan=self.plan)

    def __call__(self) -> None:
        torch.autograd.grad(attention(*self.inputs, plan=self.plan), self.inputs, self.do)


def make_step(plan: Plan, request: dict[str, Any], width: int, device: torch.device, like: Step | None = None) -> Step:
    """``like``: a step on as many tokens, whose inputs serve again."""
    plan = plan.to(device)
    if like is not None:
        return Step(plan, like.inputs, like.do)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    draw = torch.Generator(device).manual_seed(plan.rank)
    counts = (request["heads"], request["key_heads"], request["key_heads"], request["heads"])
    q, k, v, do = (
        torch.randn(1, plan.local_tokens, count, width, generator=draw, device=device).to(dtype) for count in counts
    )
    return Step(plan, (q.requires_grad_(), k.requires_grad_(), v.requires_grad_()), do)


def rank_main(request: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """One world's figures."""
    tokens, grid = request["tokens"], ranks.grid
    notes: list[str] = []
    why_not = refusal(ranks.comm)
    transports = [t for t in request["transports"] if not (t == "peer" and why_not)]
    if len(transports) < len(request["transports"]):
        notes.append(f"not by peer: {why_not}")
    starts = [list(range(0, tokens, request["document"] or tokens))]
    found = []
    for width in request["widths"]:
        chosen = _backend(request, width, ranks.device, tokens // (2 * grid.world)) if ranks.first else None
        backend, how = ranks.comm.from_all(chosen)[0]
        if how:
            notes.append(f"heads of {width}: {backend} ({how})")
        works: dict[str, Step | None] = {ONE: None}
        if ranks.first:
            one = local_plan(starts, tokens)
            works[ONE] = make_step(_with(one, backend), request, width, ranks.device)
        step: Step | None = None
        for kind in request["layouts"]:
            for transport in transports:
                plan = make_plan(
                    starts, Layout(kind, grid.world, tokens), grid, attention_transport=transport,
                    attention_backend=backend,
                )  # fmt: skip
                works[f"{kind}, {transport}"] = step = make_step(plan, request, width, ranks.device, step)
        forward = ranks.turns({n: None if w is None else w.forward for n, w in works.items()}, request["steps"])
        both = ranks.turns(works, request["steps"])
        ways = [{"name": n, "forward_ms": middle(forward[n]), "both_ms": middle(both[n])} for n in works]
        found.append({"width": width, "backend": backend, "ways": ways})
    return {**ranks.about, "widths": found, "notes": notes}


def _backend(request: dict[str, Any], width: int, device: torch.device, tokens: int) -> tuple[str, str]:
    """Its name, and in words how it came to be this one; ``tokens``: of the blocks that it is for."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads = Heads(device, dtype, request["heads"], request["key_heads"], width, width)
    backend, how = choose(heads, request["backend"], tokens=tokens)
    return backend.name, how


def _with(plan: Plan, backend: str) -> Plan:
    return replace(plan, attention_backend=backend)
