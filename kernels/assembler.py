"""The assembler that Triton's keys name does the work.

Triton (3.6, 3.7) asks ptxas for its version once and mixes that into the key of every binary, but at each compile it
asks anew where ptxas is. Inductor, when ``torch.compile`` first compiles, sets ``TRITON_PTXAS_PATH`` to the ptxas that
comes with torch. What Triton compiles from then on is that one's, under the other's key: a proof in a child process,
which has the variable from its start, is of binaries that the parent does not take, and a binary that the parent makes
itself was never proven.
"""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from triton import knobs
from triton.backends.nvidia import compiler


@functools.cache
def variable(arch: int) -> tuple[str, str]:
    """The environment variable that says where ptxas is for an ``arch`` such as 90, and the path of the ptxas whose
    version Triton has noted (what it finds now, where none is known that has it)."""
    noted = compiler.get_ptxas_version(arch)
    tool = vars(type(knobs.nvidia))["ptxas_blackwell" if arch >= 100 else "ptxas"]
    now = str(Path(compiler.get_ptxas(arch).path).absolute())
    shipped = str(Path(tool.default_path).absolute())
    return tool.key, next((path for path in (now, shipped) if _version(path) == noted), now)


def _version(path: str) -> str:
    try:
        return subprocess.check_output([path, "--version"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return ""


@contextmanager
def kept(arch: int) -> Iterator[None]:
    """Within, Triton compiles by that ptxas."""
    name, path = variable(arch)
    before = os.environ.get(name)
    if before == path:
        yield
        return
    os.environ[name] = path
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
