"""What a run says: one JSON line a step, TensorBoard, and the line that a person watches. Rank 0 alone."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from io import FileIO, TextIOWrapper
from pathlib import Path
from typing import IO, Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dnsp.errors import RunError
from dnsp.figures import FIGURES, shares
from dnsp.json_files import json_line

PLAIN_INTERVAL = 2.0  # seconds between lines when the output is not a terminal
CURVES = ("loss", "grad_norm", "lr", "tokens_per_s")
RANKS_INTERVAL = 10.0  # seconds between lines of ranks.jsonl
BACKLOG = 2**20  # bytes
RECORDS = ("metrics.jsonl", "evaluations.jsonl", "ranks.jsonl")


class Telemetry:
    """Writes ``metrics.jsonl`` and TensorBoard events into the run folder and keeps the progress line.

    Args:
        folder: the run folder; None on ranks that say nothing.
        steps: of the whole run.
        start: steps done already; later lines of an earlier attempt are dropped.
        tensorboard: whether TensorBoard's files are written too.
    """

    def __init__(self, folder: Path | None, steps: int, start: int = 0, tensorboard: bool = True) -> None:
        self.folder, self.steps, self.last_plain = folder, steps, 0.0
        if folder is None:
            return
        self._new_board: Callable[..., Any] | None = None
        self._board: Any = None
        try:
            for name in RECORDS:
                _keep_until(folder / name, start)
            self.file = _open(folder / "metrics.jsonl")
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                # TensorBoard writes in a thread of its own; what fails there is raised by the next write here
                threading.excepthook = _not_twice
                self._new_board = partial(SummaryWriter, str(folder / "tensorboard"))
                self._board = self._new_board(purge_step=start + 1)
        except OSError as error:
            why = f"cannot write into {folder}: {error.strerror}"
            raise RunError(f"{why}; make room there, then resume=auto continues the run") from None
        self._unrecorded = False  # said, and not taken back yet
        self._failed = False  # something could not be recorded since the last step
        self.console = Console(file=_standard_output(), highlight=False, soft_wrap=True)
        self.progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=8),
            TextColumn("{task.description}"),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[shares]}"),
            console=self.console,
            refresh_per_second=2,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task("", total=steps, completed=start, shares="")
        self.last_ranks = float("-inf")
        self.progress.start()

    def step(self, record: dict[str, Any]) -> None:
        """One optimizer step's figures: step, loss, grad_norm, lr, tokens_per_s, tokens, time, ...; of a step that was
        skipped loss and grad_norm are not finite, and null in the file."""
        if self.folder is None:
            return
        with self._recording():
            _append(self.file, record)
        curves = {f"train/{name}": record[name] for name in CURVES}
        machine = {f"machine/{name}": record[name] for name in record.keys() & {*FIGURES}}
        self._scalars(curves | machine, record["step"])
        if self._unrecorded and not self._failed:
            self.say(f"{self.folder} can be written again")
            self._unrecorded = False
        self._failed = False
        speed, norm = record["tokens_per_s"], record["grad_norm"]
        line = f"loss {record['loss']:.4f} {speed:,.0f} tokens/s gradient norm {norm:.3f}"
        self.progress.update(self.task, completed=record["step"], description=line, shares=shares(record))
        now = time.monotonic()
        last = record["step"] == self.steps
        if not self.console.is_terminal and (now - self.last_plain > PLAIN_INTERVAL or last):
            left = (self.steps - record["step"]) * record["step_s"]
            self.say(f"step {record['step']}/{self.steps} {line} {left:.0f} s left {shares(record)}")
            self.last_plain = now

    def ranks(self, record: dict[str, Any]) -> None:
        """Figures of each rank after a step, every few seconds: ``ranks.jsonl``."""
        now = time.monotonic()
        if self.folder is None or (now - self.last_ranks < RANKS_INTERVAL and record["step"] != self.steps):
            return
        with self._recording():
            with _open(self.folder / "ranks.jsonl") as file:
                _append(file, record)
            self.last_ranks = now

    def evaluation(self, step: int, figures: dict[str, Any]) -> None:
        """Held-out figures: ``loss`` and ``by_position`` under the step they belong to."""
        if self.folder is None:
            return
        with self._recording(), _open(self.folder / "evaluations.jsonl") as file:
            _append(file, {"step": step, **figures})
        by_position = {f"heldout_by_position/{name}": value for name, value in figures["by_position"].items()}
        self._scalars({"heldout/loss": figures["loss"], **by_position}, step)
        self.say(f"step {step}: held-out loss {figures['loss']:.4f}")

    def back_to(self, step: int) -> None:
        """Drop what was recorded of the steps after ``step``: they are done again."""
        if self.folder is None:
            return
        with self._recording():
            for name in RECORDS:
                _keep_until(self.folder / name, step)
            self.file.close()
            self.file = _open(self.folder / "metrics.jsonl")
        self._drop_board()
        with self._recording():
            self._board = self._new_board(purge_step=step + 1) if self._new_board else None
        self.progress.update(self.task, completed=step)

    def _scalars(self, values: dict[str, float], step: int) -> None:
        """Into TensorBoard; after a writer whose thread a full disk has ended, into another."""
        if self._new_board is None:
            return
        with self._recording():
            self._board = self._board or self._new_board()
            try:
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)
            except OSError:
                self._drop_board()
                raise

    def _drop_board(self) -> None:
        board, self._board = self._board, None
        if board is not None:
            with suppress(OSError):
                board.close()

    def say(self, what: RenderableType, style: str | None = None) -> None:
        """A line, or a table, above the progress line; late or lost where the output is a file on a full disk."""
        if self.folder is not None:
            self.console.print(what, markup=False, style=style)

    def stop(self) -> None:
        """End the progress line: the terminal is the caller's again."""
        if self.folder is not None:
            self.progress.stop()

    def close(self) -> None:
        self.stop()
        if self.folder is not None:
            if self._board is not None:
                with self._recording():
                    self._board.close()
            with self._recording():
                self.file.close()

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Around a record: where it cannot be written the run goes on without it, and says so until a whole step is
        recorded again once."""
        try:
            yield
        except OSError as error:
            if not self._unrecorded:
                self.say(f"NOT RECORDED: cannot write into {self.folder}: {error.strerror}; the run goes on")
            self._unrecorded = self._failed = True


class _Patient(FileIO):
    """Never fails: what cannot be written goes out before the next write, once; beyond a BACKLOG it is lost."""

    backlog = b""

    def write(self, data: Any) -> int:
        self.backlog += data
        with suppress(OSError):
            while self.backlog and (written := super().write(self.backlog)):
                self.backlog = self.backlog[written:]
        if len(self.backlog) > BACKLOG:
            self.backlog = self.backlog[: -len(data)]
        return len(data)


def _standard_output() -> IO[str]:
    """For the console. Where Python's own fails, the console keeps its lines as well, and they come out many times."""
    with suppress(OSError):
        sys.stdout.flush()  # what was said before comes before
    try:
        raw = _Patient(sys.stdout.fileno(), "w", closefd=False)
    except OSError:  # it is no file
        return sys.stdout
    return TextIOWrapper(raw, sys.stdout.encoding, sys.stdout.errors, write_through=True)


def _open(path: Path) -> FileIO:
    """For :func:`_append`: without a buffer, which would keep what could not be written."""
    return FileIO(path, "a")


def _append(file: FileIO, record: dict[str, Any]) -> None:
    """A line of JSON or nothing: half a line would be glued to the next one."""
    line = json_line(record)
    size = os.fstat(file.fileno()).st_size
    try:
        while line:
            line = line[file.write(line) :]
    except OSError:
        with suppress(OSError):
            file.truncate(size)
        raise


def _not_twice(failure: threading.ExceptHookArgs) -> None:
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines of steps after ``step``, which will be done again, and a line cut short by a kill."""
    if not path.exists():
        return
    kept, old = b"", path.read_bytes()
    for line in old.splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept += line + b"\n"
        except (ValueError, KeyError):
            continue
    if old.startswith(kept):
        os.truncate(path, len(kept))  # needs no room on the disk
        return
    new = path.with_suffix(".part")
    new.write_bytes(kept)
    os.replace(new, path)
