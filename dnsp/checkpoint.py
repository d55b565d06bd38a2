"""Checkpoints: whole or not there, checked by sha256, and nothing in them can run code.

    RUN/run.json                        what the run is made of: model, tokenizer, data
    RUN/checkpoints/step-00000050/      weights.safetensors  optimizer.safetensors  random.safetensors
                                        state.json (step, tokens, cursor, config, versions)  manifest.json (checksums)

One is written under a temporary name, synced and renamed; what a kill leaves behind is removed by the next start.
Tensors are whole, whatever the ranks and the ZeRO stage that wrote them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dnsp.errors import RunError, UsageError

FILES = ("weights.safetensors", "optimizer.safetensors", "random.safetensors", "state.json")
FOLDER = "checkpoints"
_NAME = re.compile(r"step-\d{8,}$")
PACKAGES = ("dnsp", "torch", "deepspeed", "megatron-core", "numpy")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose checksums held."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def weights(self) -> dict[str, Tensor]:
        return load_file(self.path / "weights.safetensors")

    def optimizer(self) -> dict[str, Tensor]:
        return load_file(self.path / "optimizer.safetensors")

    def random(self) -> dict[str, Tensor]:
        return load_file(self.path / "random.safetensors")


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; what is tied is there once."""
    tensors = dict(model.named_parameters())
    known = {tensor.data_ptr() for tensor in tensors.values()}
    for name, tensor in model.state_dict().items():
        if name not in tensors and tensor.data_ptr() not in known:
            tensors[name] = tensor
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def load_weights(model: nn.Module, saved: dict[str, Tensor], where: str) -> None:
    """Copy ``saved`` into ``model``; every name and shape must be there.

    Raises:
        UsageError: naming the first that is missing or has another shape.
    """
    wanted = weights_of(model)
    for name, tensor in wanted.items():
        if name not in saved:
            raise UsageError(f"{where} has no weights for {name}; the model of the configuration is another one")
        if saved[name].shape != tensor.shape:
            raise UsageError(
                f"{where}: {name} is {list(saved[name].shape)}, the configuration's model has {list(tensor.shape)}"
            )
    extra = sorted(set(saved) - set(wanted))
    if extra:
        raise UsageError(f"{where} has weights for {extra[0]}, which the configuration's model does not have")
    model.load_state_dict(saved, strict=False)


def save(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int) -> Path:
    """Write one checkpoint (on one rank) and remove all but the last ``keep``.

    Args:
        folder: the run folder.
        step: optimizer steps done.
        tensors: ``weights``, ``optimizer``, ``random``.
        state: JSON: the rest.

    Raises:
        RunError: when it cannot be written; earlier checkpoints are untouched and nothing half-written stays.
    """
    final = folder / FOLDER / f"step-{step:08d}"
    part = final.with_name(f".{final.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, content in tensors.items():
            save_file(content, part / f"{name}.safetensors")
        versions = {package: _version(package) for package in PACKAGES}
        (part / "state.json").write_text(json.dumps({"step": step, **state, "versions": versions}, indent=1))
        (part / "manifest.json").write_text(json.dumps({name: _digest(part / name) for name in FILES}, indent=1))
        for file in (*part.iterdir(), part):
            _sync(file)
        os.rename(part, final)
        _sync(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        last = checkpoints(folder)
        kept = f"the last checkpoint is {last[-1]}" if last else "there is no earlier checkpoint"
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(f"cannot write the checkpoint {final}: {reason}; {kept}. Make room, then resume=auto") from None
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = (folder / FOLDER).glob("step-*")
    return sorted((p for p in found if _NAME.match(p.name)), key=lambda p: int(p.name.removeprefix("step-")))


def set_aside(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints after ``step``, where a run goes on from there: they are damaged, or another course of
    it, and neither may be taken for this one's. Returns what they are called now."""
    renamed = []
    for path in checkpoints(folder):
        if int(path.name.removeprefix("step-")) > step:
            aside, number = path.with_name(f"aside-{path.name}"), 1
            while aside.exists():
                aside, number = path.with_name(f"aside-{path.name}-{number}"), number + 1
            path.rename(aside)
            renamed.append(aside)
    return renamed


def way_on(folder: Path | None) -> str:
    """How to continue a run that ends now."""
    saved = checkpoints(folder) if folder else []
    if saved:
        return f"run.dir={folder} resume=auto goes on from {saved[-1].name}"
    return "there is no checkpoint to go on from (checkpoint.every sets how often one is saved)"


def clean(folder: Path) -> None:
    """Remove what a killed run left half-written."""
    for part in (folder / FOLDER).glob(".*.part"):
        shutil.rmtree(part, ignore_errors=True)


def read(path: Path) -> Checkpoint:
    """Open one checkpoint after checking every file against its checksum.

    Raises:
        UsageError: naming the file that is missing or damaged.
    """
    if not path.is_dir():
        raise UsageError(f"there is no checkpoint {path}")
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        wrong = next((name for name in FILES if manifest.get(name) != _digest(path / name)), None)
        if wrong is not None:
            raise UsageError(f"the checkpoint {path} is damaged: {wrong} does not match its checksum")
        return Checkpoint(path, json.loads((path / "state.json").read_text()))
    except OSError as error:
        name = Path(error.filename or path).name
        raise UsageError(f"the checkpoint {path} is damaged: {name}: {error.strerror}") from None
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"the checkpoint {path} is damaged: its JSON cannot be read ({error})") from None


def open_checked(path: Path) -> Checkpoint:
    """Open a checkpoint that another rank has read against its checksums.

    Raises:
        UsageError: where this rank cannot see it.
    """
    try:
        return Checkpoint(path, json.loads((path / "state.json").read_text()))
    except OSError as error:
        raise UsageError(f"rank 0 sees the checkpoint {path}, another rank does not: {error.strerror}") from None


def latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and a word on each damaged one that was passed over."""
    words: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            return read(path), words
        except UsageError as error:
            words.append(str(error))
    return None, words


def find(where: str | Path) -> tuple[Checkpoint, list[str]]:
    """The checkpoint meant by a run folder or a checkpoint folder.

    Raises:
        UsageError: when there is none that is whole.
    """
    path = Path(str(where).removeprefix("run:"))
    if _NAME.match(path.name):
        return read(path), []
    if path.name == FOLDER:
        path = path.parent
    if not path.is_dir():
        raise UsageError(f"there is no run folder {path}; name one that dnsp train made, or a checkpoint in it")
    found, words = latest(path)
    if found is None:
        raise UsageError("; ".join(words) or f"{path} holds no checkpoint; checkpoint.every makes a run save them")
    return found, words


def write_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Record what a run is made of."""
    part = folder / ".run.json.part"
    try:
        part.write_text(json.dumps(identity, indent=1) + "\n")
        os.replace(part, folder / "run.json")
    except OSError:
        part.unlink(missing_ok=True)
        raise


def check_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Refuse to continue a run of another model, tokenizer or data.

    Raises:
        UsageError: naming the first field that differs and both values.
    """
    path = folder / "run.json"
    if not path.exists():
        return
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); choose another run.dir") from None
    compare(saved, identity, folder)


def compare(saved: dict[str, Any], ours: dict[str, Any], where: Path) -> None:
    """Refuse a run of another identity, by the first field that differs.

    Raises:
        UsageError: naming the field and both values.
    """
    for key, was, now in _differences(saved, json.loads(json.dumps(ours))):
        if key == "data.sources":
            what = "on data with other contents or weights than data.sources has"
        else:
            what = f"with {key}={was!r}, the configuration has {now!r}"
        raise UsageError(
            f"{where} is of a run {what}; take that run's configuration (its config.yaml), or choose another run.dir"
        )


def _differences(a: Any, b: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        for name in [*a, *(name for name in b if name not in a)]:
            yield from _differences(a.get(name), b.get(name), f"{key}.{name}" if key else name)
    elif a != b:
        yield key, a, b


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def random_state(device: torch.device) -> dict[str, Tensor]:
    """This rank's generators."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(saved: dict[str, Tensor], rank: int, device: torch.device) -> None:
    """Set this rank's generators, where the checkpoint was written by as many ranks."""
    if f"{rank}.cpu" in saved:
        torch.set_rng_state(saved[f"{rank}.cpu"])
    if device.type == "cuda" and f"{rank}.cuda" in saved:
        torch.cuda.set_rng_state(saved[f"{rank}.cuda"], device)
