"""What a run says: one JSON line a step, TensorBoard, and the line that a person watches. Rank 0 alone."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dnsp.errors import RunError
from dnsp.figures import FIGURES, shares

PLAIN_INTERVAL = 2.0  # seconds between lines when the output is not a terminal
CURVES = ("loss", "grad_norm", "lr", "tokens_per_s")
RANKS_INTERVAL = 10.0  # seconds between lines of ranks.jsonl


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
            self.path = folder / "metrics.jsonl"
            _keep_until(self.path, start)
            _keep_until(folder / "evaluations.jsonl", start)
            _keep_until(folder / "ranks.jsonl", start)
            self.file = self.path.open("a")
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                # TensorBoard writes in a thread of its own; what fails there is raised by the next write here
                threading.excepthook = _not_twice
                self._new_board = partial(SummaryWriter, str(folder / "tensorboard"))
                self._board = self._new_board(purge_step=start + 1)
        except OSError as error:
            why = f"cannot write into {folder}: {error.strerror}"
            raise RunError(f"{why}; make room there, then resume=auto continues the run") from None
        self._unrecorded = False  # since the last record
        self.console = Console(highlight=False, soft_wrap=True)
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
        """One optimizer step's figures: step, loss, grad_norm, lr, tokens_per_s, tokens, time, ..."""
        if self.folder is None:
            return
        with self._recording():
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
            self._scalars("train", {name: record[name] for name in CURVES}, record["step"])
            self._scalars("machine", {name: record[name] for name in record.keys() & {*FIGURES}}, record["step"])
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
        self.last_ranks = now
        with self._recording(board=False), (self.folder / "ranks.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def evaluation(self, step: int, figures: dict[str, Any]) -> None:
        """Held-out figures: ``loss`` and ``by_position`` under the step they belong to."""
        if self.folder is None:
            return
        with self._recording():
            with (self.folder / "evaluations.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, **figures}) + "\n")
            self._scalars("heldout", {"loss": figures["loss"]}, step)
            self._scalars("heldout_by_position", figures["by_position"], step)
        self.say(f"step {step}: held-out loss {figures['loss']:.4f}")

    def _scalars(self, group: str, values: dict[str, float], step: int) -> None:
        if (board := self.board) is not None:
            for name, value in values.items():
                board.add_scalar(f"{group}/{name}", value, step)

    def say(self, text: str) -> None:
        """A line above the progress line; lost where the output is a file on a disk that is full."""
        if self.folder is not None:
            with suppress(OSError):
                self.progress.console.print(text, markup=False)

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

    @property
    def board(self) -> Any:
        """TensorBoard's writer, None without one; after one whose thread a full disk has ended, another."""
        if self._board is None and self._new_board is not None:
            self._board = self._new_board()
        return self._board

    @contextmanager
    def _recording(self, board: bool = True) -> Iterator[None]:
        """Around a record: where it cannot be written the run goes on without it, and says so once. ``board``:
        TensorBoard's writer was in it."""
        try:
            yield
        except OSError as error:
            self._board = None if board else self._board
            if not self._unrecorded:
                self.say(f"NOT RECORDED: cannot write into {self.folder}: {error.strerror}; the run goes on")
            self._unrecorded = True
        else:
            if self._unrecorded:
                self.say(f"{self.folder} can be written again")
            self._unrecorded = False


def _not_twice(failure: threading.ExceptHookArgs) -> None:
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines of steps after ``step``, which will be done again, and a line cut short by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    new = path.with_suffix(".part")
    new.write_text("".join(line + "\n" for line in kept))
    os.replace(new, path)
