"""compute-sanitizer over a small run of every kernel (:mod:`tests.kernels.sanitize`), where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dnsp.kernels import chunk_triton
from tests.kernels import sanitize

ROOT = Path(__file__).parents[2]
RUN = [sys.executable, "-m", "tests.kernels.sanitize"]
FOUND = 97  # the exit status of a sanitizer that found something
# What each tool is told, and says where it found nothing. Errors that CUDA returns to torch, which asks it for what
# this driver or device may not have, are no errors of kernels.
TOOLS = {
    "memcheck": (["--report-api-errors", "no"], r"ERROR SUMMARY: 0 errors"),
    "racecheck": ([], r"RACECHECK SUMMARY: 0 hazards displayed \(0 errors, 0 warnings\)"),
}


def test_no_kernel_is_left_out() -> None:
    """A kernel by any other way than the modules that the run knows would not be missed by it."""
    texts = [file.read_text() for file in (ROOT / "kernels").glob("*.py")]
    assert sanitize.kernels() == {name for text in texts for name in re.findall(r"^def (\w+_kernel)\(", text, re.M)}


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_every_kernel_is_launched_on_gpu() -> None:
    run = subprocess.run(RUN, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    hopper = torch.cuda.get_device_capability()[0] == 9
    missing = set(json.loads(run.stdout.splitlines()[-1])["missing"])
    found = vars(chunk_triton).items()
    of_hopper = {name for name, x in found if name.endswith("_kernel") and x.is_gluon()}
    assert missing == (set() if hopper else of_hopper)


@pytest.mark.gpu
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("tool", TOOLS)
def test_nothing_is_found_on_gpu(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on the PATH (it comes with the CUDA toolkit)")
    options, nothing = TOOLS[tool]
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), *options, *RUN]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    said = [line for line in (run.stdout + run.stderr).splitlines() if line.startswith("=========")]
    assert run.returncode == 0 and re.search(nothing, "\n".join(said)), (run.returncode, said[:60], run.stderr[-1000:])
