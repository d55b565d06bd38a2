"""JSON that others read. It has no word for a number that is not finite: such a number is ``null``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

_ANYTHING: TypeAdapter[Any] = TypeAdapter(Any)  # its JSON is valid JSON; the standard library's has NaN in it


def json_line(record: Any) -> bytes:
    """For a file of lines."""
    return _ANYTHING.dump_json(record) + b"\n"


def json_text(tree: Any) -> bytes:
    """For a file by itself."""
    return _ANYTHING.dump_json(tree, indent=2) + b"\n"


def write_json(path: Path | None, tree: Any) -> None:
    """Write a report where one was asked for."""
    if path is not None:
        path.write_bytes(json_text(tree))
