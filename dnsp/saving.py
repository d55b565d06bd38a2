"""Checkpoints are written beside the training: the loop waits for the copy to the host, a thread does the rest.

Every rank writes what it keeps. The threads then tell each other their checksums over a group of their own, and rank 0
adds the index, the state and the manifest, and renames the folder: until then there is no checkpoint. Where a file
cannot be written the run goes on, and says what it has not saved.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dnsp import checkpoint, watchdog
from dnsp.config import CheckpointConfig
from dnsp.engine import Engine, out_of_memory
from dnsp.json_files import json_line

SETTLE = 15.0  # seconds
LOG = "checkpoints.jsonl"  # in the run folder: a line for every attempt


@dataclass
class Saved:
    """One attempt. ``held_s``: the loop stood still, for the copy and for the attempt before it, of which ``waited_s``;
    ``write_s``: the thread took; ``error``: why it is not there."""

    step: int
    held_s: float
    waited_s: float
    write_s: float = 0.0
    gib: float = 0.0
    error: str = ""


@dataclass
class _Share:
    """What one rank tells rank 0 of its files."""

    parts: dict[str, tuple[int, int]] = field(default_factory=dict)  # parameter: start, stop
    digests: dict[str, str] = field(default_factory=dict)
    error: str = ""


class Saver:
    """Writes the checkpoints of a run; every rank has one.

    Args:
        folder: the run folder, the same on all ranks.
        engine: whose weights and moments are saved.
        settings: how many are kept.
        waiting: called now and then while a checkpoint is waited for.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        settings: CheckpointConfig,
        waiting: Callable[[], object] = lambda: None,
    ) -> None:
        self.folder, self.engine, self.settings, self.waiting = folder, engine, settings, waiting
        self.rank, self.world = engine.grid.rank, engine.grid.world
        self.group = watchdog.slow_group()
        self.done: list[Saved] = []  # not yet said
        self.last: Saved | None = None
        self._host: dict[tuple[str, str], Tensor] = {}
        self._no_room = ""  # why there is none in the host's memory
        # the host's pages are found now: a copy into memory never touched takes several times as long
        self._thread = threading.Thread(target=self._make_room, name="checkpoint", daemon=True)
        self._thread.start()

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Take weights, moments and generators as they are now; ``state`` is JSON. Every rank calls it.

        Returns when they are copied; waits for the checkpoint before, where that is still being written.
        """
        began = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - began
        if not self._host:
            self._make_room()  # there was none, and may be some now
        fragments = self.engine.fragments()
        for fragment in fragments if not self._no_room else ():
            for what, tensor in fragment.tensors.items():
                self._host[what, fragment.name].copy_(tensor, non_blocking=True)
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)
        others = {f"random.{kind}": x for kind, x in checkpoint.random_state(self.engine.device).items()}
        if self.rank == 0:
            others["step"] = self.engine.adam_step()
        parts = {f.name: (f.start, f.start + f.tensors["weights"].numel()) for f in fragments}
        self.last = Saved(step, time.perf_counter() - began, waited)
        state = {"step": step, **state, "versions": checkpoint.versions()}
        self._thread = threading.Thread(
            target=self._write, args=(self.last, parts, others, state), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> Saved | None:
        """Until nothing is being written any more. Returns the last attempt."""
        while self._thread.is_alive():
            self.waiting()
            self._thread.join(1.0)
        return self.last

    def settle(self) -> None:
        """At a failure: what is being written is finished, if that is a matter of seconds."""
        self._thread.join(SETTLE)

    def news(self) -> list[str]:
        """What has happened since the last call, in words; rank 0 alone knows."""
        said = []
        while self.done:
            saved = self.done.pop(0)
            if saved.error:
                last = checkpoint.checkpoints(self.folder)
                kept = f"the last checkpoint is {last[-1].name}" if last else "there is no earlier checkpoint"
                said.append(f"NOT SAVED: the checkpoint of step {saved.step} ({saved.error}); {kept}, the run goes on")
            else:
                waited = f", {saved.waited_s:.2f} s of them for the save before" if saved.waited_s > 0.1 else ""
                said.append(
                    f"step {saved.step}: checkpoint of {saved.gib:.2f} GiB written in {saved.write_s:.2f} s; training "
                    f"stood still for {saved.held_s:.3f} s, {100 * saved.held_s / saved.write_s:.1f} % of it{waited}"
                )
        return said

    def _make_room(self) -> None:
        pinned = self.engine.device.type == "cuda"
        if pinned:
            torch.cuda.set_device(self.engine.device)  # a thread of its own begins on the first GPU
        host, self._no_room = {}, ""
        try:
            for fragment in self.engine.fragments():
                for what, tensor in fragment.tensors.items():
                    host[what, fragment.name] = torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._host = host
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            self._no_room = f"the host has no memory for the copy: {reason(error)}"

    def _write(
        self, saved: Saved, parts: dict[str, tuple[int, int]], others: dict[str, Tensor], state: dict[str, Any]
    ) -> None:
        began = time.perf_counter()
        final = self.folder / checkpoint.FOLDER / f"step-{saved.step:08d}"
        part = final.with_name(f".{final.name}.part")
        share = self._write_share(part, parts, others)
        try:
            shares = watchdog.gather_slowly(share, self.group)
        except RuntimeError as error:  # a rank is gone; the loop finds out for itself
            saved.error = f"a rank is gone: {str(error).splitlines()[0]}"
            return
        failed = [f"rank {rank}: {s.error}" for rank, s in enumerate(shares) if s.error]
        saved.error = failed[0] if failed else ""
        if self.rank:
            return
        if not failed:
            saved.error = self._commit(part, final, shares, state)
        if saved.error:
            shutil.rmtree(part, ignore_errors=True)
        else:
            checkpoint.prune(self.folder, self.settings.keep, self.settings.keep_every)
            saved.gib = sum(file.stat().st_size for file in final.iterdir()) / 2**30
        saved.write_s = time.perf_counter() - began
        self.done.append(saved)
        self._log(saved)

    def _write_share(self, part: Path, parts: dict[str, tuple[int, int]], others: dict[str, Tensor]) -> _Share:
        share = _Share(parts, error=self._no_room)
        if self._no_room:
            return share
        weights = {name: self._host["weights", name] for name in parts}
        moments = {f"{m}.{name}": self._host[m, name] for m in checkpoint.MOMENTS for name in parts}
        try:
            part.mkdir(parents=True, exist_ok=True)
            for kind, tensors in (("weights", weights), ("optimizer", {**moments, **others})):
                name = checkpoint.file_of(kind, self.rank, self.world)
                save_file(tensors, part / name)
                checkpoint.sync(part / name)
                share.digests[name] = checkpoint.digest(part / name)
        except (OSError, SafetensorError, RuntimeError, MemoryError) as error:  # the others wait for an answer
            share.error = reason(error)
        return share

    def _commit(self, part: Path, final: Path, shares: list[_Share], state: dict[str, Any]) -> str:
        """Make the checkpoint of what the ranks wrote. Returns why it could not be made, or nothing."""
        shapes = self.engine.shapes()
        held = {n: [[rank, *s.parts[n]] for rank, s in enumerate(shares) if n in s.parts] for n in shapes}
        tensors = {name: {"shape": shape, "parts": held[name]} for name, shape in shapes.items()}
        digests = {name: value for s in shares for name, value in s.digests.items()}
        try:
            if unseen := [name for name in digests if not (part / name).exists()]:
                return f"rank 0 does not see {unseen[0]}; run.dir must be on a file system that all nodes share"
            for name, tree in (("index.json", {"world": self.world, "tensors": tensors}), ("state.json", state)):
                (part / name).write_text(json.dumps(tree, indent=1))
                digests[name] = checkpoint.digest(part / name)
            (part / "manifest.json").write_text(json.dumps(digests, indent=1))
            for file in (*(part / name for name in (*checkpoint.OTHERS, "manifest.json")), part):
                checkpoint.sync(file)
            os.rename(part, final)
            checkpoint.sync(final.parent)
        except OSError as error:
            return reason(error)
        return ""

    def _log(self, saved: Saved) -> None:
        try:
            with (self.folder / LOG).open("ab") as file:
                file.write(json_line({**vars(saved), "time": time.time()}))
        except OSError:
            pass  # the disk that is full is why there is something to log


def reason(error: Exception) -> str:
    """Why a file could not be written, in the system's words, on one line."""
    words = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return str(words).splitlines()[0]
