"""The first call of a fresh process: with an empty Triton cache and no proofs, and with what that one left.

What counts is the first forward and backward pass, kernels compiled or loaded and proven in it; importing torch, what
torch imports for its first backward pass (sympy), and reaching the GPU come before it and are reported beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from dnsp.bench.delta_shapes import Shape

KINDS = {"cold": 30.0, "filled": 3.0}  # seconds of the first call, at most
CHILD_SECONDS = 1200
ROOT = str(Path(__file__).absolute().parents[2])  # what holds the package, installed or not


def first_calls(shapes: Sequence[Shape], console: Console) -> list[dict[str, Any]]:
    """Seconds of the first call of two processes a shape, printed as they come."""
    from dnsp.bench import common

    found = []
    for shape in shapes:
        table = common.make_table(str(shape), "s, first call", "at most", "forward", "backward", "second call", "start")
        calls: dict[str, Any] = {"name": str(shape), "shape": asdict(shape), "processes": []}
        with tempfile.TemporaryDirectory(prefix="dnsp-first-call-") as folder:
            for kind, limit in KINDS.items():
                with console.status(f"first call, {kind} caches: {shape}"):
                    row = _child(shape, Path(folder))
                calls["processes"].append({"caches": kind, "at_most_s": limit} | row)
                if "failure" in row:
                    console.print(f"{kind}: {row['failure']}", markup=False)
                    continue
                names = ("forward_s", "backward_s", "second_s", "start_s")
                table.add_row(kind, *(f"{s:.2f}" for s in (row["first_call_s"], limit, *(row[name] for name in names))))
        console.print(table)
        found.append(calls)
    return found


def _child(shape: Shape, folder: Path) -> dict[str, Any]:
    paths = [ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "DNSP_PROOFS": str(folder / "proofs"),
    }
    try:
        run = subprocess.run(
            [sys.executable, "-m", "dnsp.bench.cold"], input=json.dumps(asdict(shape)), env=environment,
            capture_output=True, text=True, timeout=CHILD_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failure": f"the process did not end within {CHILD_SECONDS} s"}
    if run.returncode:
        last = ([line.strip() for line in run.stderr.splitlines() if line.strip()] or ["nothing on stderr"])[-1]
        return {"failure": f"the process ended with status {run.returncode}: {last}"}
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    """A child: a shape on stdin, seconds on stdout."""
    began = time.perf_counter()
    import torch

    from dnsp.bench import common
    from dnsp.bench.delta_shapes import Shape, compute, make_inputs

    shape, device = Shape(**json.loads(sys.stdin.read())), common.find_device()
    inputs = make_inputs(shape, device)
    x = torch.ones(1, requires_grad=True)
    torch.autograd.grad(2 * x, x, torch.ones(1))  # a gradient that is given has torch import for 2 s

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    times = [now()]
    for _ in range(2):
        o = compute(shape, inputs)
        times.append(now())
        torch.autograd.grad(o, inputs.leaves, inputs.do)
        times.append(now())
    start, forward, backward, *_, end = times
    seconds = {"start_s": start - began, "first_call_s": backward - start, "forward_s": forward - start}
    print(json.dumps(seconds | {"backward_s": backward - forward, "second_s": end - backward}))


if __name__ == "__main__":
    main()
