"""``dnsp bench attention``: causal softmax attention over P ranks, forward and backward, against one process.

    one process       all tokens, by one rank alone
    a P-th of it      the ideal of a GPU each, worked out: one process's blocks are the work that P ranks share
    ranks             P ranks, for each layout and transport of keys
    heads exchanged   P ranks, contiguous: all tokens of a share of the heads by the same backend, an exchange of heads
                      before it and one back (DeepSpeed-Ulysses, Jacobs et al. 2023)

Turn about, medians. On one GPU together the time over one process's is the extra work of being parallel; on a GPU each,
efficiency = the ideal / the ranks' time.
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
from dnsp.bench.scan_peers import ByHeads
from dnsp.errors import UsageError
from dnsp.parallel.attention import attention
from dnsp.parallel.attention_backends import Heads, choose
from dnsp.parallel.layout import KINDS, Layout
from dnsp.parallel.plan import ATTENTION_TRANSPORTS, Plan, local_plan, make_plan
from dnsp.parallel.probe import refusal
from dnsp.parallel.transport import Transport

EXCHANGED = "heads exchanged"


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
    one, *others = figures["ways"]
    ideal = one["both_ms"] / (world["ranks"] if alone else 1)

    def add(name: str, forward: float, both: float, said: str) -> None:
        rows.add_row(name, f"{forward:.3f}", f"{both:.3f}", said)

    add(one["name"], one["forward_ms"], one["both_ms"], "" if alone else f"{1:.3f}")
    if alone:
        add(f"1/{world['ranks']} of it, the ideal", one["forward_ms"] / world["ranks"], ideal, f"{1:.1%}")
    for way in others:
        both = way["both_ms"]
        add(way["name"], way["forward_ms"], both, f"{ideal / both:.1%}" if alone else f"{both / ideal:.3f}")
    return rows


# What a rank does.


@dataclass
class Step:
    """Attention on a plan's tokens."""

    plan: Plan
    inputs: tuple[Tensor, Tensor, Tensor]
    do: Tensor

    def output(self) -> Tensor:
        return attention(*self.inputs, plan=self.plan)

    def forward(self) -> None:
        with torch.no_grad():
            self.output()

    def __call__(self) -> None:
        torch.autograd.grad(self.output(), self.inputs, self.do)


@dataclass
class ExchangedStep(Step):
    """The same with heads exchanged: ``inputs`` are a rank's tokens, contiguous; the plan is of all tokens."""

    comm: Transport

    def output(self) -> Tensor:
        q, k, v = self.inputs
        copies = self.comm.size // k.shape[2]  # of each key head, where there are fewer than ranks
        if copies > 1:
            k, v = (x.repeat_interleave(copies, 2) for x in (k, v))
        q, k, v = (ByHeads.apply(x, self.comm, True) for x in (q, k, v))
        return ByHeads.apply(attention(q, k, v, plan=self.plan), self.comm, False)


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
    one = local_plan(starts, tokens)
    indivisible = _not_exchanged(request, ranks)
    if indivisible:
        notes.append(f"not with heads exchanged: {indivisible}")
    elif request["key_heads"] < grid.world:
        notes.append(f"{EXCHANGED}: each key head goes to {grid.world // request['key_heads']} ranks")
    found = []
    for width in request["widths"]:
        chosen = _backend(request, width, ranks.device, tokens // (2 * grid.world)) if ranks.first else None
        backend, how = ranks.comm.from_all(chosen)[0]
        if how:
            notes.append(f"heads of {width}: {backend} ({how})")
        works: dict[str, Step | None] = {ONE: None}
        if ranks.first:
            works[ONE] = make_step(_with(one, backend), request, width, ranks.device)
        step: Step | None = None
        for kind in request["layouts"]:
            for transport in transports:
                plan = make_plan(
                    starts, Layout(kind, grid.world, tokens), grid, attention_transport=transport,
                    attention_backend=backend,
                )  # fmt: skip
                works[f"{kind}, {transport}"] = step = make_step(plan, request, width, ranks.device, step)
        if step is not None and not indivisible:
            exchanged = ExchangedStep(_with(one, backend).to(ranks.device), step.inputs, step.do, ranks.comm)
            willing, failures = ranks.willing({EXCHANGED: exchanged})
            works |= {name: exchanged for name in willing}
            notes += [f"not with {name}, heads of {width}: {words}" for name, words in failures.items()]
        forward = ranks.turns({n: None if w is None else w.forward for n, w in works.items()}, request["steps"])
        both = ranks.turns(works, request["steps"])
        ways = [{"name": n, "forward_ms": middle(forward[n]), "both_ms": middle(both[n])} for n in works]
        found.append({"width": width, "backend": backend, "ways": ways})
    return {**ranks.about, "widths": found, "notes": notes}


def _not_exchanged(request: dict[str, Any], ranks: Ranks) -> str:
    """Why heads cannot be exchanged, in words; empty where they can."""
    world, heads, key_heads = ranks.grid.world, request["heads"], request["key_heads"]
    if ranks.device.type == "cuda" and ranks.sharing > 1:
        return "it needs a GPU for every rank (NCCL refuses two on one)"
    if heads % world:
        return f"{heads} heads do not divide by {world} ranks"
    if key_heads % world and world % key_heads:
        return f"{key_heads} key heads do not divide by {world} ranks, nor the ranks by them"
    return ""


def _backend(request: dict[str, Any], width: int, device: torch.device, tokens: int) -> tuple[str, str]:
    """Its name, and in words how it came to be this one; ``tokens``: of the blocks that it is for."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads = Heads(device, dtype, request["heads"], request["key_heads"], width, width)
    backend, how = choose(heads, request["backend"], tokens=tokens)
    return backend.name, how


def _with(plan: Plan, backend: str) -> Plan:
    return replace(plan, attention_backend=backend)
