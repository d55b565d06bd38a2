"""What the documentation names exists: every configuration key with its default, every command."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import yaml
from pydantic import BaseModel
from typer.main import get_command

from dnsp.cli import app
from dnsp.config import Config

ROOT = Path(__file__).resolve().parents[2]


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, default); a list of mappings gives its own key and those of its entries."""
    for name, field in section.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not inner or inner[0] is not field.annotation:
            default = "required" if field.is_required() else field.get_default(call_default_factory=True)
            yield prefix + name, default
        for kind in inner:
            yield from keys(kind, f"{prefix}{name}.")


def test_every_configuration_key_is_described_with_its_default() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) \|", (ROOT / "docs" / "configuration.md").read_text(), re.MULTILINE)
    documented = {key: None if text == "none" else yaml.safe_load(text) for key, text in rows}
    known = dict(keys(Config))
    assert documented.keys() == known.keys()
    for key, default in known.items():
        if key == "resume":
            assert default == "none"
        elif key != "data.sources":
            said = float(documented[key]) if isinstance(default, float) else documented[key]
            assert said == (list(default) if isinstance(default, tuple) else default), key


def test_the_readme_names_every_command_and_only_those() -> None:
    text = (ROOT / "README.md").read_text()
    commands = {name for name, command in get_command(app).commands.items() if not command.hidden}  # type: ignore[attr-defined]
    assert set(re.findall(r"\bdnsp ([a-z]+)", text)) == commands
    linked = re.findall(r"\]\(([^)#:]+)\)", text)
    assert linked and all((ROOT / path).exists() for path in linked)
