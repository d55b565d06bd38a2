"""What the documentation names exists, and its figures are the measured ones: keys with defaults, commands, tables."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel
from typer.main import get_command

from dnsp.bench.plots import shape_name
from dnsp.cli import app
from dnsp.config import Config

ROOT = Path(__file__).resolve().parents[2]


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, default); a list of mappings gives its own key and those of its entries."""
    for name, field in section.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not inner or inner[0] is not field.annotation:
            default = "required" if field.is_required() else field.get_default(call_default_factory=True)
            yield prefix + name, default
        for kind in inner:
            yield from keys(kind, f"{prefix}{name}.")


def test_every_configuration_key_is_described_with_its_default() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) \|", (ROOT / "docs" / "configuration.md").read_text(), re.MULTILINE)
    documented = {key: None if text == "none" else yaml.safe_load(text) for key, text in rows}
    known = dict(keys(Config))
    assert documented.keys() == known.keys()
    for key, default in known.items():
        if key == "resume":
            assert default == "none"
        elif key != "data.sources":
            said = float(documented[key]) if isinstance(default, float) else documented[key]
            assert said == (list(default) if isinstance(default, tuple) else default), key


def test_the_readme_names_every_command_and_only_those() -> None:
    text = (ROOT / "README.md").read_text()
    commands = {name for name, command in get_command(app).commands.items() if not command.hidden}  # type: ignore[attr-defined]
    assert set(re.findall(r"\bdnsp ([a-z]+)", text)) == commands
    linked = re.findall(r"\]\(([^)#:]+)\)", text)
    assert linked and all((ROOT / path).exists() for path in linked)


def table_rows(heading: str, page: str = "README.md") -> list[list[str]]:
    """The cells of the page's table whose heading row begins so, without bold."""
    lines = (ROOT / page).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading}"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    return [[cell.strip().replace("*", "") for cell in row.strip("|").split("|")] for row in rows]


def measured(pattern: str) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted((ROOT / "docs" / "measured").glob(pattern))]


def test_the_readmes_figures_of_the_delta_rule_are_those_measured() -> None:
    said = {row[0]: row[1:] for row in table_rows("tokens, key / value heads")}
    found = {}
    for file in measured("delta*.json"):
        for entry in file.get("shapes", []):
            sides = {side["name"]: side for side in entry["sides"]}
            order = [sides[name] for name in ("dnsp", "flash-qla", "fla")]
            passes = [[f"{side['passes'][way]['ms']:.2f}" for side in order] for way in ("forward", "training")]
            memory = [f"{side['peak_mib']:,.0f}" for side in order]
            found[shape_name(entry["shape"])] = [", ".join(cell) for cell in (*passes, memory)]
    assert said == found


def test_the_readmes_figures_of_training_and_of_two_gpus_are_those_measured() -> None:
    train = {f"{file['tokens']:,}": file for file in measured("train-*.json")}
    for tokens, *cells in table_rows("tokens | dnsp, tokens/s"):
        if tokens in train:
            sides = [side for side in (train[tokens]["ours"], train[tokens]["peer"]) if side]
            own = [(f"{s['tokens_per_s']:,.0f}", f"{s['mfu']:.2f}", f"{s['activation_gib']:.1f} GiB") for s in sides]
            assert list(filter(None, cells)) == [figure for side in own for figure in side]
    scan = {f"{file['tokens']:,}": file["worlds"][0] for file in measured("scan-2-gpus-*.json")}
    rows = table_rows("tokens in all | a half alone")
    assert {row[0] for row in rows} == scan.keys()
    for tokens, *cells in rows:
        half = scan[tokens]["local shard"]["ms"]
        ways = {(way["layout"], way["transport"]): way["ms"] for way in scan[tokens]["ways"]}
        peer = [ways["contiguous", "peer"], ways["zigzag", "peer"]]
        others = [ways["contiguous", "p2p"], ways["contiguous", "gather"]]
        peers = {side["name"]: side["ms"] for side in scan[tokens]["peers"]}
        others += [peers["fla's context parallelism"], peers["head all-to-all, fla's kernels"]]
        assert cells == [
            f"{half:.2f} ms", *(f"{ms:.2f} ms, {100 * half / ms:.1f} %" for ms in peer),
            *(f"{ms:.2f} ms" for ms in others),
        ]  # fmt: skip


def test_the_figures_of_several_ranks_are_those_measured() -> None:
    def by_layout(ways: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [way for way in ways if way["transport"] == "peer"]

    found: dict[str, list[str]] = {}
    hops = []
    for world in measured("scan-1-gpu-*.json")[0]["worlds"]:
        one, shard, ways = world["one process"], world["local shard"], by_layout(world["ways"])
        many = f"{world['ranks']} ranks"
        found[f"delta rule, {many} on one GPU, over one process"] = [f"{way['ms'] / one['ms']:.3f}" for way in ways]
        spans = [f"{way['makespan_ms'] / shard['alone_ms']:.3f}" for way in ways]
        found[f"replayed makespan of {many} over the local shard"] = spans
        hops.append(f"{ways[0]['hop_us']:.1f}")
    del found["replayed makespan of 4 ranks over the local shard"]  # no aim is set for it
    found["a hop, us: of 2, 4, 8 ranks"] = [", ".join(hops), ""]
    for part in measured("attention-1-gpu-*.json")[0]["worlds"][0]["widths"]:
        one, zigzag = (way["both_ms"] for way in part["ways"][:2])
        name = f"attention, heads of {part['width']}, 4 ranks on one GPU, over one process"
        found[name] = ["", f"{zigzag / one:.3f}"]
    one, *stacks = (way["ms"] for way in measured("stack-1-gpu-*.json")[0]["worlds"][0]["ways"])
    name = "three delta-rule layers and one of attention, whole, 4 ranks on one GPU, over one process"
    found[name] = [f"{ms / one:.3f}" for ms in stacks]
    for file in measured("scan-2-gpus-*.json"):
        world, where = file["worlds"][0], f"{file['tokens']:,} tokens on two H200s"
        ways, half = by_layout(world["ways"]), world["local shard"]["ms"]
        peer = next(side["ms"] for side in world["peers"] if side["name"] == "fla's context parallelism")
        found[f"delta rule, {where}, over the half alone"] = [f"{way['ms'] / half:.3f}" for way in ways]
        found[f"fla's context parallelism over it, {where}"] = [f"{peer / way['ms']:.1f}" for way in ways]
    assert {row[0]: row[1:3] for row in table_rows("work | contiguous", "docs/measured/README.md")} == found


def test_every_goal_that_was_missed_is_among_what_falls_short() -> None:
    text = (ROOT / "docs" / "measured" / "README.md").read_text()
    short = [line for line in text.splitlines() if line.startswith("|") and "| found |" not in line]
    said = set(re.findall(r"\d+\.\d+", " ".join(short)))
    missed = [goal for file in measured("d*.json") for goal in file.get("goals", []) if not goal["holds"]]
    assert missed and [goal for goal in missed if f"{goal['found']:.2f}" not in said] == []
