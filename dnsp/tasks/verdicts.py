"""What a report concludes from its tables, in sentences; nothing of runs that are missing.

An order of two means is worth little where the seeds of one lie among those of the other: sentences say so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from statistics import mean
from typing import Literal

from dnsp.tasks import document
from dnsp.tasks.summary import Summary, diverged_at, perplexity

LEARNED = 20.0  # percent of recall: where no variant's mean comes to it none has learned to, and an order is chance
SEED_APART = 5.0  # points by which the seed that chose a learning rate lies outside the others: not the same outcome
NEAR = 1.0  # points that the hybrid may be below attention


def recall_verdicts(task: str, cells: list[Summary], width: int) -> list[str]:
    """What was to be reached, and whether it was; nothing of models that are missing, or not finished."""
    shown = [cell for cell in cells if cell.labels["width"] == width]
    ours = {cell.labels["model"]: values for cell in shown if cell.whole and (values := cell.values("test"))}
    said = _unfinished(shown)
    stated = document.RECALL.get(task, {}).get("deltanet")
    for model in ("deltanet", "gated_delta", "hybrid"):
        if model not in ours:
            continue
        if stated is not None:
            said.append(f"{model} {_reaches(ours[model], stated)}")
        if "linear_attention" in ours:
            other = ours["linear_attention"]
            higher = "above" if mean(ours[model]) > mean(other) else "not above"
            spreads = " (spreads overlap)" if overlap(ours[model], other) else ""
            said.append(f"{model} {higher} linear attention{spreads}")
    if "hybrid" in ours and "attention" in ours:
        above = mean(ours["hybrid"]) - mean(ours["attention"])
        near = "not more" if above >= -NEAR else "more"
        spreads = "spreads overlap" if overlap(ours["hybrid"], ours["attention"]) else "spreads apart"
        by = f"{abs(above):.1f} {'above' if above > 0 else 'below'}"
        said.append(f"hybrid {near} than {NEAR:g} point below attention ({by}, {spreads})")
    whole = [cell for cell in shown if cell.whole]
    return [*said, *_outside(task, whole), *_one_seed(whole), *diverged_verdicts(whole)]


def overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether any value of either lies between the lowest and the highest of the other's."""
    return min(one) <= max(other) and min(other) <= max(one)


def _outside(task: str, cells: list[Summary]) -> list[str]:
    """The document's figures that no spread of ours holds."""
    said = []
    for cell in cells:
        values, theirs = cell.values("test"), document.RECALL.get(task, {}).get(cell.labels["model"])
        if values and theirs is not None and not min(values) <= theirs <= max(values):
            by = mean(values) - theirs
            said.append(f"{theirs} for {cell.labels['model']} (ours {abs(by):.1f} {'higher' if by > 0 else 'lower'})")
    return [f"outside our spreads are the document's {', '.join(said)}"] if said else []


def _one_seed(cells: list[Summary]) -> list[str]:
    """The learning rates whose choice the other seeds do not bear out."""
    said = []
    for cell in cells:
        values, tests = cell.values("test"), cell.search[cell.lr]["tests"] if cell.lr is not None else {}
        if values and "test" in tests:
            there, low, high = tests["test"]["accuracy"], min(values), max(values)
            if not low - SEED_APART <= there <= high + SEED_APART:
                said.append(
                    f"the learning rate of {cell.labels['model']} was chosen on one seed: {there:.1f} there, "
                    f"{low:.1f} to {high:.1f} on the others"
                )
    return said


def _unfinished(cells: list[Summary]) -> list[str]:
    left = [cell.labels["model"] for cell in cells if not cell.whole]
    return [f"not finished: {', '.join(left)}"] if left else []


def _reaches(ours: Sequence[float], theirs: float) -> str:
    """Of a mean beside the accuracy of the document's DeltaNet."""
    words = "reaches" if mean(ours) >= theirs else f"stays {theirs - mean(ours):.1f} points below"
    within = ", within our spread" if min(ours) <= theirs <= max(ours) else ""
    return f"{words} the document's DeltaNet ({theirs}{within})"


def diverged_verdicts(cells: Sequence[Summary]) -> list[str]:
    """One sentence of what diverged with every learning rate and seed, and when; none where there is no such."""
    lost = [cell for cell in cells if cell.whole and _lost(cell) == len(cell.runs)]
    if not lost:
        return []
    names = " and of ".join(cell.labels.get("variant") or cell.labels["model"] for cell in lost)
    steps = [at for cell in lost for run in cell.runs if (at := diverged_at(run)) is not None]
    if not steps:  # a result whose message does not say
        return [f"every run of {names} diverged"]
    first, last = ([at[n] for at in steps] for n in (0, 1))
    return [f"every run of {names} diverged: not finite from {_steps(first)} on, ended at {_steps(last)}"]


def _steps(found: list[int]) -> str:
    low, high = min(found), max(found)
    return f"step {low}" if low == high else f"steps {low} to {high}"


def order_verdict(variants: Sequence[Summary | str], figure: Literal["perplexity", "recall"] = "perplexity") -> str:
    """Whether perplexities fall, or recall rises, in the order of the document's table, and which spreads overlap; of
    none while one is not finished, or not begun (its name alone). A variant whose runs all diverged is worse than any
    that did not."""
    cells = [cell for cell in variants if isinstance(cell, Summary) and cell.whole]
    if len(cells) < len(variants):
        left = [v if isinstance(v, str) else v.labels["variant"] for v in variants if v not in cells]
        return f"nothing is said of the order of {figure}, not finished: {', '.join(left)}"
    found: list[tuple[str, list[float]]] = []  # worst first in the document; the lower the better
    for cell in cells:
        values = (
            [-accuracy for accuracy in cell.values("recall")]
            if figure == "recall"
            else perplexity(cell.values("text", "loss"))
        )
        if not values and not cell.diverged:
            return ""
        found.append((cell.labels["variant"], values or [math.inf]))
    if len(found) < 2:
        return ""
    theirs = f"worst first: {_then(found)}"
    lost = [name for name, values in found if min(values) == math.inf]
    if len(lost) > 1:
        why = "diverged, or has a perplexity beyond all numbers"
        return f"{figure}: no order can be told ({theirs}): every run of {' and of '.join(lost)} {why}"
    if figure == "recall" and (nothing := unlearned(cells, ", ".join(name for name, _ in found))):
        return f"recall: no order is told, {nothing}"
    if all(overlap(one[1], other[1]) for one, other in combinations(found, 2)):
        return f"{figure}: no order can be told, all spreads overlap (the document's, {theirs})"
    ours = sorted(found, key=lambda item: -mean(item[1]))
    mixed = ", ".join(f"{a} and {b}" for (a, worse), (b, better) in pairwise(ours) if overlap(worse, better))
    spreads = f"spreads overlap: {mixed}" if mixed else "spreads do not overlap"
    if all(mean(worse) > mean(better) for (_, worse), (_, better) in pairwise(found)):
        return f"{figure}: the document's order holds{' by means' if mixed else ''} ({theirs}); {spreads}"
    if any(max(worse) < min(better) for (_, worse), (_, better) in combinations(found, 2)):
        return f"{figure}: the document's order ({theirs}) does not hold, ours is {_then(ours)}; {spreads}"
    return (
        f"{figure}: whether the document's order ({theirs}) holds cannot be told: by means ours is {_then(ours)}, "
        f"but {spreads}"
    )


def _then(found: Sequence[tuple[str, list[float]]]) -> str:
    return ", then ".join(name for name, _ in found)


def unlearned(cells: Sequence[Summary], names: str) -> str:
    """That none of some variants, called ``names``, learned recall; empty where one did."""
    means = [mean(values) for cell in cells if (values := cell.values("recall"))]
    if not means or max(means) >= LEARNED:
        return ""
    return f"none of {names} learned it in these steps (best mean {max(means):.1f} %)"


def stability_verdict(cells: list[Summary], norms: Mapping[str, tuple[float, str]]) -> str:
    """How many runs of each variant diverged, those of the search included, beside what the document says of it."""
    by_variant = {cell.labels["variant"]: cell for cell in cells}
    said = []
    for variant, (_, stated) in norms.items():
        if (cell := by_variant.get(variant)) is not None:
            said.append(f"{_lost(cell)} of {len(cell.runs)} with {variant} (the document: {stated})")
    return f"diverged runs, the search's among them: {', '.join(said)}" if said else ""


def _lost(cell: Summary) -> int:
    return sum(run["outcome"] == "diverged" for run in cell.runs)


def option_verdicts(cells: Sequence[Summary], base: Summary | None, longer: Sequence[str]) -> list[str]:
    """What the document says that each further option is good for, and whether ours bears it out, beside the layer
    without it. ``longer``: the tests of text at more tokens than were trained, the longest last."""
    if base is None or not base.whole:
        return ["nothing is said of the options: the layer without them is not finished"]
    said, judged = [], [cell for cell in cells if cell.labels["group"] in document.OPTIONS]
    for cell in judged:
        group = cell.labels["group"]
        claim = document.OPTIONS[group]
        if not cell.whole:
            said.append(f"nothing is said of {group}, not finished")
        elif not cell.values("text"):
            said.append(f"{group} (the document: {claim}): every run diverged: not borne out")
        else:
            figures = [f"perplexity {_beside(cell, base, 'text')}"]
            figures += [f"{test.removeprefix('text ')} {_beside(cell, base, test)}" for test in longer[-1:]]
            if group == "denominator":  # the one that is said to be for stability
                more, found = _by_stability(cell, base)
                figures.append(more)
            else:
                found = _by_length(cell, base, longer)
            said.append(f"{group} (the document: {claim}): {', '.join(figures)}: {found}")
    if all(cell.whole for cell in judged) and (nothing := unlearned([*judged, base], "these")):
        said.append(f"recall: {nothing}")
    return said


def _beside(cell: Summary, base: Summary, test: str) -> str:
    ours, without = perplexity(cell.values(test, "loss")), perplexity(base.values(test, "loss"))
    if not ours or not without:
        return "not known"
    better = "spreads overlap" if overlap(ours, without) else "better" if mean(ours) < mean(without) else "worse"
    return f"{mean(ours):.3f} against {mean(without):.3f} without it ({better})"


def _by_stability(cell: Summary, base: Summary) -> tuple[str, str]:
    """By the runs that diverged; where as many did, by the largest gradient norm, a rise of which is no stability."""
    norms = [max((n for run in c.finals if (n := run["training"].get("grad_norm_max"))), default=0.0)
             for c in (cell, base)]  # fmt: skip
    more = f"{_lost(cell)} of {len(cell.runs)} runs diverged against {_lost(base)} of {len(base.runs)}"
    more += f", largest gradient norm {norms[0]:.4g} against {norms[1]:.4g}"
    if _lost(cell) != _lost(base):
        return more, "borne out" if _lost(cell) < _lost(base) else "not borne out"
    return more, "not borne out" if norms[0] > norms[1] else "cannot be told, what it is to prevent was not seen"


def _by_length(cell: Summary, base: Summary, longer: Sequence[str]) -> str:
    """By the perplexity at the most tokens."""
    ours, without = (perplexity(c.values(longer[-1], "loss")) if longer else [] for c in (cell, base))
    if not ours or not without or overlap(ours, without):
        return "beyond the trained length it cannot be told"
    return f"beyond the trained length {'borne out' if mean(ours) < mean(without) else 'not borne out'}"

