"""The commands that the documents show, for the tests that run them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def documented(file: str, begins: str, smaller: Mapping[str, str]) -> str:
    """The one command of a document that begins so, word for word but for ``smaller``: what this host is too small for
    (words of the command, and what takes their place) and CONFIG."""
    lines = (ROOT / file).read_text().replace("\\\n", " ").splitlines()
    (command,) = {" ".join(line.partition("  #")[0].split()) for line in lines if line.startswith(f"    {begins} ")}
    for word, other in {"CONFIG": "tiny.yaml", **smaller}.items():
        assert command.count(word) == 1, (word, command)
        command = command.replace(word, other)
    return command
