"""Processes that share a GPU at the same time: NVIDIA's multi-process service (MPS), started where it is not running.

Without it the processes take turns on the GPU, which is right and slow: a rank that waits for another keeps its turn.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from .environment import LaunchError

CONTROL = "nvidia-cuda-mps-control"
NAMED = "CUDA_MPS_PIPE_DIRECTORY"
SECONDS = 60.0  # that the daemon may take to start, and to end
PATIENCE = 120.0  # seconds that a first client may take
TURNS = "the processes take turns on the GPU"
_CHECK = "import torch; x = torch.ones(64, device='cuda'); assert float((x + x).sum()) == 128"


class Daemon:
    """A daemon of our own; ``variables``: for the environment of processes that are to share a GPU."""

    def __init__(self) -> None:
        self.variables: dict[str, str] = {}
        self._folder: str | None = None

    def start(self, device: str | None = None) -> str | None:
        """Starts it, and tries a client on a device (of ``CUDA_VISIBLE_DEVICES``) if one is given. In words why it does
        not work, and nothing is left of it; None where it does."""
        if shutil.which(CONTROL) is None:
            return f"{CONTROL} is not on the PATH"
        self._folder = tempfile.mkdtemp(prefix="dnsp-mps-")  # the path of a socket in it is short
        self.variables = {NAMED: self._folder, "CUDA_MPS_LOG_DIRECTORY": self._folder}
        environment = os.environ | self.variables
        environment.pop("CUDA_VISIBLE_DEVICES", None)  # a daemon that sees some GPUs counts its clients' anew from 0
        try:
            subprocess.run([CONTROL, "-d"], env=environment, check=True, capture_output=True, timeout=SECONDS)
            if device is not None:
                environment["CUDA_VISIBLE_DEVICES"] = device
                client = [sys.executable, "-c", _CHECK]
                subprocess.run(client, env=environment, check=True, capture_output=True, timeout=PATIENCE)
        except (OSError, subprocess.SubprocessError) as error:
            self.stop()
            said = getattr(error, "stderr", None) or b""
            last = (said.decode(errors="replace").strip().splitlines() or [""])[-1]
            return f"{CONTROL} does not work here ({last or error})"
        return None

    def stop(self) -> None:
        """Ends it; the processes that it served must have ended."""
        if self._folder is None:
            return
        environment = os.environ | self.variables
        try:
            subprocess.run([CONTROL], input=b"quit\n", env=environment, capture_output=True, timeout=SECONDS)
        except (OSError, subprocess.SubprocessError):
            print(f"the MPS daemon of {self._folder} did not end; end it with: echo quit | {CONTROL}", file=sys.stderr)
        shutil.rmtree(self._folder, ignore_errors=True)
        self.variables, self._folder = {}, None


@contextmanager
def shared_gpu() -> Iterator[dict[str, str]]:
    """Variables for the environment of processes that are to share a GPU; empty where there is nothing to start,
    which is said.

    A daemon that the environment names already is used as it is. Processes started with these variables must have ended
    when the block ends.
    """
    daemon = Daemon()
    try:
        if NAMED not in os.environ and (why_not := daemon.start()):
            print(f"MPS: {why_not}; {TURNS}", file=sys.stderr, flush=True)
        yield daemon.variables
    finally:
        daemon.stop()


@contextmanager
def asked_for(wanted: bool | None, device: str) -> Iterator[tuple[dict[str, str], str]]:
    """The same, and in words what came of it. ``wanted``: True refuses to go without, False does not start it, None
    uses it where it works on this device.

    Raises: LaunchError where it was asked for and does not work.
    """
    if wanted is False:
        yield {}, f"MPS: not asked for; {TURNS}"
        return
    if wanted is None and os.environ.get(NAMED):
        yield {}, f"MPS: the daemon of {NAMED}, which is not ours, is used"
        return
    daemon = Daemon()
    try:
        why_not = daemon.start(device)
        if why_not and wanted:
            raise LaunchError(f"--mps: {why_not}; leave --mps out, and {TURNS}")
        yield daemon.variables, f"MPS: {why_not}; {TURNS}" if why_not else "MPS: the processes share the GPU"
    finally:
        daemon.stop()
