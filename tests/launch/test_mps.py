"""NVIDIA's multi-process service: started, tried and ended; a program of our own plays its control."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from dnsp.launch.environment import LaunchError
from dnsp.launch.mps import CONTROL, NAMED, asked_for, shared_gpu

PLAY = """#!{python}
import os, sys
with open({log!r}, "a") as file:
    file.write(" ".join(sys.argv[1:]) + sys.stdin.read() * (len(sys.argv) == 1) + "\\n" * (len(sys.argv) > 1))
    assert os.path.isdir(os.environ["CUDA_MPS_PIPE_DIRECTORY"])
assert sys.argv[1:] != ["-d"] or "CUDA_VISIBLE_DEVICES" not in os.environ, "it would count its clients' devices anew"
if {fails!r}:
    sys.exit("no such GPU")
"""


@pytest.fixture(autouse=True)
def _nothing_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(NAMED, raising=False)


def play(folder: Path, fails: bool = False) -> Path:
    """The control program on the PATH, and where it writes down what it is told."""
    log, program = folder / "log", folder / CONTROL
    program.write_text(PLAY.format(python=sys.executable, log=str(log), fails=fails))
    program.chmod(0o755)
    return log


def test_a_daemon_of_our_own_is_started_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = play(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with shared_gpu() as variables:
        folder = variables[NAMED]
        assert os.path.isdir(folder) and log.read_text() == "-d\n"
    assert log.read_text() == "-d\nquit\n" and not os.path.exists(folder)


def test_where_there_is_none_or_one_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with shared_gpu() as variables:
        assert variables == {}
    assert capsys.readouterr().err == f"MPS: {CONTROL} is not on the PATH; the processes take turns on the GPU\n"
    with asked_for(None, "0") as (variables, words):
        assert variables == {} and words == f"MPS: {CONTROL} is not on the PATH; the processes take turns on the GPU"
    with asked_for(False, "0") as (variables, words):
        assert variables == {} and "not asked for" in words
    refused = pytest.raises(LaunchError, match=f"--mps: {CONTROL} is not on the PATH; leave --mps out")
    with refused, asked_for(True, "0"):
        pass
    log = play(tmp_path)
    monkeypatch.setenv(NAMED, "/somewhere")
    with shared_gpu() as variables, asked_for(None, "0") as (others, words):
        assert variables == others == {} and "which is not ours, is used" in words
    assert not log.exists() and not capsys.readouterr().err


def test_one_that_does_not_work(tmp_path: Path) -> None:
    play(tmp_path, fails=True)
    with shared_gpu() as variables:
        assert variables == {}
    with pytest.raises(LaunchError, match=rf"{CONTROL} does not work here \(no such GPU\)"), asked_for(True, "0"):
        pass


def test_a_client_without_a_gpu_says_so_and_nothing_is_left(tmp_path: Path) -> None:
    log = play(tmp_path)
    with asked_for(None, "-1") as (variables, words):
        assert variables == {} and "does not work here" in words
    assert log.read_text() == "-d\nquit\n"
