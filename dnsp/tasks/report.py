"""``dnsp report DIR...``: tables beside the document's figures, in the terminal, as Markdown and CSV, and plots."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable

from dnsp.bench.common import make_console
from dnsp.errors import UsageError
from dnsp.json_files import write_json
from dnsp.tasks.measured import chunk_tables, pitfall_tables, speed_tables
from dnsp.tasks.plots import all_plots
from dnsp.tasks.queue import commands_of
from dnsp.tasks.suite import Scale
from dnsp.tasks.summary import Result, summaries
from dnsp.tasks.tables import (
    Table,
    ablation_tables,
    configuration_table,
    lm_tables,
    models_table,
    recall_tables,
    search_table,
)  # fmt: skip
from dnsp.tasks.worker import RESULT, parse_result, read_curve

UNPLANNED = (
    "  - which are missing is not in its queue.json, of an earlier version: the same command adds it, and goes on"
)


def report(folders: list[Path], json_file: Path | None = None) -> int:
    """Write ``report.md``, ``tables/*.csv`` and ``plots/*.png`` into the first folder, and print the tables.

    json_file: where all tables go as one mapping, too.

    Without matplotlib there are no plots, which is said.

    Raises UsageError for folders without results, or whose results cannot stand in one table.
    """
    console = make_console()
    queues = [read_queue(folder) for folder in folders]
    scales = {queue["identity"]["scale"] for queue in queues}
    if len(scales) > 1:
        raise UsageError("the folders hold runs of scale smoke and of scale full; report them apart")
    results: dict[str, Result] = {}
    places: dict[str, Path] = {}
    for folder in folders:
        for name, result in read_results(folder).items():
            if name in results:
                raise UsageError(f"{places[name]} and {folder} both have {name}; leave one of them out")
            results[name], places[name] = result, folder
    if not results:
        raise UsageError(f"{folders[0]} has no finished run yet; let dnsp tasks run go on with it first")
    scale = scales.pop()
    tables = all_tables(list(results.values()), scale)
    out = folders[0]
    try:
        curves = {name: curve for name in results if (curve := read_curve(places[name] / "runs" / name))}
        plots = all_plots(list(results.values()), scale, out / "plots", curves)
        made = f"{len(plots)} plots in plots/"
    except UsageError as error:
        plots, made = [], f"no plots: {error}"
    (out / "tables").mkdir(exist_ok=True)
    for table in tables:
        with (out / "tables" / f"{table.name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(table.columns)
            writer.writerows([["" if cell is None else cell for cell in row] for row in table.rows])
        console.print(_rich(table))
        if table.note:
            console.print(*_sentences(table), sep="\n", markup=False)
            console.print()
    write_json(json_file, {table.name: asdict(table) for table in tables})
    lines = _head(folders, queues, list(results.values()))
    (out / "report.md").write_text("\n".join([*lines, *_markdown(tables), *_pictures(plots, out)]) + "\n")
    for line in lines[2:]:
        console.print(line, markup=False)
    console.print(f"{out}/report.md, {len(tables)} CSV files in tables/, {made}", markup=False)
    return 0


def all_tables(results: Sequence[Result], scale: Scale) -> list[Table]:
    """Every table for which there are results. At ``smoke`` the document's figures stand beside ours for the form
    alone: nothing is said of them."""
    cells = summaries(results, scale)
    tables: list[Table] = []
    for task in ("kv", "copy", "mqar", "recall32k"):
        own = [cell for cell in cells if cell.task == task]
        if own:
            tables += recall_tables(task, own, scale)
    if own := [cell for cell in cells if cell.task == "ablations"]:
        tables += ablation_tables(own, scale)
    if own := [cell for cell in cells if cell.task == "lm"]:
        tables += lm_tables(own)
    makers: dict[str, Callable[[list[Result]], list[Table]]] = {
        "chunk": chunk_tables, "speed": speed_tables, "pitfall": pitfall_tables,
    }  # fmt: skip
    for kind, make in makers.items():
        figures = [result["figures"] for result in results if result["kind"] == kind]
        if figures:
            tables += make(figures)
    if cells:
        tables.append(search_table(cells))
        tables += [configuration_table(results), models_table(results)]
    return tables


def read_queue(folder: Path) -> dict[str, Any]:
    """A queue's own file. Raises UsageError where there is none."""
    try:
        found: dict[str, Any] = json.loads((folder / "queue.json").read_text())
    except (OSError, ValueError):
        raise UsageError(f"{folder} is no folder of dnsp tasks run (there is no queue.json in it)") from None
    return found


def read_results(folder: Path) -> dict[str, Result]:
    """Every finished run and measurement of a folder, by its name."""
    runs = folder / "runs"
    return {
        path.parent.relative_to(runs).as_posix(): parse_result(path.read_text()) for path in sorted(runs.rglob(RESULT))
    }


def _head(folders: list[Path], queues: list[dict[str, Any]], results: list[Result]) -> list[str]:
    """What was run, on what: the commands, how much is finished, versions and code, devices, time."""
    lines = ["# Report", ""]
    for folder, queue in zip(folders, queues, strict=True):
        found = read_results(folder)
        commands = ", ".join(f"`{' '.join(command)}`" for command in commands_of(queue))
        lines.append(f"- {commands}: {len(found)} of {queue['total']} finished")
        if len(found) < queue["total"]:
            lines += _missing(queue["planned"], found) if "planned" in queue else [UNPLANNED]
    versions = sorted({json.dumps(result["versions"], sort_keys=True) for result in results})
    for text in versions:
        lines.append("- " + ", ".join(f"{name} {number}" for name, number in json.loads(text).items()))
    lines.append(_codes(results))
    lines.append("- on " + ", ".join(sorted({_device(result) for result in results})))
    trained = [result for result in results if result["kind"] == "train"]
    if trained:
        hours = sum(result["seconds"] for result in trained) / 3600
        seeds = sorted({result["seed"] for result in trained})
        diverged = sum(result["outcome"] == "diverged" for result in trained)
        lines.append(f"- {len(trained)} trained models, {diverged} diverged, seeds {', '.join(map(str, seeds))}, "
                     f"{hours:.2f} hours of runs, several at once")  # fmt: skip
    return lines


def _codes(results: list[Result]) -> str:
    """Which code the results are of; results of earlier versions do not say."""
    found = Counter(result.get("code", "unknown code") for result in results)
    changed = "; +: with changes that were not committed" if any(code.endswith("+") for code in found) else ""
    if len(found) == 1:
        return f"- code: {next(iter(found))}{changed}"
    each = ", ".join(f"{code} ({count} results)" for code, count in sorted(found.items()))
    return f"- results of more than one code are mixed: {each}{changed}"


def _device(result: Result) -> str:
    name: str = result["device_name"]
    if not (machine := result.get("machine")):
        return name
    gpus = "one GPU" if machine["gpus"] == 1 else f"{machine['gpus']} GPUs"
    return f"{name} ({gpus} in the machine, driver {machine['driver']})"


def _missing(planned: dict[str, dict[str, int]], found: dict[str, Result]) -> list[str]:
    """Task by task how much there is, and how many runs of what are not."""
    there = Counter((result["task"], result["cell"]) for result in found.values())
    lines = []
    for task, cells in planned.items():
        left = {cell: runs - there[task, cell] for cell, runs in cells.items() if there[task, cell] < runs}
        total = sum(cells.values())
        done = total - sum(left.values())
        words = ", ".join(f"{count} of {cell}" for cell, count in left.items()) if done else "all"
        lines.append(f"  - {task}: {done} of {total} finished" + (f"; missing: {words}" if left else ""))
    return lines


def shown(cell: Any) -> str:
    """A cell as people read it; CSV files have all digits."""
    if cell is None:
        return ""
    if isinstance(cell, float):
        if cell != cell or cell in (float("inf"), float("-inf")):
            return "not finite"
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def _rich(table: Table) -> RichTable:
    made = RichTable(title=table.title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for n, column in enumerate(table.columns):
        made.add_column(column, justify="left" if n == 0 else "right", overflow="fold")
    for row in table.rows:
        made.add_row(*map(shown, row))
    return made


def _markdown(tables: list[Table]) -> list[str]:
    lines: list[str] = []
    for table in tables:
        lines += ["", f"## {table.title}", "", _row(table.columns), _row(["---"] * len(table.columns))]
        lines += [_row([shown(cell) for cell in row]) for row in table.rows]
        lines += ["", *_sentences(table)] if table.note else []
    return lines


def _sentences(table: Table) -> list[str]:
    """Its note, as a list where it is more than one."""
    found = table.note.split("\n")
    return [f"- {sentence}" for sentence in found] if len(found) > 1 else found


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _pictures(plots: list[Path], out: Path) -> list[str]:
    return ["", *(f"![{path.stem}]({path.relative_to(out).as_posix()})" for path in plots)] if plots else []
