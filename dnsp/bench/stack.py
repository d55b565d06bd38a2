"""``dnsp bench stack``: whole layers over P ranks, forward and backward, against one process on the same tokens.

Three gated delta layers and one of attention, with projections, convolutions, norms and feed-forwards, as a model has
them; no optimizer and no reduction of gradients; segments as training takes them. By turns, medians; on one GPU
together the time over one process's is the extra work of being parallel, on a GPU each efficiency is a P-th of one
process's time over the ranks'.
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
from dnsp.bench.train import SHAPE
from dnsp.choices import make_choices
from dnsp.config import Config, override_tree, parse_config
from dnsp.model.decoder import Decoder
from dnsp.parallel.layout import KINDS, Layout
from dnsp.parallel.plan import Plan, local_plan, make_plan
from dnsp.parallel.probe import refusal

LAYERS = ["model.num_hidden_layers=4", "model.vocab_size=1024", "engine.activation_checkpointing=false"]


def run(
    overrides: Sequence[str],
    tokens: int = 65_536,
    ranks: Sequence[int] = (4,),
    layouts: Sequence[str] = KINDS,
    *,
    steps: int = 5,
    json_path: Path | None = None,
) -> int:
    """Measure and print; returns the exit status. ``overrides``: of the configuration of ``dnsp bench train``.

    Raises: UsageError for what cannot be measured.
    """
    settings = [*LAYERS, *overrides, f"data.sequence_length={tokens}"]
    config = parse_config(override_tree(SHAPE, settings), "dnsp bench stack")
    check(tokens, ranks, layouts)
    request = {"config": config.model_dump(mode="json"), "layouts": list(layouts), "steps": steps}
    worlds = measure("stack", request, ranks)
    publish(worlds, lambda found: [table(found, config)], {"tokens": tokens}, json_path)
    return 0


def table(world: dict[str, Any], config: Config) -> Table:
    """One world's figures for people."""
    alone = world["sharing"] == 1
    title = (
        f"{world['ranks']} ranks, {config.data.sequence_length:,} tokens in all, {', '.join(config.model.layers)} of "
        f"width {config.model.hidden_size:,}; {world['where']}"
    )
    rows = new_table(title, "ms", "efficiency" if alone else "over one process")
    one = world["ways"][0]["ms"]
    for way in world["ways"]:
        share = f"{one / world['ranks'] / way['ms']:.1%}" if alone else f"{way['ms'] / one:.3f}"
        rows.add_row(way["name"], f"{way['ms']:.3f}", "" if alone and way["name"] == ONE else share)
    return rows


# What a rank does.


@dataclass
class Step:
    """The layers, there and back, on a plan's tokens."""

    model: Decoder
    tokens: Tensor
    plan: Plan
    grad: Tensor

    def __call__(self) -> None:
        self.model.hidden(self.tokens, self.plan).backward(self.grad)
        self.model.zero_grad(set_to_none=True)


def rank_main(request: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """One world's figures."""
    config, grid, device = parse_config(request["config"], "dnsp bench stack"), ranks.grid, ranks.device
    length = config.data.sequence_length
    why_not = refusal(ranks.comm)
    timed = Layout(request["layouts"][-1], grid.world, length)
    chosen = make_choices(config, None, why_not, bool(grid.near), timed) if ranks.first else None
    choices, how = ranks.comm.from_all(chosen)[0]
    torch.manual_seed(0)
    with device:
        model = Decoder(config.model).to(torch.bfloat16 if device.type == "cuda" else torch.float32)

    def step(plan: Plan) -> Step:
        shape = 1, plan.local_tokens
        like: dict[str, Any] = {"device": device, "dtype": model.lm_head.weight.dtype}
        grad = torch.randn(*shape, config.model.hidden_size, **like)
        return Step(model, torch.randint(config.model.vocab_size, shape, device=device), plan.to(device), grad)

    works: dict[str, Step | None] = {ONE: None}
    if ranks.first:
        segment = choices.segment_tokens(config, Layout("contiguous", 1, length))
        works[ONE] = step(_with(local_plan([[0]], length, segment), choices.attention_backend))
    for kind in request["layouts"]:
        layout = Layout(kind, grid.world, length)
        plan = make_plan(
            [[0]], layout, grid, choices.segment_tokens(config, layout), transport=choices.transport,
            attention_transport=choices.attention_transport, attention_backend=choices.attention_backend,
        )  # fmt: skip
        works[f"{kind}, {choices.transport}"] = step(plan)
    times = ranks.turns(works, request["steps"])
    ways = [{"name": name, "ms": middle(times[name])} for name in works]
    notes = [f"attention: {choices.attention_backend}" + (f" ({how})" if how else "")]
    return {**ranks.about, "ways": ways, "choices": choices.to_dict(), "notes": notes}


def _with(plan: Plan, backend: str) -> Plan:
    return replace(plan, attention_backend=backend)
