"""The launchers themselves: the same command is a rank of torchrun, of deepspeed, and of nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dnsp.launch.local import free_port

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
    "train": {"steps": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dnsp.data.prepare import prepare

    folder = tmp_path_factory.mktemp("launch")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"line {n} " * 40}) + "\n" for n in range(20)))
    prepare(str(folder / "text.jsonl"), folder / "text", "bytes")
    tree = {**CONFIG, "data": {**CONFIG["data"], "sources": [{"path": str(folder / "text")}]}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    return folder


def launched(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environ["PATH"] = f"{SCRIPTS}{os.pathsep}{environ['PATH']}"
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=100)


@pytest.mark.slow
def test_torchrun(folder: Path) -> None:
    torchrun = (str(SCRIPTS / "torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "dnsp")
    done = launched(folder, *torchrun, "train", "tiny.yaml", "run.dir=torchrun")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder: torchrun") == 1
    # a refusal is said once, whatever torchrun says around it
    done = launched(folder, *torchrun, "train", "tiny.yaml", "run.dir=torchrun")
    assert done.returncode != 0
    assert done.stderr.count("error: torchrun holds a run already") == 1


@pytest.mark.slow
def test_deepspeed(folder: Path) -> None:
    deepspeed = (str(SCRIPTS / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port()))
    done = launched(folder, *deepspeed, "--module", "dnsp", "train", "tiny.yaml", "run.dir=deepspeed")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder: deepspeed") == 1
    assert len((folder / "deepspeed" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_a_master_port_in_use(folder: Path) -> None:
    """Rank 0 of a launcher that does not look: it says so, and the others do not wait for it."""
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        deepspeed = (str(SCRIPTS / "deepspeed"), "--num_accelerators", "2", "--master_port", str(port))
        done = launched(folder, *deepspeed, "--module", "dnsp", "train", "tiny.yaml", "run.dir=busy")
    assert done.returncode == 2, done.stderr
    assert f"127.0.0.1:{port}: the port is in use" in done.stderr
