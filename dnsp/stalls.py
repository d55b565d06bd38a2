"""Where a rank is, and what is left of it when a run fails: one thread a rank looks after both.

    RUN/failure.txt            the verdict of the rank that failed first
    RUN/stacks/rank-00001.txt  where each rank was (step, layer, what it did) and the Python stacks of its threads
    RUN/stacks/rank-00001.json torch's flight recorders: the last collectives of each rank, and which were not complete

The training thread only sets plain attributes. The thread ends a rank that makes no progress for ``run.stall`` seconds;
where collectives have a deadline (``run.timeout``) they notice first, and say which rank they waited for.
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FAILURE = "failure.txt"
STACKS = "stacks"
POLL = 0.25  # seconds
LINGER = 1.5  # seconds that the first to fail gives the others for their stacks
AHEAD = 4  # layers that are launched and not begun, at most


class Lead:
    """Keeps the host at most :data:`AHEAD` layers ahead of its GPU.

    By itself it is ahead by all that a GPU's queue holds, which is minutes where sequences are long: it would stand in
    the sum of the losses as if a rank were lost, and NCCL counts a collective's time from its launch.
    """

    def __init__(self, event: Callable[[], Any] = lambda: torch.cuda.Event(blocking=True)) -> None:
        self.events = deque(event() for _ in range(AHEAD))

    def layer(self) -> None:
        """The host comes to a layer: where it is too far ahead it waits."""
        event = self.events[0]
        event.synchronize()  # nothing to wait for the first time
        event.record()
        self.events.rotate(-1)


class Place:
    """Where this rank is: ``step`` (from 1), ``layer`` (None: outside of them), ``doing``. Setting it is progress."""

    def __init__(self, rank: int) -> None:
        self.rank, self.node = rank, platform.node()
        self.step, self.layer, self.doing = 0, None, "starting"  # type: int, str | None, str
        self.since = time.monotonic()

    def at(self, doing: str, layer: str | None = None, step: int | None = None) -> None:
        self.doing, self.layer, self.since = doing, layer, time.monotonic()
        if step is not None:
            self.step = step

    def __str__(self) -> str:
        layer = f", layer {self.layer}" if self.layer else ""
        return f"rank {self.rank} (node {self.node}) was at step {self.step}{layer}, in {self.doing}"

    def follow(self, layers: nn.ModuleList, kinds: list[str], lead: Lead | None = None) -> None:
        """Have every layer say when its forward and its backward begin, and the lead kept where there is one."""

        def at(doing: str, name: str) -> None:
            self.at(doing, name)
            if lead is not None:
                lead.layer()

        for index, (layer, kind) in enumerate(zip(layers, kinds, strict=True)):
            name = f"{index} ({kind})"

            def entered(module: nn.Module, inputs: Any, name: str = name) -> None:
                at("the forward", name)

            def left(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
                if output.requires_grad:
                    output.register_hook(lambda _: at("the backward", name))

            layer.register_forward_pre_hook(entered)
            layer.register_forward_hook(left)


class Stalls(threading.Thread):
    """Leaves this rank's stacks when the run fails, and ends the rank when it makes no progress.

    Args:
        place: kept by the training thread.
        give_up: ends this process with a verdict; does not return.
    """

    def __init__(self, place: Place, give_up: Callable[[str], None]) -> None:
        super().__init__(name="stalls", daemon=True)
        self.place, self.give_up = place, give_up
        self.folder: Path | None = None  # of the run, once there is one
        self.limit = float("inf")  # seconds without progress
        self.left_stacks = False
        self.error: BaseException | None = None  # what ended the training thread
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(POLL):
            # os.path's says no where the file system fails; Path's would raise and end this thread
            if self.folder is not None and not self.left_stacks and os.path.exists(self.folder / FAILURE):
                self.leave_stacks()
            idle = time.monotonic() - self.place.since
            if idle > self.limit:
                waits = f"; it waits for {operation}" if (operation := waiting_for()) else ""
                self.give_up(f"no progress for {idle:.0f} s: {self.place}{waits}")
                return

    def stop(self) -> None:
        self._over.set()

    def leave_stacks(self) -> None:
        """Write where this rank is, and the recorder of its collectives; whatever cannot be written is not."""
        if self.folder is None or self.left_stacks:
            return
        self.left_stacks = True
        stem = self.folder / STACKS / f"rank-{self.place.rank:05d}"
        idle = time.monotonic() - self.place.since
        try:
            stem.parent.mkdir(exist_ok=True)
            if (recorded := flight_record()).get("entries"):
                stem.with_suffix(".json").write_text(json.dumps(recorded))
            part = stem.with_suffix(".part")
            with part.open("w") as file:
                file.write(f"{self.place} for {idle:.0f} s\n\n")
                file.writelines(traceback.format_exception(self.error) if self.error else [])
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            part.rename(stem.with_suffix(".txt"))
        except OSError:
            pass

    def where_the_others_are(self, world: int) -> str:
        """The ranks' own words, once all have left their stacks or had the time to; at most three of them."""
        self.leave_stacks()
        if self.folder is None or world < 2:
            return ""
        others = [rank for rank in range(world) if rank != self.place.rank]
        files = {rank: self.folder / STACKS / f"rank-{rank:05d}.txt" for rank in others}
        deadline = time.monotonic() + LINGER
        while time.monotonic() < deadline and not all(map(os.path.exists, files.values())):
            time.sleep(POLL / 5)
        told: dict[int, str] = {}
        for rank, file in files.items():
            with suppress(OSError):
                told[rank] = file.read_text().partition("\n")[0]
        silent = [rank for rank in others if rank not in told]
        longest = sorted(told.values(), key=_seconds, reverse=True)[:2]
        if silent:
            many = f" and {len(silent) - 3} more" if len(silent) > 3 else ""
            longest.append(f"rank {', '.join(map(str, silent[:3]))}{many} left no stack: stopped or gone")
        return "; ".join(longest)


def _seconds(line: str) -> int:
    number = line.removesuffix(" s").rpartition(" ")[2]
    return int(number) if number.isdigit() else 0


def clear(folder: Path) -> None:
    """Forget the failure of the run that this one continues."""
    (folder / FAILURE).unlink(missing_ok=True)
    for file in (folder / STACKS).glob("rank-*"):
        file.unlink(missing_ok=True)


# NCCL keeps one of its own, where torch is built for GPUs; the other is gloo's.
RECORDERS = "_dump_nccl_trace_json", "_dump_fr_trace_json"


def flight_record() -> dict[str, Any]:
    """Torch's recorders of this process's collectives: all ``entries``, NCCL's first, each recorder's in the order in
    which they were called. Empty where this torch has none."""
    found: dict[str, Any] = {}
    for name in RECORDERS:
        record = getattr(torch._C._distributed_c10d, name, None)
        with suppress(RuntimeError, ValueError):
            told = json.loads(record() or b"{}") if record is not None else {}
            found = {**found, **told, "entries": [*found.get("entries", []), *told.get("entries", [])]}
    return found


def waiting_for() -> str:
    """The collective of the recorders that holds this rank up, in words; empty where all are complete.

    The host itself waits in gloo's, so that is the last. NCCL's wait on the device, one behind another: the oldest
    holds the later ones up. Of messages posted together only the launch (``nccl:coalesced``) is ever marked complete.
    """
    entries = flight_record().get("entries", [])
    done = {_launch(entry) for entry in entries if _named(entry) == "nccl:coalesced" and not _open(entry)}
    open_ = [entry for entry in entries if _open(entry)]
    on_device = [entry for entry in open_ if _named(entry).startswith("nccl:") and _launch(entry) not in done]
    on_host = [entry for entry in open_ if not _named(entry).startswith("nccl:")]
    for entry in [*on_device[:1], *on_host[-1:]]:
        return f"{_named(entry)} of {entry.get('input_sizes')}"
    return ""


def _named(entry: dict[str, Any]) -> str:
    return str(entry.get("profiling_name", "a collective"))


def _open(entry: dict[str, Any]) -> bool:
    return not entry.get("retired") and entry.get("state") != "completed"


def _launch(entry: dict[str, Any]) -> tuple[str, ...]:
    """Which of its group's launches an entry belongs to."""
    return tuple(str(entry.get(key)) for key in ("process_group", "collective_seq_id", "p2p_seq_id"))
