"""A queue of runs in a folder, which can be stopped at any moment and taken up again where it was.

    OUT/queue.json                        what the queue is made of, and its commands; another one's folder is refused
    OUT/runs/TASK/CELL/lr-L-seed-S/       a run: its configuration, metrics, log, and result.json once it is finished
    OUT/runs/TASK/NAME/                   a measurement: its log and result.json

Nothing else is state, and where the folder lies is read from nothing in it (a run's configuration and its checkpoints
record ``run.dir``, for people): it can be moved, and goes on elsewhere. Which run comes next follows from the results
that are there: table by table the search of every cell, and behind a cell's search its final seeds. Measurements of
time go first, one at a time, with the device to themselves.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dnsp.config import override_tree, parse_config
from dnsp.data.mix import open_data
from dnsp.data.pack import Split
from dnsp.data.prepare import ensure
from dnsp.errors import UsageError
from dnsp.parallel.errors import LayoutError
from dnsp.parallel.layout import Layout
from dnsp.schedule import spans
from dnsp.tasks.provenance import code_identity, machine
from dnsp.tasks.sources import VERSION
from dnsp.tasks.suite import FINAL_SEEDS, SEARCH_SEED, VALIDATION, Cell, Measurement, Scale, Suite, turn
from dnsp.tasks.worker import RESULT, parse_result, replace_json, run_config

TRIES = 2  # of a job that fails
OWN = ("train.lr", "train.seed", "data.seed", "run.dir", "run.tensorboard", "resume")  # what a queue sets in each run
Sources = list[dict[str, Any]]  # as in data.sources


@dataclass
class Request:
    """What the command line asks for."""

    names: list[str]
    scale: Scale
    device: str  # cpu, cuda, cuda:N
    out: Path
    overrides: list[str] = field(default_factory=list)
    models: tuple[str, ...] = ()
    text: str | None = None
    workers: int | None = None
    minutes: float | None = None
    ranks: int = 1
    overwrite: bool = False
    mps: bool | None = None


def train_job(cell: Cell, lr: float, seed: int, scale: Scale, ranks: int = 1) -> dict[str, Any]:
    """A run as its worker is told of it; one of a shortened search is asked for what chooses alone."""
    tree, tests = cell.tree, cell.tests
    if cell.search_part is not None and seed == SEARCH_SEED:
        steps = max(1, round(cell.search_part * tree["train"]["steps"]))
        warmup = min(tree["train"]["warmup_steps"], max(2, steps // 20))
        tree = {**tree, "train": {**tree["train"], "steps": steps, "warmup_steps": warmup}}
        tests = {VALIDATION: tests[VALIDATION]}
    return {
        "kind": "train",
        "task": cell.task,
        "cell": cell.name,
        "labels": cell.labels,
        "name": f"{cell.task}/{cell.name}/lr-{lr:g}-seed-{seed}",
        "lr": lr,
        "seed": seed,
        # text is held out by the data's seed: the same documents for all runs
        "data_seed": seed if all("task:" in s["path"] for s in tree["data"]["sources"]) else 0,
        "config": tree,
        "tests": tests,
        "checkpoint_every": 500 if scale == "full" else 0,
        "ranks": ranks,
    }


def measurement_job(measurement: Measurement) -> dict[str, Any]:
    return {**asdict(measurement), "cell": measurement.name, "name": f"{measurement.task}/{measurement.name}"}


def chosen_rate(results: Sequence[dict[str, Any]], choose: str) -> float:
    """The learning rate whose run did best in validation; the lowest where all diverged. Of equal ones the lowest."""

    def badness(result: dict[str, Any]) -> tuple[float, float]:
        figures = result["tests"].get(VALIDATION)
        if result["outcome"] == "diverged" or figures is None or figures["loss"] != figures["loss"]:
            return float("inf"), float("inf")
        return (-figures["accuracy"] if choose == "accuracy" else 0.0), figures["loss"]

    return min(results, key=lambda result: (badness(result), result["lr"]))["lr"]


def with_overrides(cell: Cell, overrides: Sequence[str]) -> Cell:
    """A cell whose runs' configuration has some values replaced. Its tests follow, but for what they ask otherwise than
    it is trained: their own lengths, and options of a task."""
    if not overrides:
        return cell
    for override in overrides:
        if (key := override.partition("=")[0]) in OWN:
            raise UsageError(f"{override}: the queue gives every run its {key}; leave it out, or use dnsp train")
    tree = override_tree(cell.tree, overrides)
    tests = {}
    for name, test in cell.tests.items():
        length = tree["data"]["sequence_length"] if test["length"] == cell.tree["data"]["sequence_length"] else None
        sources = _following(test["sources"], cell.tree["data"]["sources"], tree["data"]["sources"])
        tests[name] = {**test, "sources": sources, **({} if length is None else {"length": length})}
    return replace(cell, tree=tree, tests=tests)


def _following(asked: Sources, was: Sources, now: Sources) -> Sources:
    """A test's sources where those of the training have changed. Those of other paths do not change."""
    if asked == was:
        return now
    if [source["path"] for source in asked] != [source["path"] for source in was] or len(now) != len(was):
        return asked
    found = []
    for test, before, after in zip(asked, was, now, strict=True):
        trained = before.get("options", {})
        own = {key: value for key, value in test.get("options", {}).items() if trained.get(key) != value}
        found.append({**after, "options": {**after.get("options", {}), **own}} if own else after)
    return found


class Queue:
    """The jobs of a suite in a folder."""

    def __init__(self, suite: Suite, request: Request) -> None:
        self.request, self.out = request, request.out
        self.cells = [with_overrides(cell, request.overrides) for cell in suite.cells]
        self.measurements = [measurement_job(m) for m in suite.measurements]
        self.failed: dict[str, str] = {}
        self.tries: dict[str, int] = {}
        self.taken: set[str] = set()
        self.at_work: dict[int, str] = {}
        self.changed = threading.Condition()
        self.stopping = False
        self.results: dict[str, dict[str, Any]] = {}

    @property
    def identity(self) -> dict[str, Any]:
        cells = [{name: x for name, x in asdict(cell).items() if x is not None} for cell in self.cells]
        whole = json.dumps([cells, self.measurements, VERSION], sort_keys=True)
        request = self.request
        return {
            "tasks": request.names,
            "scale": request.scale,
            "device": request.device.partition(":")[0],
            "models": list(request.models),
            "overrides": request.overrides,
            "ranks": request.ranks,
            "runs": hashlib.sha256(whole.encode()).hexdigest()[:16],
        }

    @cached_property
    def origin(self) -> dict[str, Any]:
        """What every result says of where it is from."""
        return {"code": code_identity(), "machine": machine(self.request.device)}

    @property
    def planned(self) -> dict[str, dict[str, int]]:
        """How many runs each cell has, and each measurement, by task and name."""
        planned: dict[str, dict[str, int]] = {}
        seeds = set(FINAL_SEEDS[self.request.scale]) - {SEARCH_SEED}
        for cell in self.cells:
            planned.setdefault(cell.task, {})[cell.name] = len(cell.learning_rates) + len(seeds)
        for job in self.measurements:
            planned.setdefault(job["task"], {})[job["cell"]] = 1
        return planned

    @property
    def total(self) -> int:
        return sum(sum(runs.values()) for runs in self.planned.values())

    def check(self) -> None:
        """Refuse before anything is written what would fail in the first step of a run.

        Raises UsageError.
        """
        looked_at = set()
        for cell in self.cells:
            job = train_job(cell, cell.learning_rates[0], SEARCH_SEED, self.request.scale, self.request.ranks)
            config = run_config(job, self.out / "runs" / job["name"])
            ranks = config.parallel.sequence or self.request.ranks
            for span in spans(config):
                try:
                    Layout(config.parallel.layout, ranks, span.sequence_length)
                except LayoutError as error:
                    raise UsageError(f"--ranks {self.request.ranks}: {cell.task}: {error}") from None
            for source in config.data.sources:
                if not source.path.startswith("task:"):
                    ensure(source.path, config.data.tokenizer)  # once, before workers would wait for each other
            wanted: list[tuple[Split, Any, int]] = [
                ("train", cell.tree["data"]["sources"], span.sequence_length) for span in spans(config)
            ]
            wanted += [("heldout", test["sources"], test["length"]) for test in cell.tests.values()]
            for split, sources, length in wanted:
                tree = {**cell.tree, "data": {**cell.tree["data"], "sources": sources}}
                key = (split, length, json.dumps(tree["data"]), config.model.vocab_size)
                if key not in looked_at:
                    looked_at.add(key)
                    data = parse_config(tree, job["name"]).data
                    open_data(data, vocab_size=config.model.vocab_size, split=split).check_length(length)

    def open(self) -> FileLock:
        """The folder, made or taken up; held until the lock is released.

        Raises UsageError where it has another queue's results, or is in use.
        """
        out, file = self.out, self.out / "queue.json"
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock = FileLock(out / ".lock", blocking=False)
            lock.acquire()
        except Timeout:
            raise UsageError(f"--out {out} is in use by a running queue; wait for it, or give another folder") from None
        except OSError as error:
            raise UsageError(
                f"--out {out} cannot be used: {error.strerror}; give a folder that you can write to"
            ) from None
        found = _read(file)
        if found is not None and found.get("identity") != self.identity and not self.request.overwrite:
            before = found.get("identity") or {}
            differs = ", ".join(
                f"{key} {before.get(key)!r} there, {value!r} asked" for key, value in self.identity.items()
                if before.get(key) != value
            )  # fmt: skip
            lock.release()
            raise UsageError(
                f"--out {out} has the results of another queue ({differs}); give another folder, or --overwrite to "
                "delete them"
            )
        if found is None and any(path.name != ".lock" for path in out.iterdir()) and not self.request.overwrite:
            lock.release()
            raise UsageError(f"--out {out} has files in it that are no queue's; give a new folder, or --overwrite")
        if self.request.overwrite and (found is None or found.get("identity") != self.identity):
            shutil.rmtree(out / "runs", ignore_errors=True)
            if found is not None:  # the queue's report goes with it; other files may be anything
                for name in ("tables", "plots"):
                    shutil.rmtree(out / name, ignore_errors=True)
                (out / "report.md").unlink(missing_ok=True)
            found = None
        commands = [] if found is None else commands_of(found)
        if (command := ["dnsp", *sys.argv[1:]]) not in commands:
            commands.append(command)
        queue = {"identity": self.identity, "planned": self.planned, "total": self.total}
        replace_json(file, {**queue, "commands": commands})
        (out / "runs").mkdir(exist_ok=True)
        self._read_results()
        return lock

    def _read_results(self) -> None:
        for path in (self.out / "runs").rglob(RESULT):
            result = _read(path, parse_result)
            if result is not None:
                self.results[path.parent.relative_to(self.out / "runs").as_posix()] = result

    def next_job(self, worker: int, measurements: bool) -> dict[str, Any] | None:
        """A job to begin now, or None when there is nothing more to begin; waits where another's result decides."""
        with self.changed:
            while not self.stopping:
                waiting = False
                for job, ready in self._jobs(measurements):
                    if job["name"] in self.results or job["name"] in self.failed or job["name"] in self.taken:
                        waiting |= job["name"] in self.taken
                        continue
                    if not ready:
                        waiting = True
                        continue
                    self.taken.add(job["name"])
                    self.at_work[worker] = job["name"]
                    places = {"queue": str(self.out), "folder": str(self.out / "runs" / job["name"])}
                    return {**job, **self.origin, **places}
                if not waiting:
                    return None
                self.changed.wait(1.0)
            return None

    def left(self, measurements: bool) -> bool:
        """Whether there is anything to do of either kind."""
        return any(job["name"] not in self.results for job, _ in self._jobs(measurements))

    def _jobs(self, measurements: bool) -> list[tuple[dict[str, Any], bool]]:
        """Jobs in order, and whether what decides them is known."""
        if measurements:
            return [(job, True) for job in self.measurements]
        scale, ranks = self.request.scale, self.request.ranks
        found: list[tuple[dict[str, Any], bool]] = []
        for _, cells in groupby(self._in_order(), key=lambda cell: turn(cell, scale)):
            search, final = [], []
            for cell in cells:
                jobs = [train_job(cell, lr, SEARCH_SEED, scale, ranks) for lr in cell.learning_rates]
                search += [(job, True) for job in jobs]
                results = [self.results[job["name"]] for job in jobs if job["name"] in self.results]
                if len(results) == len(jobs):
                    lr = chosen_rate(results, cell.choose)
                    final += [(train_job(cell, lr, seed, scale, ranks), True) for seed in FINAL_SEEDS[scale]]
                elif not any(job["name"] in self.failed for job in jobs):
                    final.append(({"name": f"{cell.task}/{cell.name}/final"}, False))
            found += search + final
        return found

    def _in_order(self) -> list[Cell]:
        """Table by table, and within a table long runs first: none is left over at its end. A table's final runs wait
        for its search, and the next table's search is begun meanwhile."""
        return sorted(self.cells, key=lambda cell: (turn(cell, self.request.scale), -_cost(cell)))

    def done(self, worker: int, job: dict[str, Any], answer: dict[str, Any]) -> None:
        with self.changed:
            name = job["name"]
            self.taken.discard(name)
            self.at_work.pop(worker, None)
            result = _read(Path(job["folder"]) / RESULT, parse_result)
            if result is not None:  # whatever became of its process afterwards
                self.results[name] = result
            elif answer["status"] == "failed":
                # once more: processes that share a GPU can be ended by each other's faults
                self.tries[name] = self.tries.get(name, 0) + 1
                if self.tries[name] == TRIES:
                    self.failed[name] = answer.get("message", "")
            self.changed.notify_all()


def commands_of(queue: dict[str, Any]) -> list[list[str]]:
    """The different commands that a ``queue.json`` was run with, the first first; earlier versions kept the last."""
    return list(queue["commands"]) if "commands" in queue else [queue["command"]]


def _cost(cell: Cell) -> float:
    """Tokens that a cell's run trains on."""
    train = cell.tree["train"]
    if stages := train.get("stages"):
        return float(sum(stage["tokens"] for stage in stages))
    return float(train["steps"] * train["global_batch"] * cell.tree["data"]["sequence_length"])


def _read(path: Path, parse: Callable[[str], Any] = json.loads) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = parse(path.read_text())
    except (OSError, ValueError):
        return None
    return found
