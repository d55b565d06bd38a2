"""How a rank ends: its words go to the process that started the ranks if there is one, else to stderr. Starts fast."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from dnsp.launch.local import ERROR_FILE

PATIENCE = 10.0  # seconds: how much later than the others a rank may start, and still be the one that says why


def end(status: int, message: str, consequence: bool = False, quiet: bool = False) -> int:
    """Say why this process ends and, if it is a rank, end it.

    ``consequence``: of another rank's failure. ``quiet``: another says it; this one ends up to ``PATIENCE`` seconds
    later, and where no launcher has ended it until then, so that nobody may have spoken, it says its own after all. The
    ranks' starter, where there is one, collects every report, and shows the best. What cannot be said, on a disk that
    is full, keeps no rank from its end.
    """
    text = "error: " + message.strip()
    with suppress(OSError):
        sys.stdout.flush()
    if ERROR_FILE in os.environ:
        said = {"time": time.time(), "message": text, "consequence": consequence, "quiet": quiet}
        with suppress(OSError):
            Path(os.environ[ERROR_FILE]).write_text(json.dumps(said))
    else:
        if quiet:
            _let_others_speak()
        if not (quiet and consequence):
            with suppress(OSError):
                print(text, file=sys.stderr, flush=True)
    if "RANK" in os.environ:  # no destructors: a process group would wait in them for ranks that are gone
        os._exit(status)
    return status


def speaks() -> bool:
    """Whether this process is the one of its node that says what all of them have to say."""
    # srun's tasks have its own name for their place until they join
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"


def _let_others_speak() -> None:
    """torchrun, deepspeed and srun end all ranks when the first has ended: that must be one which has said why."""
    for number in (signal.SIGTERM, signal.SIGINT):  # the launcher's word ends the wait
        # signal.signal is for the main thread, and this may be another, while that one waits in a collective
        ctypes.CDLL(None).signal(number, None)
    time.sleep(PATIENCE)
