"""A billion parameters at 32,768 tokens on one GPU: the probe, a save, a kill in the middle of the next, a resumption.

    python -m pytest -m gpu tests/dnsp/test_one_gpu.py -s [-k "ZeRO-1"]

prints the figures in its last lines. It is meant for a GPU of 80 GB or more, and needs 45 GiB of disk where pytest has
its folders (``--basetemp``) and nothing from outside: the text is Python's own library, as bytes.
"""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dnsp import checkpoint

ROOT = Path(__file__).resolve().parents[2]
EVERY, AFTER = 5, 12  # steps: of checkpoints, and at which the resumed run ends
SAME = 1e-5  # relative difference of a loss that was computed again
PROBE = 5e-5
ONE_GPU = (
    *("data.sources=[{path: python-stdlib}]", "data.tokenizer=bytes", "data.holdout=0.05"),
    *("parallel.sequence=1", "train.global_batch=1", "train.warmup_steps=2", "train.decay_fraction=0.0"),
    *("eval.every=0", "eval.sequences=1", "engine.deterministic=true"),
)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", [1, 2], ids=["ZeRO-1", "ZeRO-2"])
def test_a_billion_parameters(
    stage: int,
    tmp_path: Path,
    start: Callable[..., subprocess.Popen[str]],
    dnsp: Callable[..., Any],
    metrics: Callable[[Path], list[dict[str, Any]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = (ROOT / "configs" / "1b_32k.yaml", *ONE_GPU, f"engine.zero_stage={stage}")
    try:
        said = killed_and_resumed(tmp_path, settings, start, dnsp, metrics)
    finally:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)  # pytest would keep 14 GiB of it
    with capsys.disabled():
        print(f"\nZeRO {stage}, bf16, one {gpu()}:", *said, sep="\n  ")


def killed_and_resumed(
    folder: Path,
    settings: tuple[Any, ...],
    start: Callable[..., subprocess.Popen[str]],
    dnsp: Callable[..., Any],
    metrics: Callable[[Path], list[dict[str, Any]]],
) -> list[str]:
    """One run, killed while it writes its second checkpoint, and what it makes of the first. Returns the figures."""
    run = folder / "run"
    command = ("train", *settings, f"run.dir={run}", "resume=auto", f"checkpoint.every={EVERY}", "checkpoint.keep=1")
    process = start(*command, "train.steps=1000", cwd=folder)
    try:
        part = run / "checkpoints" / f".step-{2 * EVERY:08d}.part"
        while not part.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
    finally:
        process.kill()
    stdout, _ = process.communicate()
    before = {record["step"]: record for record in metrics(run)}
    (saved,) = checkpoint.checkpoints(run)
    goes_on = checkpoint.step_of(saved)

    began = time.monotonic()
    done = dnsp(*command, f"train.steps={AFTER}", cwd=folder, timeout=600)
    took = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    after = {record["step"]: record for record in metrics(run)}
    again = [step for step in before if step > goes_on and step in after]
    assert again and all(before[step]["time"] != after[step]["time"] for step in again)
    errors = [abs(after[step]["loss"] / before[step]["loss"] - 1) for step in again]

    said = stdout + done.stdout
    probes = re.findall(r"after the reduction, within (\S+) \(asked in (\S+) s\)", said)
    saves = [line for line in said.splitlines() if "training stood still" in line]
    assert len(probes) == 2 and saves, said
    parameters = next(line for line in stdout.splitlines() if " parameters, " in line)
    steady = [record for step, record in sorted(after.items()) if step not in (1, 2, goes_on + 1, goes_on + 2)]
    speed = statistics.median(record["tokens_per_s"] for record in steady)
    mfus = [record["mfu"] for record in steady if "mfu" in record]
    peak = max((record.get("peak_gib", 0.0) for record in after.values()), default=0.0)
    assert errors and max(errors) <= SAME, errors
    assert all(float(error) <= PROBE for error, _ in probes)
    return [
        parameters.partition(";")[0],
        *(f"probe: within {error} in {seconds} s" for error, seconds in probes),
        *saves,
        f"kill -9 while step {2 * EVERY} was being written; resumed from step {goes_on}, at its end after {took:.0f} s",
        f"losses of steps {again[0]} to {again[-1]} again: "
        + ("the same bits" if not any(errors) else f"worst relative difference {max(errors):.1e}"),
        f"{speed:,.0f} tokens/s" + (f", MFU {statistics.median(mfus):.3f} (best step {max(mfus):.3f})" if mfus else ""),
        f"peak memory {peak:.1f} GiB",
    ]


def gpu() -> str:
    asked = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    return asked.stdout.splitlines()[0] if asked.stdout else "GPU"
