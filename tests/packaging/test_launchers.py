"""The same run under every launcher: ours, torchrun and deepspeed start the same two ranks; the losses are equal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dnsp.launch.local import free_port

BIN = Path(sys.executable).parent
TINY = {
    "model": {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "pattern": ["gated_delta", "attention"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "data": {"sequence_length": 512},
    "train": {"steps": 2},
    "eval": {"sequences": 1},
}


def losses(launcher: list[str | Path], options: list[str], where: Path) -> list[float]:
    """Train for two steps; the losses that the run folder holds."""
    where.mkdir()
    (where / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    # deepspeed's launcher starts the python that it finds first
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = [*map(str, launcher), "train", "tiny.yaml", "run.dir=run", *options]
    done = subprocess.run(command, cwd=where, env=env, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads(line)["loss"] for line in (where / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_launcher_starts_the_same_run(tmp_path: Path) -> None:
    ours = losses([BIN / "dnsp"], ["--ranks", "2"], tmp_path / "dnsp")
    torchrun = [BIN / "torchrun", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "dnsp"]
    deepspeed = [BIN / "deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "--module", "dnsp"]
    assert len(ours) == 2 and ours[0] > ours[1]
    assert losses(torchrun, [], tmp_path / "torchrun") == ours
    assert losses(deepspeed, [], tmp_path / "deepspeed") == ours
