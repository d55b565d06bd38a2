"""The processes that carry a queue on, and what is seen of them: one job after another each, several at once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dnsp.errors import UsageError
from dnsp.launch import mps
from dnsp.launch.local import SUPERVISOR, cores
from dnsp.tasks.queue import Queue, Request
from dnsp.tasks.suite import Suite

GRACE = 20.0  # seconds that a stopped run has to save: schedulers kill half a minute after they ask
END = 10.0  # seconds that a process without a job has to end
WORKERS_A_GPU = 12
QUEUES = 64  # of a GPU
PLAIN_INTERVAL = 10.0  # seconds between lines where the output is not a terminal


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


class Worker(threading.Thread):
    """Hands jobs to a process of its own, and starts another where it ends."""

    def __init__(self, queue: Queue, number: int, environ: dict[str, str], measurements: bool) -> None:
        super().__init__(daemon=True)
        self.queue, self.number, self.environ, self.measurements = queue, number, environ, measurements
        self.process: subprocess.Popen[str] | None = None
        self._asked: subprocess.Popen[str] | None = None
        self.log: IO[bytes] | None = None

    def run(self) -> None:
        try:
            while (job := self.queue.next_job(self.number, self.measurements)) is not None:
                try:
                    answer = self._carry_out(job)
                except (OSError, ValueError) as error:  # no process, or one that answers what is no answer
                    answer = {"status": "failed", "message": str(error), "recycle": True}
                if answer.get("recycle"):
                    self.end()  # before another worker may take the job: this process holds its folder
                self.queue.done(self.number, job, answer)
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

    def ask_to_stop(self) -> None:
        """Once: with each further time a run is nearer to an end without saving."""
        process = self.process
        if process is not self._asked:
            self._asked = process
            self._send(process, signal.SIGTERM)

    def kill(self) -> None:
        self._send(self.process, signal.SIGKILL)

    @staticmethod
    def _send(process: subprocess.Popen[str] | None, number: signal.Signals) -> None:
        if process is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def end(self) -> None:
        process = self.process
        if process is not None:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(OSError):
                process.stdin.close()  # a worker without a job ends by itself
            try:
                process.wait(END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
            self.process = None
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
            if queue.stopping or not queue.left(measurements):
                continue
            sharing = on_gpu and not measurements and count > len(groups)
            wanted = request.mps if sharing else False
            with mps.asked_for(wanted, devices[0]) as (variables, words):
                if sharing:
                    console.print(words, markup=False)
                    environ = {**environ, **variables}
                    # processes that share a GPU share its queues, too: with more than there are some do not start
                    environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", str(max(1, QUEUES // -(-count // len(groups)))))
                # what is timed sees all devices: a prefill over ranks is among it
                visible = [",".join(devices)] if measurements else [groups[n % len(groups)] for n in range(count)]
                workers = [
                    Worker(queue, n, {**environ, "CUDA_VISIBLE_DEVICES": names}, measurements)
                    for n, names in enumerate(visible)
                ]
                _watch(queue, workers, deadline, console)
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
            if queue.stopping:
                asked_at = asked_at or now
                for worker in workers:  # one may have begun a job in the meantime
                    worker.ask_to_stop()
                    if now > asked_at + GRACE:
                        worker.kill()
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
