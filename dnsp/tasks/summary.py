"""The runs of each cell of the suite, put together from the result files; tables, sentences and plots use them."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

from dnsp.tasks.queue import chosen_rate
from dnsp.tasks.suite import ABLATIONS, FINAL_SEEDS, MODELS, NAMES, SEARCH_SEED, VALIDATION, Scale, learning_rates

Result = dict[str, Any]
ABLATION_ORDER = {variant: n for n, (_, variant, _) in enumerate(ABLATIONS)}
LARGEST = 700.0  # nats whose exponential is a number
DIVERGED_AT = re.compile(r"at step (\d+)[^(]*\((?:once|(\d+) times in a row)\)")  # in the message of dnsp.train


@dataclass
class Summary:
    """A cell of the suite, from its runs."""

    task: str
    cell: str
    labels: dict[str, Any]
    search: dict[float, Result]  # by learning rate, on the first seed
    lr: float | None  # chosen; None while the search is not finished
    finals: list[Result]  # of the chosen rate, by seed
    wanted: int  # seeds that there are to be
    tests: list[str] = field(default_factory=list)

    def values(self, test: str, figure: str = "accuracy") -> list[float]:
        """One of each final seed that did not diverge."""
        return [result["tests"][test][figure] for result in self.finals if test in result["tests"]]

    @property
    def whole(self) -> bool:
        """Whether all its seeds are there."""
        return len(self.finals) == self.wanted

    @property
    def diverged(self) -> int:
        return sum(result["outcome"] == "diverged" for result in self.finals)

    @property
    def runs(self) -> list[Result]:
        """Those of the search and the final ones, each once: at one scale they share a seed."""
        return list({(run["lr"], run["seed"]): run for run in [*self.search.values(), *self.finals]}.values())


def diverged_at(result: Result) -> tuple[int, int] | None:
    """Of a run that diverged the first step of those in a row that were not finite, and the step that it ended at;
    None where its message does not say."""
    found = DIVERGED_AT.search(result.get("message", ""))
    return None if found is None else (int(found[1]) - int(found[2] or 1) + 1, int(found[1]))


def summaries(results: Iterable[Result], scale: Scale) -> list[Summary]:
    """The cells of all results, each with the learning rate that its search chose."""
    by_cell: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        if result["kind"] == "train":
            by_cell[result["task"], result["cell"]].append(result)
    found = []
    for (task, cell), runs in by_cell.items():
        search = {run["lr"]: run for run in runs if run["seed"] == SEARCH_SEED}
        choose = "loss" if task in ("ablations", "lm") else "accuracy"
        searched = len(search) == len(learning_rates(task, scale))
        lr = chosen_rate(list(search.values()), choose) if searched else None
        seeds = FINAL_SEEDS[scale]
        finals = sorted((r for r in runs if r["lr"] == lr and r["seed"] in seeds), key=lambda r: r["seed"])
        tests = list(runs[0]["tests"]) or next((list(r["tests"]) for r in runs if r["tests"]), [])
        found.append(
            Summary(task, cell, runs[0]["labels"], dict(sorted(search.items())), lr, finals, len(seeds), tests)
        )
    order = {name: n for n, name in enumerate(NAMES)}
    return sorted(found, key=lambda s: (order[s.task], *_label_order(s.labels), s.cell))


def asked(cells: Sequence[Summary]) -> list[str]:
    """The tests behind the choice of the learning rate, by name; a cell whose runs all diverged knows of none."""
    tests = next((cell.tests for cell in cells if cell.tests), [])
    return [test for test in tests if test != VALIDATION]


def _label_order(labels: dict[str, Any]) -> tuple[Any, ...]:
    """As the suite has them: ablations from the document's worst to its best."""
    model, group = labels.get("model"), labels.get("group")
    if group is not None:
        return [name for name, _, _ in ABLATIONS].index(group), ABLATION_ORDER.get(labels["variant"], len(ABLATIONS)), 0
    return labels.get("width", 0), labels.get("length", 0), MODELS.index(model) if model in MODELS else len(MODELS)


def spread(values: Sequence[float], digits: int = 1) -> str:
    """``mean (lowest to highest)``; of one value itself."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def deviation(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def perplexity(losses: Sequence[float]) -> list[float]:
    return [math.exp(loss) if loss < LARGEST else math.inf for loss in losses]  # of no number too
