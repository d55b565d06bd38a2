"""What a report concludes from its tables, in sentences; nothing of runs that are missing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Literal

from dnsp.tasks import document
from dnsp.tasks.summary import Summary, perplexity


def recall_verdicts(task: str, cells: list[Summary], width: int) -> list[str]:
    """What was to be reached, and whether it was; nothing of models that are missing, or not finished."""
    shown = [cell for cell in cells if cell.labels["width"] == width]
    means = {cell.labels["model"]: mean(values) for cell in shown if cell.whole and (values := cell.values("test"))}
    said = _unfinished(shown)
    stated = document.RECALL.get(task, {}).get("deltanet")
    for model in ("deltanet", "gated_delta", "hybrid"):
        if model not in means:
            continue
        if stated is not None:
            said.append(f"{model} {_reaches(means[model], stated)} the document's DeltaNet ({stated})")
        if "linear_attention" in means:
            higher = "above" if means[model] > means["linear_attention"] else "not above"
            said.append(f"{model} {higher} linear attention")
    if "hybrid" in means and "attention" in means:
        near = "within" if means["hybrid"] >= means["attention"] - 1 else "not within"
        said.append(f"hybrid {near} 1 point of attention")
    return said + _outside(task, [cell for cell in shown if cell.whole])


def _outside(task: str, cells: list[Summary]) -> list[str]:
    """The document's figures that no spread of ours holds."""
    said = []
    for cell in cells:
        values, theirs = cell.values("test"), document.RECALL.get(task, {}).get(cell.labels["model"])
        if values and theirs is not None and not min(values) <= theirs <= max(values):
            said.append(f"{theirs} for {cell.labels['model']} (ours {mean(values) - theirs:+.1f})")
    return [f"outside our spreads are the document's {', '.join(said)}"] if said else []


def _unfinished(cells: list[Summary]) -> list[str]:
    left = [cell.labels["model"] for cell in cells if not cell.whole]
    return [f"not finished: {', '.join(left)}"] if left else []


def _reaches(ours: float, theirs: float) -> str:
    return "reaches" if ours >= theirs else f"stays {theirs - ours:.1f} points below"


def order_verdict(variants: Sequence[Summary | str], figure: Literal["perplexity", "recall"] = "perplexity") -> str:
    """Whether perplexities fall, or recall rises, in the order of the document's table, and whether any spreads
    overlap; of none while one is not finished, or not begun (its name alone). A variant whose runs all diverged is
    worse than any that did not."""
    cells = [cell for cell in variants if isinstance(cell, Summary) and cell.whole]
    if len(cells) < len(variants):
        left = [v if isinstance(v, str) else v.labels["variant"] for v in variants if v not in cells]
        return f"nothing is said of the order of {figure}, not finished: {', '.join(left)}"
    spans = []
    for cell in cells:
        values = (
            [-accuracy for accuracy in cell.values("recall")]  # the lower the better, as perplexity
            if figure == "recall"
            else perplexity(cell.values("text", "loss"))
        )
        if not values and not cell.diverged:
            return ""
        spans.append((min(values), mean(values), max(values)) if values else (math.inf,) * 3)
    if len(spans) < 2:
        return ""
    pairs = list(zip(spans, spans[1:], strict=False))
    order = all(worse[1] > better[1] for worse, better in pairs)
    apart = all(worse[0] > better[2] for worse, better in pairs)
    names = ", then ".join(cell.labels["variant"] for cell in cells)
    lost = [cell.labels["variant"] for cell, span in zip(cells, spans, strict=True) if span[0] == math.inf]
    if len(lost) > 1:
        why = "diverged, or has a perplexity beyond all numbers"
        return f"{figure}: no order can be told (worst first: {names}): every run of {' and of '.join(lost)} {why}"
    if not order:
        found = sorted(zip(spans, cells, strict=True), key=lambda pair: -pair[0][1])
        ours = ", then ".join(cell.labels["variant"] for _, cell in found)
        return f"{figure}: the document's order (worst first: {names}) does not hold, ours is {ours}"
    overlap = "do not overlap" if apart else "overlap"
    return f"{figure}: the document's order holds (worst first: {names}); spreads {overlap}"


def stability_verdict(cells: list[Summary], norms: Mapping[str, tuple[float, str]]) -> str:
    """How many runs of each variant diverged, those of the search included, beside what the document says of it."""
    by_variant = {cell.labels["variant"]: cell for cell in cells}
    said = []
    for variant, (_, stated) in norms.items():
        if (cell := by_variant.get(variant)) is not None:
            runs = {(run["lr"], run["seed"]): run for run in [*cell.search.values(), *cell.finals]}
            lost = sum(run["outcome"] == "diverged" for run in runs.values())
            said.append(f"{lost} of {len(runs)} with {variant} (the document: {stated})")
    return f"diverged runs, the search's among them: {', '.join(said)}" if said else ""
