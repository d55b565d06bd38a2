"""The report's plots, PNG files by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from dnsp.errors import UsageError
from dnsp.tasks import document
from dnsp.tasks.suite import MODELS, RECALL_WIDTH, Scale
from dnsp.tasks.summary import Result, Summary, perplexity, summaries
from dnsp.tasks.tables import by_position

COLOURS = dict(zip(MODELS, ("#4c4c4c", "#c7a76c", "#3b6fb6", "#2a9d72", "#b5446e"), strict=True))
SIZE = (6.4, 4.4)
SMOOTH = 4  # losses on either side that a curve's are the median of
Curve = Sequence[tuple[int, float]]  # steps and losses


def all_plots(
    results: Sequence[Result], scale: Scale, folder: Path, curves: Mapping[str, Curve] | None = None
) -> list[Path]:
    """Those for which there are results; returns the files. ``curves``: of the runs by name.

    Raises UsageError where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UsageError("plots need the matplotlib package: pip install 'dnsp[tasks]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    cells = summaries(results, scale)
    made: list[Path] = []

    def save(figure: Any, name: str) -> None:
        figure.tight_layout()
        figure.savefig(folder / f"{name}.png", dpi=150)
        pyplot.close(figure)
        made.append(folder / f"{name}.png")

    recall = [cell for cell in cells if cell.task in document.RECALL and cell.values("test")]
    if recall:
        figure, axes = pyplot.subplots(figsize=SIZE)
        _bars(axes, recall)
        save(figure, "recall")
    for task, unit in (("mqar", "pairs"), ("recall32k", "tokens")):
        own = [cell for cell in cells if cell.task == task]
        if own and any(_by_size(cell, unit) for cell in own):
            widths = sorted({cell.labels["width"] for cell in own})
            size = (SIZE[0] * len(widths) / 1.3, SIZE[1])
            figure, panels = pyplot.subplots(1, len(widths), figsize=size, sharey=True, squeeze=False)
            for axes, width in zip(panels[0], widths, strict=True):
                shown = [cell for cell in own if cell.labels["width"] == width]
                for cell in shown:
                    _line(axes, cell.labels["model"], _by_size(cell, unit))
                longest = max((n for cell in shown if (n := _longest_trained(cell, unit)) is not None), default=None)
                if longest is not None:
                    words = f"trained up to {longest:,} {unit}"
                    axes.axvline(longest, color="#999999", linewidth=0.8, linestyle="--", label=words)
                _finish(axes, f"{task}, width {width}", unit, "accuracy %")
            save(figure, task)
    speeds = [r["figures"] for r in results if r["kind"] == "speed" and "ranks" not in r["figures"]]
    if speeds:
        figure, axes = pyplot.subplots(figsize=SIZE)
        for model in MODELS:
            found = {f["context"]: [f["tokens_per_s"]] for f in speeds if f["name"] == model}
            _line(axes, model, found)
        for model, stated in document.SPEED.items():
            axes.plot(list(stated), list(stated.values()), ":", color=COLOURS[model], label=f"document: {model}")
        axes.set_yscale("log")
        _finish(axes, "inference, batch 1", "context, tokens", "tokens/s")
        save(figure, "speed")
    lm = [cell for cell in cells if cell.task == "lm"]
    if lm:
        lengths = sorted({cell.labels["length"] for cell in lm})
        size = (SIZE[0] * len(lengths) / 1.3, SIZE[1])
        figure, panels = pyplot.subplots(1, len(lengths), figsize=size, sharey=True, squeeze=False)
        for axes, length in zip(panels[0], lengths, strict=True):
            for cell in lm:
                if cell.labels["length"] == length:
                    _line(axes, cell.labels["model"], _by_position(cell))
            axes.axvline(length, color="#999999", linewidth=0.8, linestyle="--")
            _finish(axes, f"trained at {length:,} tokens", "position in the document", "held-out loss")
        save(figure, "lm")
    learned = _learned(cells, curves or {}, scale)
    if learned:
        size = (SIZE[0] * len(learned) / 1.5, SIZE[1])
        figure, panels = pyplot.subplots(1, len(learned), figsize=size, squeeze=False)
        for axes, (title, by_model) in zip(panels[0], learned.items(), strict=True):
            for model, own_curves in by_model.items():
                for n, curve in enumerate(own_curves):
                    steps, losses = zip(*_smoothed(curve), strict=True)
                    axes.plot(steps, losses, color=COLOURS[model], linewidth=0.9, label=None if n else model)
            said = f"training loss of each seed,\nrunning median of {2 * SMOOTH + 1} kept steps"
            _finish(axes, title, "step", said, log=False)
        save(figure, "learning")
    ablations = [cell for cell in cells if cell.task == "ablations" and cell.finals]
    if any(cell.values("text", "loss") for cell in ablations):
        figure, axes = pyplot.subplots(figsize=(SIZE[0], 0.35 * len(ablations) + 1.2))
        _ablations(axes, ablations)
        save(figure, "ablations")
    return made


def _by_size(cell: Summary, unit: str) -> dict[int, list[float]]:
    sizes = {int(test.split()[0].replace(",", "")): test for test in cell.tests if test.endswith(f" {unit}")}
    return {size: values for size, test in sorted(sizes.items()) if (values := cell.values(test))}


def _longest_trained(cell: Summary, unit: str) -> int | None:
    """The most pairs of a document, or tokens of a sequence, in training; None where the results do not say."""
    config = next((result["config"] for result in cell.finals if "config" in result), None)
    if config is None:
        return None
    if unit == "tokens":
        return max(stage["sequence_length"] for stage in config["train"].get("stages") or [config["data"]])
    pairs = [source.get("options", {}).get("pairs", []) for source in config["data"]["sources"]]
    return max((n for some in pairs for n in (some if isinstance(some, list) else [some])), default=None)


def _by_position(cell: Summary) -> dict[int, list[float]]:
    if not cell.tests:
        return {}
    test = cell.tests[-1]
    spans = {span for result in cell.finals for span in result["tests"].get(test, {}).get("by_position", {})}
    return {int(span.partition("-")[2]) + 1: by_position(cell, test, span)
            for span in sorted(spans, key=lambda span: int(span.partition("-")[0]))}  # fmt: skip


def _learned(cells: list[Summary], curves: Mapping[str, Curve], scale: Scale) -> dict[str, dict[str, list[Curve]]]:
    """Curves of the final seeds by panel and model: of a task at its usual width, of ``lm`` by length."""
    found: dict[str, dict[str, list[Curve]]] = {}
    for cell in cells:
        labels = cell.labels
        own = [curves[result["name"]] for result in cell.finals if result["name"] in curves]
        if own and labels.get("model") in COLOURS and labels.get("width") in (None, RECALL_WIDTH[scale]):
            title = f"{cell.task} at {labels['length']:,} tokens" if "length" in labels else cell.task
            found.setdefault(title, {})[labels["model"]] = own
    return found


def _smoothed(curve: Curve) -> Curve:
    """Each loss as the median of those around it."""
    return [
        (step, median(loss for _, loss in curve[max(0, at - SMOOTH) : at + SMOOTH + 1]))
        for at, (step, _) in enumerate(curve)
    ]


def _line(axes: Any, model: str, values: dict[int, list[float]]) -> None:
    """Mean, with a band from the lowest to the highest seed."""
    if not values:
        return
    at = sorted(values)
    axes.plot(at, [mean(values[x]) for x in at], "o-", color=COLOURS[model], label=model, markersize=3)
    axes.fill_between(at, [min(values[x]) for x in at], [max(values[x]) for x in at], color=COLOURS[model], alpha=0.2)


def _finish(axes: Any, title: str, x: str, y: str, log: bool = True) -> None:
    if log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: _power(x))
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if axes.get_legend_handles_labels()[0]:
        # below, where no data are
        axes.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    axes.grid(alpha=0.3)


def _power(x: float) -> str:
    """512, 32k, 1M: powers of two as people write them."""
    return f"{x / 2**20:g}M" if x >= 2**20 else f"{x / 2**10:g}k" if x >= 2**10 else f"{x:g}"


def _bars(axes: Any, cells: list[Summary]) -> None:
    """Accuracy by task and model, the document's as a line across the bar."""
    widths = {cell.labels["width"] for cell in cells}
    shown = 128 if 128 in widths else max(widths)
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    step = 0.8 / len(MODELS)
    for cell in cells:
        if cell.labels["width"] != shown:
            continue
        model, values = cell.labels["model"], cell.values("test")
        x = tasks.index(cell.task) + step * (MODELS.index(model) - (len(MODELS) - 1) / 2)
        centre = mean(values)
        axes.bar(x, centre, step, color=COLOURS[model], label=model if cell.task == tasks[0] else None)
        axes.errorbar(x, centre, yerr=[[centre - min(values)], [max(values) - centre]], color="black", capsize=2)
        if model in document.RECALL[cell.task]:
            axes.hlines(document.RECALL[cell.task][model], x - step / 2, x + step / 2, color="black", linestyle=":")
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylabel("accuracy %, dotted: the document's")
    axes.set_title(f"recall, width {shown}", fontsize=9)
    axes.legend(fontsize=7, ncols=len(MODELS), loc="upper center", bbox_to_anchor=(0.5, -0.08))


def _ablations(axes: Any, cells: list[Summary]) -> None:
    """Perplexity of each variant, one below the other; in words where no seed has any."""
    for at, cell in enumerate(cells):
        if values := perplexity(cell.values("text", "loss")):
            centre = mean(values)
            ends = [[centre - min(values)], [max(values) - centre]]
            axes.errorbar([centre], [at], xerr=ends, fmt="o", color=COLOURS["deltanet"], capsize=3)
        else:  # at the worse end, whatever the scale
            axes.text(0.98, at, "diverged", transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=7,
                      color="#b03030")  # fmt: skip
    names = [f"{cell.labels['group']}: {cell.labels['variant']}" for cell in cells]
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(alpha=0.3, axis="x")
    axes.set_xlabel("perplexity a byte, mean and range over seeds")
