"""A GPU a rank, where NCCL carries what does not go by peer: the losses of one, and who is named when a rank hangs.

    python -m pytest -m gpu tests/dnsp/test_two_gpus.py
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

SAME = 1e-4  # relative difference of a loss in fp32
DEADLINE, LATER, STARTED = 6.0, 30.0, 240.0  # seconds: run.timeout, until all have ended, until kernels are proven
KEYS = {"peer": "peer", "p2p": "ring"}


def settings(transport: str, run: str, steps: int) -> tuple[object, ...]:
    ways = (f"parallel.transport={transport}", f"parallel.attention_transport={KEYS[transport]}")
    less = ("eval.every=0", "checkpoint.every=0")
    return ("tiny.yaml", *ways, f"run.dir={run}", f"run.timeout={DEADLINE}", f"train.steps={steps}", *less)


@pytest.mark.parametrize("transport", list(KEYS))
def test_two_gpus_have_the_losses_of_one(
    transport: str, workplace: Path, dnsp: Callable[..., Any], losses: Callable[[Path], list[float]]
) -> None:
    found = []
    for ranks in (1, 2):
        run = f"{transport}-{ranks}"
        way = transport if ranks == 2 else "p2p"
        done = dnsp("train", "--ranks", ranks, *settings(way, run, 12), cwd=workplace, timeout=STARTED)
        assert done.returncode == 0, done.stderr
        found.append(losses(workplace / run))
    assert len(found[0]) == len(found[1]) == 12
    for one, two in zip(*found, strict=True):
        assert abs(two / one - 1) < SAME, found


@pytest.mark.parametrize("transport", list(KEYS))
def test_a_rank_that_hangs_is_named(
    transport: str, workplace: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """By peer the wait itself says who did not deliver, in which layer (where the rank was stopped before its last
    message); NCCL's says nothing, and the stacks do."""
    run = workplace / f"hung-{transport}"
    process = start("train", "--ranks", 2, *settings(transport, run.name, 100_000), cwd=workplace)
    deadline = time.monotonic() + STARTED
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 5:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    ranks = psutil.Process(process.pid).children()
    next(rank for rank in ranks if rank.environ()["RANK"] == "1").suspend()
    try:
        _, stderr = process.communicate(timeout=DEADLINE + LATER)
    finally:
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.kill()
    assert process.returncode == 1 and "rank 1 left no stack: stopped or gone" in stderr, stderr
    told = [r"no progress for \d+ s: rank 0 .+; it waits for \S+"]
    told += [r"rank 0 lost rank 1 during .+ of layer \d"] if transport == "peer" else []
    assert any(re.search(words, stderr) for words in told), stderr
    _, alive = psutil.wait_procs(ranks, timeout=5)
    assert not alive
