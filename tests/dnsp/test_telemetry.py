"""What is left of a run's records and words while the disk under them is full."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dnsp import telemetry
from dnsp.telemetry import Telemetry

RECORD = {"loss": 1.0, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_s": 1.0, "step_s": 1.0}
MANY = 1000  # steps: no line of progress is due for being the last


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """No file of this process grows beyond ``size`` bytes."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def open_run(folder: Path, monkeypatch: pytest.MonkeyPatch, tensorboard: bool = False) -> tuple[Telemetry, Path]:
    """And the file that standard output goes to, buffered as a user's is."""
    output = folder.with_name("output")
    monkeypatch.setattr(sys, "stdout", output.open("w"))
    return Telemetry(folder, MANY, tensorboard=tensorboard), output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_words_that_find_no_room_come_later_and_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, output = open_run(folder, monkeypatch)
    print("from elsewhere")
    sys.stdout.flush()
    run.say("before")
    with files_end_at(output.stat().st_size):
        for n in range(50):
            run.say(f"late {n}")
    run.say("after")
    run.say("at last")
    late = [f"late {n}" for n in range(50)]
    assert output.read_text().splitlines() == ["from elsewhere", "before", *late, "after", "at last"]


def test_words_are_not_kept_without_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, output = open_run(folder, monkeypatch)
    monkeypatch.setattr(telemetry, "BACKLOG", 20)
    with files_end_at(3):
        for n in range(50):
            run.say(f"late {n}")
    run.say("after")
    assert output.read_text().splitlines() == ["late 0", "late 1", "late 2", "after"]


def test_a_line_that_is_cut_short_is_taken_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the next one would be glued to it, and both be dropped when the run goes on."""
    run, _ = open_run(folder, monkeypatch)
    for write, name in (
        (lambda step: run.step({"step": step, **RECORD}), "metrics.jsonl"),
        (lambda step: run.evaluation(step, {"loss": 1.0, "by_position": {}}), "evaluations.jsonl"),
        (lambda step: run.ranks({"step": step, "data_s": [0.1, 0.2]}), "ranks.jsonl"),
    ):
        run.last_ranks = float("-inf")
        write(1)
        with files_end_at((folder / name).stat().st_size + 5):
            run.last_ranks = float("-inf")
            write(2)
        write(3)  # ranks too: what failed is due
        assert steps(folder / name) == [1, 3], name
    run.close()
    Telemetry(folder, MANY, start=3, tensorboard=False).close()
    assert steps(folder / "evaluations.jsonl") == [1, 3]


class Board:
    """A writer of TensorBoard's that says what is done to it."""

    def __init__(self, done: list[str]) -> None:
        self.done, self.full = done, False

    def add_scalar(self, name: str, value: float, step: int) -> None:
        if self.full:
            raise OSError(28, "No space left on device")

    def close(self) -> None:
        self.done.append("closed")
        if self.full:
            raise OSError(28, "No space left on device")


def test_an_outage_begins_and_ends_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    boards: list[Board] = []

    def new_board(**_: Any) -> Board:
        boards.append(Board(done))
        return boards[-1]

    run, output = open_run(folder, monkeypatch)
    run._new_board = new_board
    run.step({"step": 1, **RECORD})
    (first,) = boards
    with monkeypatch.context() as patch:  # one file of three
        patch.setattr(telemetry, "RANKS_INTERVAL", 0.0)
        (folder / "ranks.jsonl").mkdir()
        for step in (2, 3, 4):
            run.ranks({"step": step})
            run.step({"step": step, **RECORD})
        (folder / "ranks.jsonl").rmdir()
        run.ranks({"step": 5})
    run.step({"step": 5, **RECORD})
    assert boards == [first] and not done  # it has nothing to do with it
    first.full = True
    run.step({"step": 6, **RECORD})
    run.step({"step": 7, **RECORD})
    assert len(boards) == 2 and done == ["closed"]
    assert steps(folder / "metrics.jsonl") == [1, 2, 3, 4, 5, 6, 7]
    said = [line for line in output.read_text().splitlines() if "RECORDED" in line or "again" in line]
    assert [line.split()[0] for line in said] == ["NOT", str(folder)] * 2, said


def test_a_roll_back_needs_no_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, output = open_run(folder, monkeypatch, tensorboard=True)
    for step in (1, 2, 3):
        run.step({"step": step, **RECORD})
    with files_end_at(1):
        run.back_to(1)
        assert steps(folder / "metrics.jsonl") == [1]
        run.step({"step": 2, **RECORD})
    run.step({"step": 3, **RECORD})
    run.close()
    assert steps(folder / "metrics.jsonl") == [1, 3]
    assert output.read_text().count("NOT RECORDED") <= 1
