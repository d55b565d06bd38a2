"""What a report says, as tables, from the result files alone; long because every trained task's are here."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any, Literal

from dnsp.tasks import document
from dnsp.tasks.queue import chosen_rate
from dnsp.tasks.suite import (
    ABLATIONS,
    FINAL_SEEDS,
    MODELS,
    NAMES,
    SEARCH_SEED,
    VALIDATION,
    Scale,
    learning_rates,
)  # fmt: skip

TITLES = {
    "kv": "Key-value retrieval",
    "copy": "Copy",
    "mqar": "Multi-query associative recall",
    "recall32k": "In-context recall at up to 32,768 tokens",
    "ablations": "Ablations",
    "speed": "Inference at batch 1",
    "lm": "Language modelling",
    "pitfalls": "Pitfalls",
}
Result = dict[str, Any]
ABLATION_ORDER = {variant: n for n, (_, variant, _) in enumerate(ABLATIONS)}


LARGEST = 700.0  # nats whose exponential is a number
SMOKE = "scale smoke: sizes far below the document's, not to be compared with it"


@dataclass
class Table:
    """Cells are text, a number, or None for what is not there. ``note`` stands below."""

    name: str  # of its CSV file
    title: str
    columns: list[str]
    rows: list[list[Any]]
    note: str = ""


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


def recall_tables(task: str, cells: list[Summary], scale: Scale = "full") -> list[Table]:
    """Accuracy beside the document's; for several widths or tests one more table with all of them."""
    stated = document.RECALL.get(task, {})
    widths = sorted({cell.labels["width"] for cell in cells})
    shown = 128 if 128 in widths else widths[-1]
    rows = []
    for cell in cells:
        if cell.labels["width"] != shown:
            continue
        values, theirs = cell.values("test"), stated.get(cell.labels["model"])
        rows.append([
            cell.labels["model"], spread(values), deviation(values), theirs,
            mean(values) - theirs if values and theirs is not None else None, cell.lr, f"{len(cell.finals)} of "
            f"{cell.wanted}", cell.diverged,
        ])  # fmt: skip
    columns = ["model", "accuracy %", "deviation", "document", "difference", "learning rate", "seeds", "diverged"]
    verdict = "; ".join(recall_verdicts(task, cells, shown)) if scale == "full" else SMOKE
    tables = [Table(task, f"{TITLES[task]}, width {shown}", columns, rows, verdict)]
    tests = asked(cells)
    if len(tests) > 1 or len(widths) > 1:
        rows = [
            [cell.labels["model"], cell.labels["width"], *(spread(cell.values(test)) for test in tests)]
            for cell in cells
        ]
        names = ["as trained" if test == "test" else test for test in tests]
        tables.append(Table(f"{task}-all", f"{TITLES[task]}, accuracy % by size", ["model", "width", *names], rows))
    return tables


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


def ablation_tables(cells: list[Summary], scale: Scale = "full") -> list[Table]:
    by_variant = {cell.labels["variant"]: cell for cell in cells}
    base = next((cell for cell in cells if cell.labels["group"] == "base"), None)
    longer = [test for test in asked(cells) if test.startswith("text at")]

    def row(cell: Summary) -> list[Any]:
        return [
            cell.labels["variant"],
            spread(perplexity(cell.values("text", "loss")), 3),
            spread(cell.values("recall")),
            *(spread(perplexity(cell.values(test, "loss")), 3) for test in longer),
            max((norm for r in cell.finals if (norm := r["training"].get("grad_norm_max"))), default=None),
            cell.lr,
            f"{len(cell.finals)} of {cell.wanted}",
            cell.diverged,
        ]

    own = ["perplexity a byte", "recall %", *(f"perplexity {test.removeprefix('text ')}" for test in longer),
           "largest gradient norm", "learning rate", "seeds", "diverged"]  # fmt: skip
    tables = []
    norms = document.NORM | document.NORM_SCALED

    def order(names: Iterable[str], figure: Literal["perplexity", "recall"] = "perplexity") -> str:
        return order_verdict([by_variant.get(name, name) for name in names], figure)

    for group, title, stated, notes in (
        ("beta", "Ablation: write strength", document.BETA, [order(document.BETA), order(document.BETA, "recall")]),
        (
            "norm",
            "Ablation: norm of queries and keys",
            norms,
            [order(document.NORM), order(document.NORM_SCALED), stability_verdict(cells, norms)],
        ),
    ):
        picked = [cell for cell in cells if cell.labels["group"] == group]
        if not picked:
            continue
        picked += [base] if base is not None else []
        theirs = ["document's perplexity", "document's recall %" if group == "beta" else "document's stability"]
        rows = [[*row(cell), *stated.get(cell.labels["variant"], (None, None))] for cell in picked]
        note = "; ".join(filter(None, notes)) if scale == "full" else SMOKE
        tables.append(Table(f"ablation-{group}", title, ["variant", *own, *theirs], rows, note))
    others = [cell for cell in cells if cell.labels["group"] not in ("beta", "norm", "base")]
    if others:
        others += [base] if base is not None else []
        rows = [[cell.labels["group"] + ": " + cell.labels["variant"], *row(cell)[1:]] for cell in others]
        tables.append(Table("ablation-others", "Ablation: what else the layer offers", ["variant", *own], rows))
    return tables


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


def lm_tables(cells: list[Summary]) -> list[Table]:
    tests = asked(cells)
    rows = [
        [cell.labels["model"], cell.labels["length"], *(spread(cell.values(test, "loss"), 4) for test in tests),
         cell.lr, f"{len(cell.finals)} of {cell.wanted}", cell.diverged]
        for cell in cells
    ]  # fmt: skip
    columns = ["model", "trained at", *(f"loss at {test}" for test in tests), "learning rate", "seeds", "diverged"]
    tables = [Table("lm", "Language modelling: held-out loss, nats a token", columns, rows)]
    if not tests:
        return tables
    spans: list[str] = []
    for cell in cells:
        for result in cell.finals:
            spans += [span for span in result["tests"].get(tests[-1], {}).get("by_position", {}) if span not in spans]
    spans.sort(key=lambda span: int(span.partition("-")[0]))
    rows = [
        [
            cell.labels["model"],
            cell.labels["length"],
            *(spread(by_position(cell, tests[-1], span), 4) for span in spans),
        ]
        for cell in cells
    ]
    title = f"Held-out loss by position in the document, at {tests[-1]} the training length"
    tables.append(Table("lm-by-position", title, ["model", "trained at", *spans], rows))
    return tables


def by_position(cell: Summary, test: str, span: str) -> list[float]:
    found = (result["tests"].get(test, {}).get("by_position", {}).get(span) for result in cell.finals)
    return [value for value in found if value is not None]


def search_table(cells: list[Summary]) -> Table:
    """Every run of every search, by the figure that chose."""
    rates = sorted({lr for cell in cells for lr in cell.search})

    def shown(cell: Summary, lr: float) -> Any:
        if lr not in cell.search:
            return None
        figures = cell.search[lr]["tests"].get(VALIDATION)
        if figures is None:
            return "diverged"
        if cell.task in ("ablations", "lm"):
            return f"loss {figures['loss']:.4f}"
        return f"{figures['accuracy']:.1f} %"

    rows = [[cell.task, cell.cell, *(shown(cell, lr) for lr in rates), cell.lr] for cell in cells]
    columns = ["task", "run", *(f"{lr:g}" for lr in rates), "chosen"]
    title = f"Search of the learning rate, validation on seed {SEARCH_SEED}"
    return Table("search", title, columns, rows, _shorter_searches(cells))


def _shorter_searches(cells: Sequence[Summary]) -> str:
    """Which tasks were searched in fewer steps than they were trained."""
    found: dict[str, str] = {}
    for cell in cells:
        if cell.search and cell.finals:
            searched, trained = (
                max(run["training"].get("steps", 0) for run in runs) for runs in (cell.search.values(), cell.finals)
            )
            if searched < trained:
                found[cell.task] = f"{cell.task} was searched in {searched:,} of its {trained:,} steps"
    return "; ".join(found.values())


def configuration_table(results: Iterable[Result]) -> Table:
    """What the runs of each task and size have in common, and what they were searched over."""
    by_size: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for result in results:
        if result["kind"] == "train" and "config" in result:
            width = result["config"]["model"]["hidden_size"]
            by_size[NAMES.index(result["task"]), width, *_lengths(result)].append(result)
    rows = []
    for (task, width, *lengths), runs in sorted(by_size.items(), key=lambda item: item[0]):
        longest = max(runs, key=lambda run: run["config"]["train"].get("steps") or 0)  # a search's may be shorter
        model, train = runs[0]["config"]["model"], longest["config"]["train"]
        sources = [" ".join([s["path"], *(f"{k}={v}" for k, v in s.get("options", {}).items())])
                   for s in runs[0]["config"]["data"]["sources"]]  # fmt: skip
        rows.append([
            NAMES[task], width, model["num_hidden_layers"], model["vocab_size"], "; ".join(sources),
            ", ".join(map(str, lengths)), _sequences(train), max(run["training"]["steps"] for run in runs),
            train["warmup_steps"], ", ".join(f"{lr:g}" for lr in sorted({run["lr"] for run in runs})),
            runs[0]["config"]["engine"]["dtype"],
        ])  # fmt: skip
    columns = ["task", "width", "layers", "vocabulary", "data", "length", "sequences a step", "steps", "warm-up",
               "learning rates", "dtype"]  # fmt: skip
    note = "every setting is in config.yaml of each run's folder"
    return Table("configuration", "What was trained", columns, rows, note)


def _sequences(train: dict[str, Any]) -> str:
    """Of a step, stage by stage where they differ."""
    batches = [stage.get("global_batch") or train["global_batch"] for stage in train.get("stages") or [train]]
    return ", ".join(map(str, batches if len(set(batches)) > 1 else batches[:1]))


def _lengths(result: Result) -> list[int]:
    """Tokens of a sequence, stage by stage."""
    stages = result["config"]["train"].get("stages") or [result["config"]["data"]]
    return [stage["sequence_length"] for stage in stages]
