"""A process that carries out one job after another: starting Python, torch and DeepSpeed costs more than a small run.

A job comes as a line of JSON on standard input; what came of it goes back as a line on what was standard output. What a
run says goes to ``log.txt`` in its folder. ``result.json`` appears there whole or not at all, and is what makes a job
finished.
"""

from __future__ import annotations

import gc
import gzip
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from filelock import FileLock, Timeout

from dnsp import checkpoint, stalls
from dnsp.config import Config, parse_config
from dnsp.errors import RunError, UsageError
from dnsp.evaluate import load_run
from dnsp.json_files import json_line, json_text
from dnsp.launch.environment import find_environment
from dnsp.launch.local import SUPERVISOR
from dnsp.tasks.measure import measure

RESULT = "result.json"
PACKAGES = ("dnsp", "torch", "triton", "deepspeed", "liger-kernel", "numpy")
CURVE = 250  # steps of a run's curve
LONG = 2**17  # tokens of a test above which one process at a time asks it: 2^20 take 10 GB of a GPU and more
LEFT_OVER = 2**30  # bytes of GPU memory still taken between jobs: a new process takes over
DIVERGED = ("the loss is not finite", "the gradient norm is")


def serve(answers: IO[str]) -> None:
    """Jobs from standard input until it ends, what came of them to ``answers``."""
    # A run saves first. Whatever else is being done is left between two statements: on a GPU that loses a process in
    # the middle of a kernel others may fail.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    for line in sys.stdin:
        job = json.loads(line)
        answers.write(json.dumps(carry_out(job, Path(job["folder"]))) + "\n")
        answers.flush()


def carry_out(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One job in its folder. Returns ``status`` (finished, stopped or failed), ``message``, and whether this process
    should be followed by a new one."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a") as log:
        sys.stdout.flush()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            began = time.time()
            result = train_and_ask(job, folder) if job["kind"] == "train" else measured(job)
            if result is None:
                return {"status": "stopped"}
            whole = {**job, **result, **surroundings(), "seconds": time.time() - began}
            for place in ("queue", "folder"):
                whole.pop(place, None)
            replace_json(folder / RESULT, whole)
            make_small(folder)
            # processes that had held several models were seen to make tokens a tenth more slowly, nobody knows why
            return {"status": "finished", "recycle": job["kind"] == "speed" or _leftover()}
        except Exception as error:
            traceback.print_exc()
            return {
                "status": "failed",
                "message": f"{type(error).__name__}: {str(error).strip()[:500]}",
                "recycle": True,
            }
        finally:
            sys.stdout.flush()
            sys.stderr.flush()


def train_and_ask(job: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """A run by the ordinary loop, gone on with where it was, and its tests. None: it was asked to stop, and saved."""
    config = run_config(job, folder)
    began = time.time()
    try:
        figures = _go_on(config, folder, job.get("ranks") or 1)
    except RunError as error:
        if any(words in str(error) for words in DIVERGED):
            return {"outcome": "diverged", "message": str(error), "tests": {}, "training": training_record(folder)}
        raise
    if figures.get("stopped"):
        return None
    trained = time.time() - began
    model, config, _ = load_run(folder)
    tests = {}
    for name, test in job["tests"].items():
        with in_turn(job, test):
            tests[name] = measure(model, config, test)
    record = training_record(folder) | {"parameters": sum(p.numel() for p in model.parameters()), "last_s": trained}
    return {"outcome": "finished", "tests": tests, "training": record}


@contextmanager
def in_turn(job: dict[str, Any], test: dict[str, Any]) -> Iterator[None]:
    """Around a test; a long one is asked by one process of a device at a time, for runs that began together end
    together."""
    if test["length"] <= LONG or "queue" not in job:
        yield
        return
    device = re.sub(r"\W", "-", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    with FileLock(Path(job["queue"]) / f".long-{device}"):
        yield
        torch.cuda.empty_cache()  # the next process needs what this one took


def run_config(job: dict[str, Any], folder: Path) -> Config:
    """The configuration of a job's run."""
    tree = json.loads(json.dumps(job["config"]))
    for section, settings in {
        "train": {"lr": job["lr"], "seed": job["seed"]},
        "data": {"seed": job["data_seed"]},
        "run": {"dir": str(folder), "tensorboard": False},
    }.items():
        tree[section] = {**tree.get(section, {}), **settings}
    tree["checkpoint"] = {"every": job["checkpoint_every"], "keep": 1, **tree.get("checkpoint", {})}
    tree["resume"] = "auto"
    return parse_config(tree, job["name"])


def _go_on(config: Config, folder: Path, ranks: int) -> dict[str, Any]:
    try:
        return _train(config, folder, ranks)
    except UsageError:
        if not without_damaged(folder):
            raise
    return _train(config, folder, ranks)


def without_damaged(folder: Path) -> bool:
    """Remove a run's checkpoints where none is whole (copied while it was written, say) and no process is at it.
    Returns whether there were such: the run can begin anew."""
    try:
        with FileLock(folder / ".lock", blocking=False):
            if not checkpoint.checkpoints(folder) or checkpoint.latest(folder)[0] is not None:
                return False
            shutil.rmtree(folder / checkpoint.FOLDER)
            return True
    except Timeout:
        return False


def _train(config: Config, folder: Path, ranks: int) -> dict[str, Any]:
    if ranks == 1:
        from dnsp.train import train

        return train(config, find_environment(), name="task")
    settings, figures = folder / "ranks.yaml", folder / "figures.json"
    settings.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "dnsp", "train", str(settings), "--ranks", str(ranks), "--json", str(figures)]
    child = subprocess.Popen(
        command, env={**os.environ, SUPERVISOR: str(os.getpid())}, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    before = signal.signal(signal.SIGTERM, lambda number, frame: child.send_signal(number))
    try:
        _, said = child.communicate()
    finally:
        signal.signal(signal.SIGTERM, before)
    if child.returncode:
        raise (UsageError if child.returncode == 2 else RunError)(said.strip() or f"status {child.returncode}")
    found: dict[str, Any] = json.loads(figures.read_text())
    return found


def training_record(folder: Path) -> dict[str, Any]:
    """What the run's own ``metrics.jsonl`` says: steps, last and highest loss, highest gradient norm, speed, time."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not lines:
        return {"steps": 0}
    speeds = sorted(line["tokens_per_s"] for line in lines)
    return {
        "steps": lines[-1]["step"],
        "tokens": lines[-1]["tokens"],
        "loss": lines[-1]["loss"],
        "grad_norm_max": max((norm for line in lines if (norm := line["grad_norm"]) is not None), default=None),
        "tokens_per_s": speeds[len(speeds) // 2],
        "train_s": sum(line["step_s"] for line in lines),
    }


def measured(job: dict[str, Any]) -> dict[str, Any]:
    """What trains nothing: a module each, imported by who needs it."""
    if job["kind"] == "speed":
        from dnsp.tasks.speed import speed

        return {"outcome": "finished", "figures": speed(**job["arguments"])}
    if job["kind"] == "chunk":
        from dnsp.tasks.chunks import chunk

        return {"outcome": "finished", "figures": chunk(**job["arguments"])}
    from dnsp.tasks.pitfalls import demonstrate

    return {"outcome": "finished", "figures": demonstrate(**job["arguments"])}


def surroundings() -> dict[str, Any]:
    """Versions and device, as a result keeps them."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"versions": {package: _version(package) for package in PACKAGES}, "device_name": name}


def make_small(folder: Path) -> None:
    """A finished run's folder, of which there are hundreds and which may be sent elsewhere: without checkpoints and
    what a failure leaves, and with a curve of at most ``CURVE`` of its steps in place of the metrics. Its result is
    there already: on a full disk the metrics stay as they are."""
    packed = folder / "metrics.jsonl.gz"
    try:
        pack_metrics(folder / "metrics.jsonl", packed)
    except OSError as error:
        print(f"the metrics are not packed: {error}")
        packed.unlink(missing_ok=True)
    for name in (checkpoint.FOLDER, stalls.STACKS, "tensorboard"):  # the last in runs of earlier versions
        shutil.rmtree(folder / name, ignore_errors=True)


def pack_metrics(metrics: Path, packed: Path) -> None:
    """A curve of a run's metrics in their place."""
    if not metrics.exists():
        return
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    every = -(-len(lines) // CURVE)
    curve = [line for line in lines if line["step"] % every == 0 or line is lines[-1]]
    with gzip.open(packed, "wb") as file:
        for line in curve:
            short = {name: line[name] and float(f"{line[name]:.5g}") for name in ("loss", "grad_norm", "lr", "step_s")}
            file.write(json_line({"step": line["step"], **short}))
    metrics.unlink()


def read_curve(folder: Path) -> list[tuple[int, float]]:
    """Steps and losses of a finished run, as many as were kept; none where they are not there or not whole."""
    try:
        with gzip.open(folder / "metrics.jsonl.gz", "rt") as file:
            lines = [json.loads(line) for line in file]
        return [(line["step"], line["loss"]) for line in lines if line["loss"] is not None]
    except (OSError, EOFError, ValueError, KeyError):
        return []


def parse_result(text: str) -> dict[str, Any]:
    """What is in a ``result.json``. A figure of a test that is ``null`` there is not a number."""
    found: dict[str, Any] = json.loads(text)
    for figures in found.get("tests", {}).values():
        figures.update({name: math.nan for name, value in figures.items() if value is None})
    return found


def replace_json(path: Path, tree: Any) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.write(json_text(tree))
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _leftover() -> bool:
    gc.collect()
    if not torch.cuda.is_available():
        return False
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated() > LEFT_OVER


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
