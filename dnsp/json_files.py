"""JSON that others read. It has no word for a number that is not finite: such a number is ``null``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic_core import to_json


def json_line(record: Any) -> bytes:
    """For a file of lines."""
    return to_json(record, inf_nan_mode="null") + b"\n"


def json_text(tree: Any) -> bytes:
    """For a file by itself."""
    return to_json(tree, inf_nan_mode="null", indent=2) + b"\n"


def write_json(path: Path | None, tree: Any) -> None:
    """Write a report where one was asked for."""
    if path is not None:
        path.write_bytes(json_text(tree))
