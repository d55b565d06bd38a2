"""How a rank ends: its words go to the process that started the ranks if there is one, else to stderr. Starts fast."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from dnsp.launch.local import ERROR_FILE

PATIENCE = 10.0  # seconds: how much later than the others a rank may start, and still be the one that says why

def end(status: int, message: str, consequence: bool = False, quiet: bool = False) -> int:
    """Say why this process ends and, if it is a rank, end it.

    ``consequence``: of another rank's failure. ``quiet``: to be said only where the ranks' starter collects reports,
    and has nothing better. What cannot be said, on a disk that is full, keeps no rank from its end.
    """
    text = "error: " + message.strip()
    if ERROR_FILE in os.environ:
        said = {"time": time.time(), "message": text, "consequence": consequence, "quiet": quiet}
        with suppress(OSError):
            Path(os.environ[ERROR_FILE]).write_text(json.dumps(said))
    elif not quiet:
        with suppress(OSError):
            print(text, file=sys.stderr, flush=True)
    if "RANK" in os.environ:  # no destructors: a process group would wait in them for ranks that are gone
        with suppress(OSError):
            sys.stdout.flush()
        if quiet and ERROR_FILE not in os.environ:
            _let_others_speak()
        os._exit(status)
    return status


def _let_others_speak() -> None:
    """torchrun, deepspeed and srun end all ranks when the first has ended: that must be one which has said why."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's word ends the wait
    time.sleep(PATIENCE)
