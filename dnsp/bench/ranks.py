"""Benches of several ranks: they are started here, on one GPU together (under MPS) or on one each, and take turns.

A *turn* is one thing done by all ranks, or by one of them while the others wait; a turn's time is from the first rank
that begins to the last that ends, hosts' clock, devices waited for. Things are timed turn about, and medians reported.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.progress import Progress
from rich.table import Table

from dnsp import watchdog
from dnsp.bench.common import make_console, reason
from dnsp.errors import UsageError
from dnsp.json_files import write_json
from dnsp.launch.environment import find_environment
from dnsp.launch.local import start_ranks
from dnsp.parallel.errors import PeerLost
from dnsp.parallel.grid import Grid, make_grid
from dnsp.parallel.layout import KINDS, Layout
from dnsp.parallel.transport import Transport

TIMEOUT = 300.0  # seconds that a message may take: peers tune their kernels at their first call, each rank for itself
WARM = 2  # turns before any is timed
Work = Callable[[], Any]


@dataclass
class Ranks:
    """A rank among those of a bench: what it does in turns with the others."""

    grid: Grid
    comm: Transport
    device: torch.device

    @property
    def first(self) -> bool:
        return self.grid.rank == 0

    def turns(self, works: Mapping[str, Work | None], steps: int, repeat: int = 1) -> dict[str, list[float]]:
        """Milliseconds of each work, turn about; None: this rank only waits. Every rank gets the same figures."""
        found: dict[str, list[float]] = {name: [] for name in works}
        with Progress(transient=True, disable=not self.first) as bar:
            line = bar.add_task(f"{self.grid.world} ranks", total=(WARM + steps) * len(works))
            for step in range(-WARM, steps):
                for name, work in works.items():
                    bar.update(line, description=f"{self.grid.world} ranks: {name}")
                    seconds = self.turn(work, repeat)
                    bar.advance(line)
                    if step >= 0:
                        found[name].append(1e3 * seconds / repeat)
        return found

    def willing(self, works: Mapping[str, Work]) -> tuple[dict[str, Work], dict[str, str]]:
        """Works that go through once on every rank, and why the others do not."""
        failures: dict[str, str] = {}
        for name, work in works.items():
            words = ""
            try:
                work()
                self.synchronize()
            except PeerLost:
                raise
            except Exception as error:  # a peer may fail in any way, a capture too; all ranks are told
                words = reason(error)
            if said := next(filter(None, self.comm.from_all(words)), None):
                failures[name] = said
        return {name: work for name, work in works.items() if name not in failures}, failures

    def turn(self, work: Work | None, repeat: int = 1) -> float:
        self.wait()
        began = time.perf_counter()
        if work is not None:
            for _ in range(repeat):
                work()
            self.synchronize()
        ended = time.perf_counter()
        spans = [span for span in self.comm.from_all((began, ended) if work else None) if span]
        return max(end for _, end in spans) - min(begin for begin, _ in spans)

    def wait(self) -> None:
        self.synchronize()
        self.comm.barrier()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        watchdog.check_peers()

    @property
    def sharing(self) -> int:
        """Ranks on one GPU."""
        if self.device.type == "cpu":
            return self.grid.world
        return -(-self.grid.world // torch.cuda.device_count())

    @property
    def about(self) -> dict[str, Any]:
        """How many ranks there are, how many of them share a GPU, and that in words."""
        where = "a GPU each" if self.sharing == 1 else f"{self.sharing} on one GPU"
        words = "on the CPU" if self.device.type == "cpu" else where
        return {"ranks": self.grid.world, "sharing": self.sharing, "where": words}

    @property
    def multiprocessors(self) -> int:
        """Of this rank's GPU; 0 on a CPU."""
        return 0 if self.device.type == "cpu" else torch.cuda.get_device_properties(self.device).multi_processor_count


def check(
    tokens: int,
    worlds: Sequence[int],
    layouts: Sequence[str],
    transports: Sequence[str] = (),
    known: Sequence[str] = (),
) -> None:
    """Refuses what cannot be measured. ``known``: of the transports.

    Raises: UsageError, LayoutError.
    """
    for what, given, names in (("--layouts", layouts, KINDS), ("--transports", transports, known)):
        for value in given:
            if value not in names:
                raise UsageError(f"{what} {value}: it is not one of {', '.join(names)}")
    for world in worlds:
        if world < 2:
            raise UsageError(f"--ranks {world}: one process is measured beside every number of ranks; give 2 or more")
        for kind in layouts:
            Layout(kind, world, tokens)


def publish(
    worlds: Iterable[dict[str, Any]],
    tables: Callable[[dict[str, Any]], Sequence[Table]],
    report: dict[str, Any],
    json_path: Path | None,
) -> None:
    """A world's tables and notes for people, and all figures behind a report's head for programs: once it is measured,
    whatever comes of the next."""
    console, measured = make_console(), list[dict[str, Any]]()
    for found in worlds:
        measured.append(found)
        for table in tables(found):
            console.print(table)
        for note in found["notes"]:
            console.print(f"  {note}", markup=False, soft_wrap=True)
        write_json(json_path, {**about(), **report, "worlds": measured})


def new_table(title: str, *columns: str) -> Table:
    """Names on the left, figures on the right."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    return table


def measure(what: str, request: dict[str, Any], worlds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Starts ``dnsp bench-rank WHAT FILE`` as so many ranks, once a world; what each world's rank 0 found, when it has.

    Raises: UsageError under a launcher, and where ranks failed (their words are on stderr).
    """
    environment = find_environment()
    if environment.launcher != "none":
        raise UsageError(f"this bench starts its ranks itself; run it without {environment.launcher}")
    with tempfile.TemporaryDirectory(prefix="dnsp-bench-") as name:
        file, report = Path(name, "request.json"), Path(name, "report.json")
        for world in worlds:
            file.write_text(json.dumps(request))
            with watchdog.room_for(world):
                status = start_ranks(["bench-rank", what, str(file)], world)
            if status:
                raise UsageError(f"{world} ranks could not be measured (status {status}); what they said stands above")
            yield json.loads(report.read_text())


def as_rank(what: str, file: Path) -> None:
    """What a rank that :func:`measure` started does: ``dnsp.bench.WHAT.rank_main``; rank 0 leaves the figures."""
    work = import_module(f"dnsp.bench.{what}").rank_main
    environment = find_environment()
    watchdog.take_device(environment)
    watchdog.join(environment)
    grid = make_grid(timeout=TIMEOUT)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    found = work(json.loads(file.read_text()), Ranks(grid, grid.transport(), device))
    if grid.rank == 0:
        file.with_name("report.json").write_text(json.dumps(found))
    watchdog.leave()


def about() -> dict[str, Any]:
    """Where figures come from."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.cuda.get_device_name(i) for i in range(count)]
    packages = {}
    for package in ("torch", "triton", "flash-linear-attention"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = "not installed"
    return {"gpus": gpus, "packages": packages}


def middle(values: Sequence[float]) -> float:
    return float(median(values)) if values else float("nan")
