"""Checkpoints: whole or not there, checked by sha256, and nothing in them can run code.

    RUN/run.json                        what the run is made of: model, tokenizer, data
    RUN/checkpoints/step-00000050/      weights-00000-of-00004.safetensors    a rank's ranges of the parameters, flat
                                        optimizer-00000-of-00004.safetensors  of AdamW's moments; the rank's generators
                                        index.json     shapes, and which rank holds which range of each tensor
                                        state.json     step, tokens, cursor, config, versions
                                        manifest.json  checksums of all of them

A range is of the flattened whole tensor, whatever ZeRO stage and ranks wrote it, so that any other number of them reads
what it needs and no more. ``dnsp/saving.py`` writes them; what a kill leaves behind is removed by the next start.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dnsp.errors import UsageError
from dnsp.folder import FOLDER, STATE, checkpoints, is_checkpoint, named, step_of

KINDS = ("weights", "optimizer")
OTHERS = ("index.json", STATE)
MOMENTS = ("exp_avg", "exp_avg_sq")
PACKAGES = ("dnsp", "torch", "deepspeed", "megatron-core", "numpy", "safetensors")


def file_of(kind: str, rank: int, world: int) -> str:
    """The name of a rank's file."""
    return f"{kind}-{rank:05d}-of-{world:05d}.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose checksums held. Tensors are read when they are asked for, range by range."""

    path: Path
    state: dict[str, Any]
    index: dict[str, Any]
    _open: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @property
    def world(self) -> int:
        """Ranks that wrote it."""
        return int(self.index["world"])

    @property
    def shapes(self) -> dict[str, list[int]]:
        return {name: entry["shape"] for name, entry in self.index["tensors"].items()}

    def read(self, what: str, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements ``start`` to ``stop`` of a flattened tensor: ``what`` is weights, exp_avg or exp_avg_sq.

        Raises:
            UsageError: where no rank wrote a part of it.
        """
        entry = self.index["tensors"][name]
        stop = math.prod(entry["shape"]) if stop is None else stop
        kind, key = ("weights", name) if what == "weights" else ("optimizer", f"{what}.{name}")
        pieces, at = [], start
        for rank, low, high in sorted(entry["parts"], key=lambda part: part[1]):
            if low <= at < min(high, stop):
                end = min(high, stop)
                pieces.append(self._file(kind, rank).get_slice(key)[at - low : end - low])
                at = end
        if at < stop:
            raise UsageError(f"the checkpoint {self.path} has no elements from {at} on of {name} ({what})")
        if not pieces:
            return torch.empty(0)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def weights(self) -> Mapping[str, Tensor]:
        """Whole parameters by name, each read when it is looked up."""
        return _Weights(self)

    def adam_step(self) -> Tensor:
        """Updates that AdamW has made, a scalar."""
        return self._file("optimizer", 0).get_tensor("step")

    def random(self, rank: int) -> dict[str, Tensor]:
        """A rank's generators; nothing for a rank that was not there."""
        if rank >= self.world:
            return {}
        file = self._file("optimizer", rank)
        return {key.removeprefix("random."): file.get_tensor(key) for key in file.keys() if key.startswith("random.")}  # noqa: SIM118

    def close(self) -> None:
        """Let go of the files: a checkpoint that is removed while one is open keeps its place on the disk."""
        self._open.clear()

    def _file(self, kind: str, rank: int) -> Any:
        name = file_of(kind, rank, self.world)
        if name not in self._open:
            self._open[name] = safe_open(self.path / name, "pt")
        return self._open[name]


class _Weights(Mapping[str, Tensor]):
    def __init__(self, found: Checkpoint) -> None:
        self._found, self.shapes = found, found.shapes

    def __getitem__(self, name: str) -> Tensor:
        shape = self._found.index["tensors"][name]["shape"]
        return self._found.read("weights", name).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._found.index["tensors"])

    def __len__(self) -> int:
        return len(self._found.index["tensors"])


def check_weights(model: nn.Module, shapes: Mapping[str, Sequence[int]], where: str) -> None:
    """Refuse weights of these ``shapes`` for ``model``; every name and shape must be there, what is tied once.

    Raises:
        UsageError: naming the first that is missing or has another shape.
    """
    wanted = dict(model.named_parameters())
    extra = sorted(set(shapes) - set(wanted))
    if extra:
        raise UsageError(f"{where} has weights for {extra[0]}, which the configuration's model does not have")
    for name, parameter in wanted.items():
        if name not in shapes:
            raise UsageError(f"{where} has no weights for {name}; the model of the configuration is another one")
        if list(shapes[name]) != list(parameter.shape):
            raise UsageError(
                f"{where}: {name} is {list(shapes[name])}, the configuration's model has {list(parameter.shape)}"
            )


def shapes_of(saved: Mapping[str, Tensor]) -> Mapping[str, Sequence[int]]:
    """Of weights by name; those of a checkpoint are not read for it."""
    return saved.shapes if isinstance(saved, _Weights) else {name: tensor.shape for name, tensor in saved.items()}


@torch.no_grad()
def load_weights(model: nn.Module, saved: Mapping[str, Tensor], where: str) -> None:
    """Copy ``saved`` into ``model``.

    Raises:
        UsageError: they are not this model's (:func:`check_weights`).
    """
    check_weights(model, shapes_of(saved), where)
    for name, parameter in model.named_parameters():
        parameter.copy_(saved[name])


def set_aside(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints after ``step``, where a run goes on from there: they are damaged, or another course of
    it, and neither may be taken for this one's. Returns what they are called now."""
    renamed = []
    for path in checkpoints(folder):
        if step_of(path) > step:
            aside, number = path.with_name(f"aside-{path.name}"), 1
            while aside.exists():
                aside, number = path.with_name(f"aside-{path.name}-{number}"), number + 1
            path.rename(aside)
            renamed.append(aside)
    return renamed


def prune(folder: Path, keep: int, keep_every: int = 0) -> None:
    """Remove all but the last ``keep`` and those of every ``keep_every``-th step (0: of none)."""
    for old in checkpoints(folder)[:-keep]:
        if not keep_every or step_of(old) % keep_every:
            gone = old.with_name(f".{old.name}.gone")  # at once: killed half-way, what is left must not look whole
            with contextlib.suppress(OSError):
                old.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)


def way_on(folder: Path | None) -> str:
    """How to continue a run that ends now."""
    try:
        saved = checkpoints(folder) if folder else []
    except OSError as error:  # the end of a run is no time to raise
        return f"the checkpoints of {folder} cannot be listed ({error.strerror}): look at that disk first"
    if saved:
        return f"run.dir={folder} resume=auto goes on from {saved[-1].name}"
    return "there is no checkpoint to go on from (checkpoint.every sets how often one is saved)"


def clean(folder: Path) -> None:
    """Remove what a killed run left half-written, or half-removed."""
    for pattern in (".*.part", ".*.gone"):
        for part in (folder / FOLDER).glob(pattern):
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
        world = sum(name.startswith("weights-") for name in manifest)
        files = [*OTHERS, *(file_of(kind, rank, world) for kind in KINDS for rank in range(world))]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing and reading let go of the interpreter
            digests = pool.map(lambda name: digest(path / name), files)
            found = zip(files, digests, strict=True)
            wrong = next((name for name, is_now in found if manifest.get(name) != is_now), None)
        if wrong is not None or not world:
            raise UsageError(f"the checkpoint {path} is damaged: {wrong or 'its files'} does not match its checksum")
        return _opened(path)
    except OSError as error:
        name = Path(error.filename or path).name
        raise UsageError(f"the checkpoint {path} is damaged: {name}: {error.strerror}") from None
    except (ValueError, SafetensorError, KeyError, AttributeError, TypeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"the checkpoint {path} is damaged: its JSON cannot be read ({error})") from None


def _opened(path: Path) -> Checkpoint:
    return Checkpoint(path, *(json.loads((path / name).read_text()) for name in (STATE, "index.json")))


def open_checked(path: Path) -> Checkpoint:
    """Open a checkpoint that another rank has read against its checksums.

    Raises:
        UsageError: where this rank cannot see it.
    """
    try:
        return _opened(path)
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
    path = named(where)
    if is_checkpoint(path):
        return read(path), []
    if not path.is_dir():
        raise UsageError(f"there is no run folder {path}; name one that dnsp train made, or a checkpoint in it")
    found, words = latest(path)
    if found is None:
        raise UsageError("; ".join(words) or f"{path} holds no checkpoint; checkpoint.every makes a run save them")
    return found, words


def digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Until a file or a folder's entries are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def versions() -> dict[str, str]:
    """What wrote a checkpoint."""
    return {package: _version(package) for package in PACKAGES}


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


def set_random_state(saved: dict[str, Tensor], device: torch.device) -> None:
    """Set this rank's generators, where the checkpoint has them."""
    if "cpu" in saved:
        torch.set_rng_state(saved["cpu"])
    if device.type == "cuda" and "cuda" in saved:
        torch.cuda.set_rng_state(saved["cuda"], device)
