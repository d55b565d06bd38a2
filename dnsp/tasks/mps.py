"""NVIDIA's Multi-Process Service for the time of a queue: without it processes that share a GPU take turns."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from dnsp.errors import UsageError

CONTROL = "nvidia-cuda-mps-control"
PATIENCE = 120.0  # seconds that a first client may take
_CHECK = "import torch; x = torch.ones(64, device='cuda'); assert float((x + x).sum()) == 128"


class Mps:
    """wanted: True refuses to go without, False does not start it, None uses it where it works."""

    def __init__(self, out: Path, wanted: bool | None) -> None:
        self.out, self.wanted = out, wanted
        self.environ: dict[str, str] = {}
        self._running = False
        self._folder: str | None = None

    def start(self, device: str) -> str:
        """Start a daemon of our own and try a client on it. Returns in words what came of it.

        Raises UsageError where it was asked for and does not work.
        """
        if self.wanted is False:
            return "MPS: not asked for; the processes take turns on the GPU"
        if self.wanted is None and os.environ.get("CUDA_MPS_PIPE_DIRECTORY"):
            return "MPS: the daemon of CUDA_MPS_PIPE_DIRECTORY, which is not ours, is used"
        if shutil.which(CONTROL) is None:
            return self._without(f"{CONTROL} is not on the PATH")
        self._folder = tempfile.mkdtemp(prefix="dnsp-mps-")  # the path of a socket in it is short
        own = {"CUDA_MPS_PIPE_DIRECTORY": self._folder, "CUDA_MPS_LOG_DIRECTORY": self._folder}
        environ = {**os.environ, **own}
        try:
            subprocess.run([CONTROL, "-d"], env=environ, check=True, capture_output=True, timeout=30)
            self._running = True
            self.environ = own
            client = {**environ, "CUDA_VISIBLE_DEVICES": device}
            subprocess.run(
                [sys.executable, "-c", _CHECK], env=client, check=True, capture_output=True, timeout=PATIENCE
            )
        except (OSError, subprocess.SubprocessError) as error:
            self.stop()
            said = getattr(error, "stderr", None) or b""
            last = (said.decode(errors="replace").strip().splitlines() or [""])[-1]
            return self._without(f"{CONTROL} does not work here ({last or error})")
        return "MPS: the processes share the GPU"

    def stop(self) -> None:
        """End the daemon that was started."""
        if self._running and self._folder is not None:
            environ = {**os.environ, **{"CUDA_MPS_PIPE_DIRECTORY": self._folder}}
            try:
                subprocess.run([CONTROL], input=b"quit\n", env=environ, capture_output=True, timeout=60)
            except (OSError, subprocess.SubprocessError):
                print(
                    f"the MPS daemon of {self._folder} did not end; end it with: echo quit | {CONTROL}", file=sys.stderr
                )
        self._running = False
        self.environ = {}
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _without(self, why: str) -> str:
        if self.wanted:
            raise UsageError(f"--mps: {why}; leave --mps out, and the processes take turns on the GPU")
        return f"MPS: {why}; the processes take turns on the GPU"
