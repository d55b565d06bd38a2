"""``dnsp bench plot``: what ``bench delta``, ``train`` and ``scan`` wrote with ``--json``, as one picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dnsp.bench import scan_peers
from dnsp.errors import UsageError

# who a bar is of, as a reader knows them, and its colour
SIDES = {
    "dnsp": ("dnsp", "#3b6fb6"),
    "flash-qla": ("FlashQLA", "#c7a76c"),
    "fla": ("fla", "#9a9a9a"),
    "transformers": ("transformers + fla", "#9a9a9a"),
    "peer": ("peer", "#3b6fb6"),
    "p2p": ("p2p", "#2a9d72"),
    "gather": ("gather", "#c7a76c"),
    scan_peers.NAMES["contiguous"]: ("fla, context parallel", "#9a9a9a"),
    scan_peers.NAMES["zigzag"]: ("fla, context parallel", "#9a9a9a"),
    scan_peers.ULYSSES: ("fla, heads exchanged", "#5c5c5c"),
}
OTHER = "#6b6b6b"
GAP = 0.6  # between the rows, in bars
NARROW = 0.2  # of the longest bar: a shorter one has its figure beside it


class Bar(NamedTuple):
    """One measurement: ``row`` is what was measured, on ``tokens`` in all, and ``side`` who."""

    tokens: int
    row: str
    side: str
    value: float


class Panel(NamedTuple):
    """Bars of one unit; ``mark`` is the value that they are held against."""

    title: str
    bars: list[Bar]
    mark: float | None = None


def plot(files: Sequence[Path], out: Path) -> int:
    """Draw every panel that the files have bars for into ``out``: PNG, SVG or PDF, by its ending.

    Raises UsageError for a file that no benchmark wrote, for files with nothing to draw, and without matplotlib.
    """
    drawn = [panel for panel in panels(files) if panel.bars]
    if not drawn:
        raise UsageError(f"{', '.join(map(str, files))}: nothing to draw; give what bench delta, train or scan wrote")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("plots need the matplotlib package: pip install 'dnsp[tasks]'") from None
    height = max(len(panel.bars) + GAP * len({bar.row for bar in panel.bars}) for panel in drawn)
    figure = Figure(figsize=(4.4 * len(drawn), 0.2 * height + 0.6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        _draw(axes, panel, height)
    try:
        figure.savefig(out, dpi=120)
    except (OSError, ValueError) as error:
        raise UsageError(f"--out {out} cannot be written: {error}") from None
    print(f"{out}: {'; '.join(panel.title for panel in drawn)}")
    return 0


def panels(files: Sequence[Path]) -> list[Panel]:
    """The bars that the files hold, short sequences first; a benchmark that has no panel is left out."""
    delta = Panel("delta rule, forward + backward: time over dnsp's", [], mark=1.0)
    train = Panel("a training step: thousand tokens/s", [])
    scan = Panel("delta rule over ranks: % of the ideal", [], mark=100.0)
    for file in dict.fromkeys(files):
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise UsageError(f"{file}: {error}; give what dnsp bench wrote with --json") from None
        kinds = set(found) if isinstance(found, dict) else set()
        if {"shapes", "kernels"} <= kinds:  # bench decode has shapes as well, in other units
            delta.bars.extend(_delta(found))
        elif {"ours", "rows", "tokens"} <= kinds:
            train.bars.extend(_train(found))
        elif {"worlds", "value_heads"} <= kinds:
            scan.bars.extend(_scan(found))
        elif not kinds & {"shapes", "worlds", "first_calls"}:
            raise UsageError(f"{file} holds no benchmark; give what dnsp bench wrote with --json")
    return [panel._replace(bars=sorted(panel.bars, key=lambda bar: bar.tokens)) for panel in (delta, train, scan)]


def _delta(found: dict[str, Any]) -> list[Bar]:
    bars = []
    for entry in found["shapes"]:
        ended = {side["name"]: side["passes"].get("training", {}) for side in entry["sides"]}
        times = {name: figures["ms"] for name, figures in ended.items() if "ms" in figures}  # the others failed
        if times.keys() & SIDES.keys() > {"dnsp"}:
            row, tokens = shape_name(entry["shape"]), entry["shape"]["batch"] * entry["shape"]["tokens"]
            bars += [Bar(tokens, row, side, ms / times["dnsp"]) for side, ms in times.items() if side in SIDES]
    return bars


def shape_name(shape: dict[str, Any]) -> str:
    """A shape of ``bench delta`` in short: rows, tokens, heads, and what is not the usual."""
    rows = "" if shape["batch"] == 1 else f"{shape['batch']} x "
    said = [f"{rows}{shape['tokens']:,}", f"{shape['key_heads']}/{shape['value_heads']}"]
    if shape["decay"] != "logsigmoid":
        said.append(f"decay {shape['decay']}")
    if not shape["l2norm"]:
        said.append("normalised before")
    if shape["segment_tokens"] is not None:
        said.append(f"segments of {shape['segment_tokens']:,}")
    if shape["documents"] > 1:
        said.append(f"{shape['documents']} documents")
    return ", ".join(said)


def _train(found: dict[str, Any]) -> list[Bar]:
    tokens = found["rows"] * found["tokens"]
    sides = [side for side in (found["ours"], found["peer"]) if side and "tokens_per_s" in side]
    return [Bar(tokens, f"{tokens:,} tokens", side["name"], side["tokens_per_s"] / 1e3) for side in sides]


def _scan(found: dict[str, Any]) -> list[Bar]:
    """With a GPU each the ideal is the local shard's time; on one GPU, one process's on all tokens."""
    bars = []
    for world in found["worlds"]:
        ideal = world["local shard" if world["sharing"] == 1 else "one process"]["ms"]
        place = f"{found['tokens']:,}, {world['ranks']} {'GPUs' if world['sharing'] == 1 else 'ranks on one GPU'}"
        times = [(f"{place}, {way['layout']}", way["transport"], way["ms"]) for way in world["ways"]]
        layout = {name: f", {kind}" for kind, name in scan_peers.NAMES.items()}  # the exchange of heads has none
        times += [(place + layout.get(peer["name"], ""), peer["name"], peer["ms"]) for peer in world["peers"]]
        bars += [Bar(found["tokens"], row, side, 100 * ideal / ms) for row, side, ms in times]
    return bars


def _draw(axes: Any, panel: Panel, height: float) -> None:
    """Horizontal bars, those of a row together, on an axis of ``height`` bars."""
    at, ticks, named = 0.0, {}, set()
    longest = max(bar.value for bar in panel.bars)
    for row in dict.fromkeys(bar.row for bar in panel.bars):
        first = at
        for bar in (bar for bar in panel.bars if bar.row == row):
            name, colour = SIDES.get(bar.side, (bar.side, OTHER))
            axes.barh(at, bar.value, color=colour, label=None if name in named else name)
            beside = bar.value < NARROW * longest
            side, ink = ("left", "#333333") if beside else ("right", "white")
            axes.text(bar.value, at, f" {bar.value:.3g} ", va="center", ha=side, fontsize=7, color=ink)
            named.add(name)
            at += 1.0
        ticks[row] = (first + at - 1.0) / 2
        at += GAP
    axes.set_yticks(list(ticks.values()), list(ticks), fontsize=8)
    axes.set_ylim(height - GAP, -GAP - 0.4)
    if panel.mark is not None:
        axes.axvline(panel.mark, color="#333333", linewidth=0.8, linestyle="--")
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title(panel.title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.04), ncols=min(3, len(named)))
