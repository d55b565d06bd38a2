"""A small corpus, a tiny model and real command lines for the tests of what a user runs."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.ranks import python_path

ROOT = Path(__file__).resolve().parents[2]

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
    "data": {"sequence_length": 512, "holdout": 0.2},
    # a plateau from the third step on: losses do not depend on how many steps a run was meant to have
    "train": {"steps": 12, "lr": 1e-2, "warmup_steps": 2, "schedule": "wsd", "decay_fraction": 0.0},
    "checkpoint": {"every": 2, "keep": 3},
    "eval": {"sequences": 2},
}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "dnsp", *map(str, arguments)]


def environment() -> dict[str, str]:
    """Of a child that finds the package wherever it runs, and whose output is buffered as a user's is."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return {**inherited, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def dnsp() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``dnsp ARGUMENTS`` in a folder as a process of its own."""

    def run(*arguments: object, cwd: Path, timeout: float = 90, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*arguments), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout, **options
        )

    return run


@pytest.fixture(scope="session")
def start() -> Callable[..., subprocess.Popen[str]]:
    """Starts ``dnsp ARGUMENTS`` in a folder and does not wait."""

    def run(*arguments: object, cwd: Path, stdout: Any = subprocess.PIPE) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command(*arguments),
            cwd=cwd,
            env=environment(),
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of 300 short documents of words, with something to learn in them."""
    from dnsp.data.prepare import prepare

    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    words = ["delta", "rule", "state", "gate", "key", "value", "chunk", "segment"]
    lines = [{"text": " ".join(draw.choices(words, k=draw.randint(3, 120)))} for _ in range(300)]
    (folder / "words.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare(str(folder / "words.jsonl"), folder / "words", "bytes")
    return folder / "words"


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A folder with ``tiny.yaml`` in it, where runs are made."""
    folder = tmp_path_factory.mktemp("work")
    tree = {**TINY, "data": {**TINY["data"], "sources": [{"path": str(corpus)}]}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    return folder


@pytest.fixture(scope="session")
def reference(workplace: Path, dnsp: Callable[..., Any]) -> Path:
    """An uninterrupted run on two ranks: ``reference/`` with what it said in ``said.txt`` and ``figures.json``."""
    done = dnsp(
        *("train", "tiny.yaml", "--ranks", 2, "--json", "figures.json", "run.dir=reference"),
        *("eval.every=4", "generate.tokens=20"),
        cwd=workplace,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (workplace / "said.txt").write_text(done.stdout)
    return workplace / "reference"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]  # NaN is none of JSON's words


def read_losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run)]


@pytest.fixture(scope="session")
def metrics() -> Callable[[Path], list[dict[str, Any]]]:
    return read_metrics


@pytest.fixture(scope="session")
def losses() -> Callable[[Path], list[float]]:
    return read_losses
