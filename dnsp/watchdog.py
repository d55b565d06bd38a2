"""The ranks' life together: joining, agreeing before the first step, stopping when asked, ending when one is lost."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from dnsp.checkpoint import way_on
from dnsp.config import RunConfig
from dnsp.ending import end
from dnsp.errors import Echo, PeerFailed, RunError, UsageError
from dnsp.launch.environment import Environment
from dnsp.launch.mps import shared_gpu
from dnsp.parallel.errors import LayoutError, PeerLost, PlanError, first_line
from dnsp.parallel.grid import Grid
from dnsp.parallel.probe import refusal
from dnsp.parallel.rendezvous import own_store
from dnsp.parallel.transport import Transport
from dnsp.stalls import FAILURE, STACKS, Place, Stalls

T = TypeVar("T")

SAVE_TIMEOUT = timedelta(minutes=30)  # between the first rank that has written its part of a checkpoint and the last
JOIN_TIMEOUT = timedelta(minutes=10)  # ranks of a cluster start at different times; preparing data takes a while too
REFUSALS = (UsageError, LayoutError, PlanError)
# gloo's and c10d's words for a peer that is gone; anything else is this rank's own fault
_LOST = re.compile(
    r"[Cc]onnection (closed|reset|refused)|Timed out|timed out|Broken pipe|Socket Timeout|Connection was likely closed"
    r"|failed to (recv|send|connect)|Application timeout",
)
NOTICE = 2.0  # seconds that the main thread has to notice by itself that a peer is lost
GIVE_BACK = 1.0  # seconds that the terminal and NVML may take to be given back before a failure is said


def join(environment: Environment) -> None:
    """Make the process group of all ranks; one process makes a group of its own, without a port.

    Raises:
        UsageError: when rank 0 cannot listen on the port, or the ranks do not find each other.
    """
    # NCCL refuses two ranks on a device; gloo carries tensors of a GPU through the host's memory
    alone_on_gpu = torch.cuda.is_available() and sharing(environment.local_world_size) == 1
    backend = "cpu:gloo,cuda:nccl" if alone_on_gpu else "gloo"
    # torch's flight recorder: the last collectives of every rank, which dnsp/stalls.py leaves in the run folder
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    if environment.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=JOIN_TIMEOUT)
        return
    os.environ.update(environment.variables())
    place = (environment.rank, environment.world_size)
    try:
        store = own_store(*place, environment.master_address, environment.master_port, JOIN_TIMEOUT)
        rank, world = (-1, -1) if store is None else place  # -1: from the variables
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=JOIN_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        where = f"{environment.master_address}:{environment.master_port}"
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise UsageError(
                f"rank 0 cannot listen on {where}: the port is in use; give the launcher another (--master_port)"
            ) from None
        raise UsageError(f"rank {environment.rank} cannot reach the others at {where}: {first_line(error)}") from None


@contextmanager
def room_for(ranks: int) -> Iterator[None]:
    """Around the start of ranks: where there are more of them than GPUs they run on one at the same time (MPS)."""
    if sharing(ranks) == 1:
        yield
        return
    with shared_gpu() as variables, patch.dict(os.environ, variables):
        yield


def sharing(ranks: int) -> int:
    """How many of a node's ranks share a GPU, where most do; 1 where there is none to share."""
    return -(-ranks // max(1, torch.cuda.device_count())) if torch.cuda.is_available() else 1


def queues(ranks: int) -> int:
    """Queues of the GPU that each of a node's ranks takes: a stream that waits for a peer must not share one with a
    stream that works. Ranks that share a GPU share them: eight of 16 queues each did not start."""
    return max(1, min(16, 64 // sharing(ranks)))


def take_device(environment: Environment) -> None:
    """This rank's GPU becomes the current one, where there are GPUs; ranks share them where there are more ranks."""
    if torch.cuda.is_available():
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", str(queues(environment.local_world_size)))
        torch.cuda.set_device(environment.local_rank % torch.cuda.device_count())


def peer_refusal(grid: Grid) -> str | None:
    """Why states cannot cross ranks through symmetric memory here, the same words everywhere; None where they can."""
    words = refusal(grid.transport())
    everyone = from_all(words) if grid.world > 1 else [words]
    return next((said for said in everyone if said), None)


def patience(settings: RunConfig, late: bool) -> float:
    """Seconds that a rank may make no progress. ``late``: NCCL ends a process whose collective is late without asking,
    so that the verdict has to come before it, and behind those that say more (:meth:`Watch._look`)."""
    return min(settings.stall, settings.timeout + NOTICE + 1) if late else settings.stall


def check_peers() -> None:
    """Raises PeerLost where a wait on this rank's GPU was in vain; waits for nothing."""
    if symmetric := sys.modules.get("dnsp.parallel.symmetric"):
        symmetric.check_all()


def leave() -> None:
    """Give up the process group; what follows is this rank's own."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def agreed() -> Iterator[None]:
    """What one rank refuses in this block, all refuse at its end, with that rank's words. Inside there is no
    communication, or one whose ranks refuse together."""
    refusal: Exception | None = None
    try:
        yield
    except (*REFUSALS, RunError) as error:  # nothing has begun yet: a fault in the data is a refusal too
        refusal = error
    words = from_all(None if refusal is None else str(refusal))
    if any(words):
        raise UsageError(next(word for word in words if word))


def total(tensor: Tensor, grid: Grid) -> Tensor:
    """The sum over all ranks, in place."""
    dist.all_reduce(tensor, group=grid.everyone)
    return tensor


def from_first(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all(value: Any, grid: Grid | None = None) -> list[Any]:
    """Every rank's value, in order of the ranks; with a grid, within the time that a collective of the run may take."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=grid.everyone if grid else None)
    return values


def compare(fields: dict[str, Any], what: str) -> None:
    """Refuses ranks that do not have the same ``fields``: PlanError on every one, naming a rank and its first field."""
    world, everyone = dist.get_world_size(), dist.group.WORLD
    Transport(everyone, range(world), dist.get_rank(), everyone).compare(fields, what)


def slow_group() -> dist.ProcessGroup | None:
    """A gloo group of all ranks whose messages may take as long as a checkpoint does; None for one rank."""
    return dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT) if dist.get_world_size() > 1 else None


def gather_slowly(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """Every rank's value, in order of the ranks, over a :func:`slow_group`; for a thread beside the training."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def wait_for_first() -> None:
    """Until rank 0, which does not wait itself, is here: for as long as joining may take."""
    from_first(None)


class Watch:
    """Around a run: notices a request to stop, and turns the loss of a peer into one message.

    SIGTERM, SIGINT and SIGUSR1 set ``stop``: the run saves after its step and ends. A third SIGTERM or SIGINT ends it
    at once: a launcher that is interrupted may ask a second time for the same reason. Of several ranks that fail the
    first claims it in the run ``folder`` (set once there is one), the others follow; so too where one refuses to go on
    once the run has begun, for the others may not.
    """

    def __init__(self, environment: Environment) -> None:
        self.rank, self.world = environment.rank, environment.world_size
        self.place = Place(self.rank)
        self.stalls = Stalls(self.place, self._stalled)
        self.folder: Path | None = None
        self.stop = self.begun = False
        self.at_end: Callable[[], None] = lambda: None  # gives the terminal back, whatever happened
        self.settle: Callable[[], None] = lambda: None  # before the end that all ranks have agreed on
        self._handlers: dict[signal.Signals, Any] = {}
        self._ended = threading.Event()

    def look_after(self, folder: Path, limit: float) -> None:
        """From now on the run has a folder, and no rank may stand still for ``limit`` seconds."""
        self.folder = self.stalls.folder = folder
        self.begun = True
        os.environ["TORCH_FR_DUMP_TEMP_FILE"] = str(folder / "flight_recorder_rank_")  # NCCL's own, at its timeout
        os.environ["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] = os.environ["TORCH_FR_DUMP_TEMP_FILE"]
        self.place.at(self.place.doing)
        self.stalls.limit = limit

    def __enter__(self) -> Watch:
        self._handlers = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
        self.stalls.start()
        if self.world > 1 and torch.cuda.is_available():
            threading.Thread(target=self._look, daemon=True, name="peers").start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._ended.set()
        self.stalls.limit, self.stalls.error = float("inf"), error
        try:
            if isinstance(error, RunError):
                self.settle()
            self._give_back()
            if self.world == 1:
                leave()  # with peers it would wait for them
            if isinstance(error, REFUSALS) and self.begun:
                said = f"rank {self.rank}: {error}"
                failure = RunError if self._claim(said) else Echo
                raise failure(f"{said}; {way_on(self.folder)}") from None
            if error is None or isinstance(error, (Echo, *REFUSALS)):
                return
            if isinstance(error, PeerLost):
                raise self._lost(str(error)) from None
            if isinstance(error, RuntimeError) and not isinstance(error, RunError) and _LOST.search(str(error)):
                raise self._lost(f"rank {self.rank} lost a peer: {first_line(error)}") from None
            self._claim(f"rank {self.rank}: {first_line(error)}")
            self.stalls.leave_stacks()
        finally:
            self.stalls.stop()
            self._restore()  # not before: a launcher that asks all to end meanwhile shall not cut the words short

    def _stalled(self, message: str) -> None:
        """What the watching thread does with a rank that stands still. A wait on its GPU in vain says more."""
        try:
            try:
                check_peers()
            except PeerLost as lost:
                message = f"{lost}; {self.place}"
            first = self._claim(message)
            others = self.stalls.where_the_others_are(self.world)
            self._give_back()
            end(1, self._verdict(message, others), consequence=not first, quiet=not first)
        finally:  # whatever fails on the way: nobody else ends this rank
            os._exit(1)

    def _verdict(self, message: str, others: str) -> str:
        stacks = f"; Python stacks in {self.folder / STACKS}" if self.folder else ""
        return f"{message}{'; ' * bool(others)}{others}{stacks}. The run ends; {way_on(self.folder)}."

    def _look(self) -> None:
        """Ends this rank where a peer is lost and the main thread does not notice: it waits inside a collective."""
        while not self._ended.wait(0.2):
            try:
                check_peers()
            except PeerLost as lost:
                if self._ended.wait(NOTICE):
                    return
                try:
                    error = self._lost(str(lost))
                    self._give_back()
                    end(1, str(error), consequence=True, quiet=not isinstance(error, PeerFailed))
                finally:
                    os._exit(1)

    def _give_back(self) -> None:
        """No verdict waits for a terminal that is stopped, or the driver of a GPU that has gone."""

        def work() -> None:
            with suppress(Exception):
                self.at_end()

        thread = threading.Thread(target=work, daemon=True, name="at the end")
        with suppress(RuntimeError):  # no room for a thread
            thread.start()
            thread.join(GIVE_BACK)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.stop and number != signal.SIGUSR1:
            self._restore()
        self.stop = True

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _lost(self, message: str) -> RunError:
        said = f"{message}; {self.place}"
        if not self._claim(said):
            self.stalls.leave_stacks()
            return Echo(said)
        return PeerFailed(self._verdict(said, self.stalls.where_the_others_are(self.world)))

    def _claim(self, message: str) -> bool:
        """True for the first rank that fails: the others' failures follow from its own."""
        if self.folder is None:
            return True
        try:
            with open(self.folder / FAILURE, "x") as claim:
                claim.write(message + "\n")
        except FileExistsError:
            return False
        except OSError:
            pass
        return True


def end_with(supervisor: int) -> None:
    """End this process when the one that started it is gone, so that no rank is ever left behind."""

    def watch() -> None:
        while os.getppid() == supervisor:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="supervisor").start()
