"""A queue of runs in a folder, which can be stopped at any moment and taken up again where it was.

    OUT/queue.json                        what the queue is made of; another one's folder is refused
    OUT/runs/TASK/CELL/lr-L-seed-S/       a run: its configuration, metrics, log, and result.json once it is finished
    OUT/runs/TASK/NAME/                   a measurement: its log and result.json

Nothing else is state. Which run comes next follows from the results that are there: the search of every cell, and
behind a cell's search its final seeds. Measurements of time go first, one at a time, with the device to themselves.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dnsp.config import override_tree, parse_config
from dnsp.data.mix import open_data
from dnsp.data.pack import Split
from dnsp.data.prepare import ensure
from dnsp.errors import UsageError
from dnsp.launch.local import SUPERVISOR, cores
from dnsp.schedule import spans
from dnsp.tasks.mps import Mps
from dnsp.tasks.suite import FINAL_SEEDS, SEARCH_SEED, VALIDATION, Cell, Measurement, Scale, Suite
from dnsp.tasks.worker import RESULT, run_config, write_json

GRACE = 30.0  # seconds that a stopped run has to save
WORKERS_A_GPU = 12
TRIES = 2  # of a job that fails
PLAIN_INTERVAL = 10.0  # seconds between lines where the output is not a terminal


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


def devices_of(device: str) -> list[str]:
    """``CUDA_VISIBLE_DEVICES`` of each device that ``--device`` names; an empty string is the CPU.

    Raises UsageError for a device that is not there.
    """
    if device == "cpu":
        return [""]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind, colon, index = device.partition(":")
    if kind != "cuda" or (colon and not index.isdigit()):
        raise UsageError(f"--device {device}: give cpu, cuda (all GPUs) or cuda:N (one of them)")
    there = f"this machine has {count} GPUs" if count != 1 else "this machine has one GPU, cuda:0"
    if count == 0 or (colon and int(index) >= count):
        raise UsageError(f"--device {device} is not there: {there}; take cpu" + (" or another" if count else ""))
    names = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")
    return [names[int(index)]] if colon else names[:count]


def grouped(devices: Sequence[str], ranks: int) -> list[str]:
    """``CUDA_VISIBLE_DEVICES`` of each run over several ranks, a GPU each."""
    return [",".join(devices[n : n + ranks]) for n in range(0, len(devices) - ranks + 1, ranks)]


def train_job(cell: Cell, lr: float, seed: int, scale: Scale, ranks: int = 1) -> dict[str, Any]:
    """A run as its worker is told of it."""
    return {
        "kind": "train",
        "task": cell.task,
        "cell": cell.name,
        "labels": cell.labels,
        "name": f"{cell.task}/{cell.name}/lr-{lr:g}-seed-{seed}",
        "lr": lr,
        "seed": seed,
        # text is held out by the data's seed: the same documents for all runs
        "data_seed": seed if all("task:" in s["path"] for s in cell.tree["data"]["sources"]) else 0,
        "config": cell.tree,
        "tests": cell.tests,
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
    """A cell whose runs' configuration has some values replaced; tests that ask the task as it is trained follow it."""
    if not overrides:
        return cell
    tree = override_tree(cell.tree, overrides)
    tests = {}
    for name, test in cell.tests.items():
        same = test["sources"] == cell.tree["data"]["sources"]
        length = tree["data"]["sequence_length"]
        was = cell.tree["data"]["sequence_length"]
        changed = {"sources": tree["data"]["sources"]} if same else {}
        tests[name] = {**test, **changed, **({"length": length} if test["length"] == was else {})}
    return Cell(cell.task, cell.name, tree, tests, cell.learning_rates, cell.choose, cell.labels)


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
        whole = json.dumps([[asdict(cell) for cell in self.cells], self.measurements], sort_keys=True)
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

    @property
    def total(self) -> int:
        scale, runs = self.request.scale, 0
        for cell in self.cells:
            seeds = set(FINAL_SEEDS[scale]) - {SEARCH_SEED}
            runs += len(cell.learning_rates) + len(seeds)
        return runs + len(self.measurements)

    def check(self) -> None:
        """Refuse before anything is written what would fail in the first step of a run.

        Raises UsageError.
        """
        looked_at = set()
        for cell in self.cells:
            job = train_job(cell, cell.learning_rates[0], SEARCH_SEED, self.request.scale, self.request.ranks)
            config = run_config(job, self.out / "runs" / job["name"])
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
        write_json(file, {"identity": self.identity, "command": ["dnsp", *sys.argv[1:]], "total": self.total})
        (out / "runs").mkdir(exist_ok=True)
        self._read_results()
        return lock

    def _read_results(self) -> None:
        for path in (self.out / "runs").rglob(RESULT):
            result = _read(path)
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
                    return {**job, "folder": str(self.out / "runs" / job["name"])}
                if not waiting:
                    return None
                self.changed.wait(1.0)
            return None

    def _jobs(self, measurements: bool) -> list[tuple[dict[str, Any], bool]]:
        """Jobs in order, and whether what decides them is known."""
        if measurements:
            return [(job, True) for job in self.measurements]
        scale, ranks = self.request.scale, self.request.ranks
        search, final = [], []
        for cell in sorted(self.cells, key=_cost, reverse=True):  # long runs first: none is left over at the end
            jobs = [train_job(cell, lr, SEARCH_SEED, scale, ranks) for lr in cell.learning_rates]
            search += [(job, True) for job in jobs]
            found = [self.results[job["name"]] for job in jobs if job["name"] in self.results]
            if len(found) == len(jobs):
                lr = chosen_rate(found, cell.choose)
                final += [(train_job(cell, lr, seed, scale, ranks), True) for seed in FINAL_SEEDS[scale]]
            elif not any(job["name"] in self.failed for job in jobs):
                final.append(({"name": f"{cell.task}/{cell.name}/final"}, False))
        return search + final

    def done(self, worker: int, job: dict[str, Any], answer: dict[str, Any]) -> None:
        with self.changed:
            name = job["name"]
            self.taken.discard(name)
            self.at_work.pop(worker, None)
            result = _read(Path(job["folder"]) / RESULT)
            if answer["status"] == "finished" and result is not None:
                self.results[name] = result
            elif answer["status"] == "failed":
                # once more: processes that share a GPU can be ended by each other's faults
                self.tries[name] = self.tries.get(name, 0) + 1
                if self.tries[name] == TRIES:
                    self.failed[name] = answer.get("message", "")
            self.changed.notify_all()


class Worker(threading.Thread):
    """Hands jobs to a process of its own, and starts another where it ends."""

    def __init__(self, queue: Queue, number: int, environ: dict[str, str], measurements: bool) -> None:
        super().__init__(daemon=True)
        self.queue, self.number, self.environ, self.measurements = queue, number, environ, measurements
        self.process: subprocess.Popen[str] | None = None
        self.log: IO[bytes] | None = None

    def run(self) -> None:
        try:
            while (job := self.queue.next_job(self.number, self.measurements)) is not None:
                answer = self._carry_out(job)
                self.queue.done(self.number, job, answer)
                if answer.get("recycle"):
                    self.end()
        finally:
            self.end()

    def _carry_out(self, job: dict[str, Any]) -> dict[str, Any]:
        process = self.process = self.process or self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = process.wait()
        self.process = None
        if self.queue.stopping:
            return {"status": "stopped"}
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
        return {"status": "failed", "message": f"its process ended with {how}; see {job['folder']}/log.txt"}

    def _start(self) -> subprocess.Popen[str]:
        self.log = (self.queue.out / f"worker-{self.number}.log").open("ab")
        return subprocess.Popen(
            [sys.executable, "-m", "dnsp", "tasks", "worker"],
            env=self.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            start_new_session=True,
        )  # fmt: skip

    def ask_to_stop(self, number: int = signal.SIGTERM) -> None:
        process = self.process
        if process is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def end(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(OSError):
                process.stdin.close()  # a worker without a job ends by itself
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        if self.log is not None:
            self.log.close()
            self.log = None


def run(suite: Suite, request: Request, console: Console | None = None) -> int:
    """Carry the queue on until it is empty or its time is over; returns the exit status, 1 where a run failed.

    Raises UsageError for what cannot be begun.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    began = time.monotonic()
    deadline = None if request.minutes is None else began + max(request.minutes * 60 - GRACE, request.minutes * 30)
    devices = devices_of(request.device)
    if request.workers is not None and request.workers < 1:
        raise UsageError(f"--workers {request.workers}: at least one process has to do the work")
    if request.minutes is not None and request.minutes <= 0:
        raise UsageError(f"--minutes {request.minutes:g}: give the minutes that the queue may run, above 0")
    on_gpu = devices != [""]
    if on_gpu and request.ranks > len(devices):
        raise UsageError(
            f"--ranks {request.ranks} need a GPU each, --device {request.device} has {len(devices)}; take fewer"
        )
    queue = Queue(suite, request)
    queue.check()
    lock = queue.open()
    before = len(queue.results)
    if on_gpu and request.ranks > 1:
        usual, groups = len(devices) // request.ranks, grouped(devices, request.ranks)
    elif on_gpu:
        usual, groups = min(WORKERS_A_GPU, max(1, cores() - 1)) * len(devices), devices
    else:
        usual, groups = max(1, cores() // request.ranks), devices
    count = max(1, min(request.workers or usual, queue.total))
    state = f"{before} of {queue.total} finished before, " if before else ""
    console.print(f"{queue.out}: {queue.total} runs and measurements, {state}{count} at once on {request.device}")
    stop = _Stop(queue)
    try:
        environ = _environment()
        for measurements in (True, False):
            if queue.stopping:
                break
            mps = Mps(queue.out, request.mps) if on_gpu and not measurements and count > len(groups) else None
            try:
                if mps is not None:
                    console.print(mps.start(devices[0]), markup=False)
                    environ = {**environ, **mps.environ}
                numbers = range(1 if measurements else count)
                workers = [
                    Worker(queue, n, {**environ, "CUDA_VISIBLE_DEVICES": visible}, measurements)
                    for n in numbers
                    if (visible := ",".join(devices) if measurements else groups[n % len(groups)]) is not None
                ]
                if any(True for job, ready in queue._jobs(measurements) if job["name"] not in queue.results):
                    _watch(queue, workers, deadline, console)
            finally:
                if mps is not None:
                    mps.stop()
    finally:
        stop.restore()
        lock.release()
    return _conclude(queue, began, console)


def _watch(queue: Queue, workers: list[Worker], deadline: float | None, console: Console) -> None:
    """Start the workers, show how far they are, and stop them when it is time."""
    for worker in workers:
        worker.start()
    asked_at: float | None = None
    last_plain, columns = 0.0, (TextColumn("{task.completed:.0f}/{task.total:.0f}"), BarColumn(bar_width=12),
                                TextColumn("{task.description}"), TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal, refresh_per_second=2) as progress:
        task = progress.add_task("", total=queue.total)
        while any(worker.is_alive() for worker in workers):
            now = time.monotonic()
            if deadline is not None and now > deadline:
                with queue.changed:
                    queue.stopping = True
                    queue.changed.notify_all()
            if queue.stopping and asked_at is None:
                asked_at = now
                for worker in workers:
                    worker.ask_to_stop()
            if asked_at is not None and now > asked_at + GRACE:
                for worker in workers:
                    worker.ask_to_stop(signal.SIGKILL)
            names = sorted(queue.at_work.values())
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            text = f"{names[0]}{more}" if names else "starting"
            progress.update(task, completed=len(queue.results), description=text)
            if not console.is_terminal and now - last_plain > PLAIN_INTERVAL:
                console.print(f"{len(queue.results)}/{queue.total} finished, at work: {text}", markup=False)
                last_plain = now
            time.sleep(0.1)
        progress.update(task, completed=len(queue.results))


def _conclude(queue: Queue, began: float, console: Console) -> int:
    minutes = (time.monotonic() - began) / 60
    for name, message in queue.failed.items():
        console.print(f"{name} failed: {message}", markup=False)
    left = queue.total - len(queue.results)
    if queue.stopping:
        console.print(f"stopped after {minutes:.1f} minutes, {left} left; the same command goes on from here")
        return 1 if queue.failed else 0
    if queue.failed:
        console.print(
            f"{len(queue.failed)} failed, {left} of {queue.total} are not there; log.txt in a run's folder says why, "
            "the same command tries them again"
        )
        return 1
    console.print(f"{queue.total} finished after {minutes:.1f} minutes: dnsp report {queue.out}", markup=False)
    return 0


class _Stop:
    """SIGTERM and SIGINT: nothing more is begun, runs save and end; a second one is the default's."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.main = threading.current_thread() is threading.main_thread()
        signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1) if self.main else ()
        self.before = {number: signal.signal(number, self.ask) for number in signals}

    def ask(self, number: int, frame: object) -> None:
        self.queue.stopping = True
        self.restore()

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _environment() -> dict[str, str]:
    environ = {**os.environ, SUPERVISOR: str(os.getpid())}
    environ.setdefault("OMP_NUM_THREADS", "1")  # what is this small gains nothing by threads
    root = str(Path(__file__).absolute().parents[2])
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environ.get("PYTHONPATH")]))
    return environ


def _cost(cell: Cell) -> float:
    """Tokens that a cell's run trains on."""
    train = cell.tree["train"]
    if stages := train.get("stages"):
        return float(sum(stage["tokens"] for stage in stages))
    return float(train["steps"] * train["global_batch"] * cell.tree["data"]["sequence_length"])


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found
