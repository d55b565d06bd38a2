"""``python -m dnsp``, ``torchrun -m dnsp`` and ``deepspeed --module dnsp``."""

import sys

from dnsp.cli import main

if __name__ == "__main__":
    sys.exit(main())
