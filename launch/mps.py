"""Processes that share a GPU at the same time: NVIDIA's multi-process service (MPS), started where it is not running.

Without it the processes take turns on the GPU, which is right and slow: a rank that waits for another keeps its turn.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CONTROL = "nvidia-cuda-mps-control"
SECONDS = 20  # that the daemon may take to start, and to end


@contextmanager
def shared_gpu() -> Iterator[dict[str, str]]:
    """Variables for the environment of processes that are to share a GPU; empty where there is nothing to start.

    A daemon that the environment names already is used as it is. Processes started with these variables must have ended
    when the block ends.
    """
    if "CUDA_MPS_PIPE_DIRECTORY" in os.environ or shutil.which(CONTROL) is None:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="dnsp-mps-") as name:
        variables = {}
        for kind in ("PIPE", "LOG"):
            folder = Path(name, kind.lower())
            folder.mkdir()
            variables[f"CUDA_MPS_{kind}_DIRECTORY"] = str(folder)
        environment = os.environ | variables
        try:
            subprocess.run([CONTROL, "-d"], env=environment, check=True, capture_output=True, timeout=SECONDS)
        except (OSError, subprocess.SubprocessError):
            yield {}
            return
        try:
            yield variables
        finally:
            with suppress(OSError, subprocess.SubprocessError):
                subprocess.run([CONTROL], input=b"quit\n", env=environment, capture_output=True, timeout=SECONDS)
