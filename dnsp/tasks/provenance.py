"""Which code results are of, and which machine made them, as a queue finds them once when it begins."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

from dnsp import nvml

HASH = 12  # digits of a hash that are shown


def code_identity() -> str:
    """Of the package that runs; see :func:`code_of`. Its version, where it is installed, is among the versions."""
    return code_of(Path(__file__).absolute().parents[1])


def code_of(package: Path) -> str:
    """``git`` and the commit of a package that lies in a checkout, with ``+`` where its files were changed since;
    otherwise ``files`` and a hash of its sources."""
    try:
        # a package installed below another project's repository is none of its files
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        commit = _git(package, "rev-parse", f"--short={HASH}", "HEAD")
        rooms = sorted(str(path.resolve()) for path in package.iterdir() if path.is_symlink())  # dnsp/kernels, say
        changed = _git(package, "status", "--porcelain", "--", ".", *rooms)
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return f"files {_hash(package)}"
    return f"git {commit}{'+' if changed else ''}"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _hash(package: Path) -> str:
    """Of names and contents of all Python files, those of linked rooms too."""
    digest = hashlib.sha256()
    for folder, below, files in os.walk(package, followlinks=True):
        below.sort()
        for path in sorted(Path(folder) / name for name in files if name.endswith(".py")):
            digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:HASH]


def machine(device: str) -> dict[str, Any]:
    """``gpus`` of the machine and their ``driver``, where ``--device`` is a GPU and the driver answers."""
    driver = None if device == "cpu" else nvml.driver()
    return {} if driver is None else {"gpus": nvml.count(), "driver": driver}
