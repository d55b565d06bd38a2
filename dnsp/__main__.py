"""``python -m dnsp``, ``torchrun -m dnsp`` and ``deepspeed --module dnsp``."""

import signal
import sys

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in what is slow to import ends it, without a traceback

from dnsp.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
