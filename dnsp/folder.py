"""What a run folder says before any tensor of it is read: whether a run may have it, and what its runs are made of.

Every process can ask that for itself, before it looks for the others: no torch here.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dnsp.config import Config, ModelConfig
from dnsp.errors import UsageError

FOLDER = "checkpoints"
IDENTITY, STATE = "run.json", "state.json"  # of a run; of a checkpoint
IN_USE = "{folder} is in use by a running run; wait for it, or choose another run.dir"
_NAME = re.compile(r"step-\d{8,}$")


def check_start(config: Config) -> None:
    """Refuse what one process can know to fail: a ``run.dir`` that a living run has, or of another model, and
    checkpoints of another model. Nothing is written.

    No rank of this run holds the folder while another one asks: rank 0 takes it once all have met. What is not to be
    seen from this node, or not to be read, is left to rank 0 too.

    Raises:
        UsageError: naming what is in the way, or the first field that differs.
    """
    check_free(config)
    if config.run.dir is not None and (theirs := _read(Path(config.run.dir, IDENTITY), "model")):
        compare({"model": theirs}, {"model": config.model.model_dump(mode="json")}, Path(config.run.dir))
    with suppress(OSError):
        check_origin(config)


def check_origin(config: Config) -> None:
    """Refuse to ``resume`` a run of another model, or to begin with its weights (``init_from``).

    Raises:
        UsageError: naming the first field that differs and both values.
    """
    if config.resume not in ("none", "auto"):
        path = newest(config.resume)
        if theirs := _read(path / STATE, "identity", "model"):
            compare({"model": theirs}, {"model": config.model.model_dump(mode="json")}, path, "resume")
    elif config.init_from is not None and config.init_from.startswith("run:"):
        if config.resume == "auto" and config.run.dir is not None and checkpoints(Path(config.run.dir)):
            return  # it goes on from one of those
        path = newest(config.init_from)
        if theirs := _read(path / STATE, "identity", "model"):
            compare_models(theirs, config, path)


def check_free(config: Config) -> None:
    """Refuse the folder of a living run: another process holds its lock."""
    if config.run.dir is None:
        return
    try:
        with Path(config.run.dir, ".lock").open("rb") as file:  # shared: over NFS too it needs no right to write
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(IN_USE.format(folder=config.run.dir)) from None
    except OSError:
        pass  # none there or not to be read, or a file system without locks: who makes the folder says so


def check_new(config: Config) -> None:
    """Refuse to begin in a folder that holds a run already."""
    if config.run.dir is None or config.resume != "none":
        return
    try:
        Path(config.run.dir, "metrics.jsonl").open("rb").close()  # NFS may show what was removed until it is opened
    except PermissionError:
        pass  # there it is
    except OSError:
        return
    raise UsageError(f"{config.run.dir} holds a run already; resume=auto continues it, or choose another run.dir")


def started_again(config: Config, restarts: int) -> Config:
    """The configuration of a run that its launcher has started before: it goes on by itself, from its own newest
    checkpoint rather than from where its first start began.

    Raises:
        UsageError: its folder cannot be read.
    """
    if not restarts or config.run.dir is None:
        return config
    try:
        saved = config.resume == "none" or checkpoints(Path(config.run.dir))
    except OSError as error:
        raise UsageError(f"run.dir={config.run.dir} cannot be read ({error.strerror}); choose another one") from None
    if not saved:
        return config
    return config.model_copy(update={"resume": "auto"})


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = (folder / FOLDER).glob("step-*")
    return sorted((p for p in found if is_checkpoint(p)), key=step_of)


def is_checkpoint(path: Path) -> bool:
    """By its name."""
    return _NAME.match(path.name) is not None


def step_of(path: Path) -> int:
    """Of a checkpoint."""
    return int(path.name.removeprefix("step-"))


def named(where: str | Path) -> Path:
    """The run folder or the checkpoint that ``resume`` and ``init_from`` name, perhaps as ``run:PATH``."""
    path = Path(str(where).removeprefix("run:"))
    return path.parent if path.name == FOLDER else path


def newest(where: str | Path) -> Path:
    """The checkpoint that is named, of a run folder with any its newest, damaged or not."""
    path = named(where)
    return path if is_checkpoint(path) else next(reversed(checkpoints(path)), path)


def write_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    """Record what a run is made of."""
    part = folder / f".{IDENTITY}.part"
    try:
        part.write_text(json.dumps(identity, indent=1) + "\n")
        os.replace(part, folder / IDENTITY)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def check_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    """Refuse to continue a run of another model, tokenizer or data.

    Raises:
        UsageError: naming the first field that differs and both values.
    """
    path = folder / IDENTITY
    if not path.exists():
        return
    try:
        saved = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path} cannot be read ({error}); choose another run.dir") from None
    compare(saved, identity, folder)


def compare(saved: Mapping[str, Any], ours: Mapping[str, Any], where: Path, key: str = "run.dir") -> None:
    """Refuse a run of another identity, by the first field that differs; ``key`` named ``where`` it is.

    Raises:
        UsageError: naming the field and both values.
    """
    _hold_against({**saved, "model": _as_now(saved["model"])} if "model" in saved else saved, ours, where, key)


def _hold_against(saved: Mapping[str, Any], ours: Mapping[str, Any], where: Path, key: str) -> None:
    for field, was, now in _differences(saved, json.loads(json.dumps(ours))):
        if field == "data.sources":
            what = "on data with other contents or weights than data.sources has"
        else:
            what = f"with {field}={was!r}, the configuration has {now!r}"
        raise UsageError(
            f"{where} is of a run {what}; take that run's configuration (its config.yaml), or choose another {key}"
        )


def compare_models(theirs: Mapping[str, Any], config: Config, where: Path) -> None:
    """Refuse the weights of another model; the base of the rotary frequencies may be another one.

    Raises:
        UsageError: naming the first field that differs.
    """
    ours, known = config.model.model_dump(mode="json"), _as_now(theirs)
    if not known.keys() >= ours.keys():
        raise UsageError(f"{where} is of a run whose model this version does not know; choose another init_from")
    for model in (ours, known):
        model.pop("rope_theta", None)
        # how often a pattern is repeated is written in several ways
        layers = model.pop("pattern") * model["num_hidden_layers"]
        model["pattern"] = layers[: model["num_hidden_layers"]]
    _hold_against({"model": known}, {"model": ours}, where, "init_from")


def _as_now(model: Any) -> Any:
    """A recorded model with the keys that have come since: their defaults are what it did without them. As it is where
    it is none of this version's."""
    try:
        return ModelConfig.model_validate(model).model_dump(mode="json")
    except ValidationError:
        return model


def _differences(a: Any, b: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        for name in [*a, *(name for name in b if name not in a)]:
            yield from _differences(a.get(name), b.get(name), f"{key}.{name}" if key else name)
    elif a != b:
        yield key, a, b


def _read(path: Path, *keys: str) -> dict[str, Any] | None:
    """What is under ``keys`` in a file of JSON; None where it is not to be read."""
    try:
        tree = json.loads(path.read_text())
        for key in keys:
            tree = tree[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return tree if isinstance(tree, dict) else None
