"""A tiny configuration with its data, commands run as a user runs them, an sshd and a Slurm of the tests' own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launch.daemons import Slurm, Ssh, missing_for_slurm, missing_for_ssh
from tests.launch.documents import documented
from tests.ranks import python_path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sys.executable).parent

CONFIG = {
    "model": {
        "vocab_size": 257,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "pattern": ["gated_delta"],
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 1,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "data": {"sequence_length": 256, "holdout": 0.2},
    # a plateau: losses do not depend on how many steps a run was meant to have
    "train": {"steps": 2, "schedule": "wsd", "decay_fraction": 0.0},
    # a core may be another's for a while
    "run": {"timeout": 60},
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs are made; ``tiny.yaml`` and its data lie there."""
    from dnsp.data.prepare import prepare

    folder = tmp_path_factory.mktemp("launch")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"line {n} " * 40}) + "\n" for n in range(20)))
    prepare(str(folder / "text.jsonl"), folder / "text", "bytes")
    tree = {**CONFIG, "data": {**CONFIG["data"], "sources": [{"path": str(folder / "text")}]}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    (folder / "launch").symlink_to(ROOT / "launch")  # commands are given where the repository is
    return folder


@pytest.fixture(scope="session")
def environ() -> dict[str, str]:
    """Of a command that finds this package and this Python's scripts; the ranks talk over loopback."""
    path = f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PATH": path}


@pytest.fixture(scope="session")
def launched(folder: Path, environ: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command in the folder."""

    def run(*command: str, timeout: float = 200, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=folder, env={**environ, **more}, capture_output=True, text=True, timeout=timeout
        )

    return run


@pytest.fixture(scope="session")
def whole_losses(folder: Path, launched: Callable[..., Any]) -> Callable[[int], list[float]]:
    """The losses of an uninterrupted run on two local ranks."""
    done: list[float] = []

    def losses(steps: int) -> list[float]:
        if len(done) < steps:
            command = documented("README.md", "dnsp train CONFIG --ranks", {"--ranks 8": "--ranks 2"})
            finished = launched("sh", "-c", f"{command} run.dir=whole-{steps} train.steps={steps}")
            assert finished.returncode == 0, finished.stderr
            done[:] = read_losses(folder / f"whole-{steps}")
        return done[:steps]

    return losses


def read_losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def losses() -> Callable[[Path], list[float]]:
    return read_losses


@pytest.fixture(scope="session")
def wait_for() -> Callable[..., None]:
    """Waits until ``true()`` is; fails with ``what()``."""

    def wait(true: Callable[[], Any], what: Callable[[], str], timeout: float = 180) -> None:
        deadline = time.monotonic() + timeout
        while not true():
            assert time.monotonic() < deadline, what()
            time.sleep(0.05)

    return wait


@pytest.fixture(scope="session")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ssh]:
    """Two hosts to log in to, 127.0.0.1 and 127.0.0.2."""
    if missing := missing_for_ssh():
        pytest.skip(f"needs {missing}: apt install openssh-server openssh-client pdsh")
    server = Ssh(tmp_path_factory.mktemp("ssh"))
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory, environ: dict[str, str]) -> Iterator[Slurm]:
    """A controller and two nodes."""
    if missing := missing_for_slurm():
        pytest.skip(f"needs {missing}: apt install slurm-wlm munge")
    cluster = Slurm(tmp_path_factory.mktemp("slurm"), environ)
    try:
        yield cluster
    finally:
        cluster.stop()
