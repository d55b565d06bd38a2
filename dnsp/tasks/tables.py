"""What a report says of the trained tasks, as tables, from the result files alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, Literal

from dnsp.config import LayerKind, ModelConfig
from dnsp.tasks import document
from dnsp.tasks.suite import MODELS, NAMES, RECALL, SEARCH_SEED, VALIDATION, Scale
from dnsp.tasks.summary import Result, Summary, asked, deviation, perplexity, spread
from dnsp.tasks.verdicts import diverged_verdicts, option_verdicts, order_verdict, recall_verdicts, stability_verdict

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
SMOKE = "scale smoke: sizes far below the document's, not to be compared with it"


@dataclass
class Table:
    """Cells are text, a number, or None for what is not there. ``note``, of one sentence a line, stands below."""

    name: str  # of its CSV file
    title: str
    columns: list[str]
    rows: list[list[Any]]
    note: str = ""


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
    verdict = "\n".join(recall_verdicts(task, cells, shown)) if scale == "full" else SMOKE
    tables = [Table(task, f"{TITLES[task]}, width {shown}", columns, rows, verdict)]
    tests = asked(cells)
    if len(tests) > 1 or len(widths) > 1:
        rows = [
            [cell.labels["model"], cell.labels["width"], *(spread(cell.values(test)) for test in tests)]
            for cell in cells
        ]
        names = [_of_test(task, scale) if test == "test" else test for test in tests]
        tables.append(Table(f"{task}-all", f"{TITLES[task]}, accuracy % by size", ["model", "width", *names], rows))
    return tables


def _of_test(task: str, scale: Scale) -> str:
    """What the first test of a recall task asks: it is unpacked, so that its numbers of pairs come equally often."""
    pairs = RECALL[task][scale]["tests"]["test"][0]
    if pairs is None:
        return "as trained"
    return f"{pairs[0]} to {pairs[-1]} pairs" if isinstance(pairs, list) else f"{pairs} pairs"


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
        note = "\n".join([*filter(None, notes), *diverged_verdicts(picked)]) if scale == "full" else SMOKE
        tables.append(Table(f"ablation-{group}", title, ["variant", *own, *theirs], rows, note))
    others = [cell for cell in cells if cell.labels["group"] not in ("beta", "norm", "base")]
    if others:
        others += [base] if base is not None else []
        rows = [[cell.labels["group"] + ": " + cell.labels["variant"], *row(cell)[1:]] for cell in others]
        note = "\n".join([*option_verdicts(others, base, longer), *diverged_verdicts(others)])
        title = "Ablation: what else the layer offers"
        tables.append(Table("ablation-others", title, ["variant", *own], rows, note if scale == "full" else SMOKE))
    return tables


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


def models_table(results: Iterable[Result]) -> Table:
    """Layers, heads and convolutions of the models, and their parameters: one row for tasks that have the same, and
    for all ablations, whose options change the parameters a little."""
    counts: dict[tuple[Any, ...], set[int]] = defaultdict(set)
    for result in results:
        if result["kind"] == "train" and "config" in result:
            model = ModelConfig.model_validate(result["config"]["model"])
            kinds = list(dict.fromkeys(model.layers))
            heads = {kind: _heads(model, kind) for kind in kinds}
            described = (
                result["labels"].get("model", result["task"]),
                model.hidden_size,
                ", ".join(f"{model.layers.count(kind)} {kind}" for kind in kinds),
                "; ".join(f"{kind} {text}" for kind, text in heads.items()) if len(kinds) > 1 else heads[kinds[0]],
                "; ".join(f"{kind} {taps}" for kind in kinds if (taps := _taps(model, kind))),
            )
            counts[result["task"], *described] |= {result["training"].get("parameters")} - {None}
    tasks: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for (task, *same), found in sorted(counts.items(), key=lambda item: NAMES.index(item[0][0])):
        ends = [f"{count:,}" for count in sorted({min(found), max(found)})] if found else []
        tasks[(*same, " to ".join(ends))].append(task)
    order = {model: n for n, model in enumerate(MODELS)}
    rows = [[model, ", ".join(names), *more] for (model, *more), names in tasks.items()]
    rows.sort(key=lambda row: (row[2], order.get(row[0], len(order))))
    columns = ["model", "tasks", "width", "layers", "heads and their width", "convolution taps", "parameters"]
    return Table("models", "The models", columns, rows)


def _heads(model: ModelConfig, kind: LayerKind) -> str:
    if kind == "gated_delta":
        keys = f"{model.linear_num_key_heads} of keys of {model.linear_key_head_dim}"
        return f"{keys}, {model.linear_num_value_heads} of values of {model.linear_value_head_dim}"
    if kind == "attention":
        shared = model.num_key_value_heads
        fewer = f", {shared} of keys and values" if shared != model.num_attention_heads else ""
        return f"{model.num_attention_heads} of {model.head_dim}{fewer}"
    options = model.deltanet  # linear attention has its heads
    width = options.head_dim or model.hidden_size // options.num_heads
    values = options.value_head_dim or width
    return f"{options.num_heads} of {width}" + (f" by {values}" if values != width else "")


def _taps(model: ModelConfig, kind: LayerKind) -> int:
    """Of a layer's short convolution; 0 for none."""
    if kind == "gated_delta":
        return model.linear_conv_kernel_dim
    return 0 if kind == "attention" else model.deltanet.conv_size
