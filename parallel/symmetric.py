"""Memory that the ranks of a sequence group share: for the scan an inbox a side, written by the neighbour's kernels.

It is allocated once, at the first scan (or before, by ``reserve``), through torch's symmetric memory: on one host, one
GPU a rank or many ranks on one GPU. What is in it:

    status            this rank: has a wait failed, and whom does it wait for
    ready, free       counts of messages by tile (see ``kernels.triton_scan``), for the left and the right neighbour
    slots             the states that arrive from the left, and from the right

Nothing on the host takes part in a message. A wait that was in vain leaves a record in the host's memory, which
:meth:`Region.check` turns into PeerLost: at the next scan, at every step, and by the watch of a run.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from dnsp.kernels import proof, triton_scan
from dnsp.kernels.triton_scan import DEPTH, TILE, Inbox, Outbox

from .errors import CannotShare, PeerLost, first_line
from .probe import places, refusal
from .transport import Transport
from .waits import WAITS

MIB = 2**20
LEFT, RIGHT = 0, 1
STATUS = 16  # words
GRAIN = 64  # tiles; so that every part begins on a boundary of 256 bytes


def words_of(capacity: int) -> int:
    """32-bit words that a rank shares for states of so many tiles."""
    return STATUS + 4 * capacity + 2 * DEPTH * capacity * TILE


def capacity_of(tiles: int) -> int:
    return -(-tiles // GRAIN) * GRAIN


def tiles(rows: int, value_heads: int, value_width: int) -> int:
    """Tiles of a state of ``rows`` rows of such heads."""
    return rows * value_heads * -(-value_width // triton_scan.COLUMNS)


def budget(rows: int, value_heads: int, value_width: int) -> int:
    """Bytes of symmetric memory a rank, for states of ``rows`` rows of such heads."""
    return bytes_of(tiles(rows, value_heads, value_width))


def bytes_of(tiles: int) -> int:
    """The same for states of so many tiles."""
    return 4 * words_of(capacity_of(tiles))


class _Part(NamedTuple):
    """A rank's memory as its parts, by side."""

    status: Tensor
    ready: tuple[Tensor, Tensor]
    free: tuple[Tensor, Tensor]
    slots: tuple[Tensor, Tensor]

    @staticmethod
    def of(words: Tensor, capacity: int) -> _Part:
        status, counts, slots = words.split([STATUS, 4 * capacity, 2 * DEPTH * capacity * TILE])
        ready_left, ready_right, free_left, free_right = counts.view(4, capacity)
        left, right = slots.view(torch.float32).view(2, DEPTH, capacity, TILE)
        return _Part(status, (ready_left, ready_right), (free_left, free_right), (left, right))


class Region:
    """Memory of one group for one purpose, and what happens when a wait on it is in vain. Its ranks make it together.

    The first words of every rank's memory are its ``status`` (see :class:`~dnsp.kernels.triton_scan.Clock`).

    Raises: CannotShare where the ranks cannot.
    """

    def __init__(self, comm: Transport, device: torch.device) -> None:
        self.comm, self.device = comm, device
        self.memories: list[Tensor] = []  # int32 words, by rank; none yet
        self._where: dict[tuple[str, int | None, int | None], int] = {}
        self._kept: list[Any] = []  # earlier, smaller memories and their counts: a graph may have captured addresses
        words = refusal(comm)
        if words:
            raise CannotShare(words)
        self._side = torch.cuda.Stream(device)

    def grow(self, words: int, what: str) -> None:
        """Another memory of so many words a rank, all zero. All ranks together; ``what``: is in it, for refusals.

        Raises: CannotShare with the figures of what does not fit.
        """
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"memory for {what} is shared out while a CUDA graph is captured, which takes all ranks' hosts; run "
                f"once before the capture what is captured"
            )
        need = 4 * words
        torch.cuda.synchronize(self.device)  # no message is under way when the memory changes
        where = places(self.comm)
        free = self.comm.from_all(torch.cuda.mem_get_info(self.device)[0])
        for rank, place in enumerate(where):
            sharers = where.count(place)
            if need * sharers > free[rank]:
                raise CannotShare(
                    f"the symmetric buffers take {need / MIB:.0f} MiB a rank ({what}), {sharers} of them on the GPU of "
                    f"rank {self.comm.ranks[rank]}, which has {free[rank] / MIB:.0f} MiB free"
                )
        mine, handle, error = None, None, ""
        try:
            mine, handle = _allocate(words, self.comm, self.device, len(set(where)) < len(where))
        except RuntimeError as failure:
            error = first_line(failure)
        for rank, said in enumerate(self.comm.from_all(error)):
            if said:
                raise CannotShare(f"rank {self.comm.ranks[rank]} cannot share {need / MIB:.0f} MiB of memory: {said}")
        assert mine is not None and handle is not None
        ranks = range(self.comm.size)
        others = [mine if r == self.comm.rank else handle.get_buffer(r, (words,), torch.int32) for r in ranks]
        self._kept.append(handle)
        self.take(others)
        torch.cuda.synchronize(self.device)
        self.comm.barrier()  # all counts are zero everywhere

    def take(self, memories: Sequence[Tensor], stamps: int = 1) -> None:
        """From here on these are the memories of the group's ranks, words that are zero."""
        record = self.clock.record if self.memories else None  # a graph may still wait on an earlier memory
        self.memories = list(memories)
        status = self.memories[self.comm.rank][:4]
        self.clock: triton_scan.Clock = triton_scan.make_clock(stamps, self.device, self.comm.timeout, status, record)
        self._record = self.clock.record.numpy()
        self._kept.append((*memories, self.clock))

    @property
    def bytes(self) -> int:
        """Of this rank's own memory."""
        return 4 * self.memories[self.comm.rank].numel() if self.memories else 0

    def where(self, what: str, source: int | None, target: int | None) -> int:
        """A number for a wait, as a kernel records it."""
        return self._where.setdefault((what, source, target), len(self._where) + 1)

    def check(self) -> None:
        """Raises PeerLost where a wait was in vain: it names the rank that did not deliver. Waits for nothing."""
        if self.memories and self._record[0]:
            raise self._lost(int(self._record[0]))

    def _lost(self, record: int) -> PeerLost:
        kind, number = record % 4, record // 4
        what, source, target = next(key for key, n in self._where.items() if n == number)
        peer = source if kind == 1 else target
        assert peer is not None
        culprit = self._follow(peer)
        seconds = f"{self.comm.timeout:g} s"
        if kind == 1:
            reason = f"rank {self.comm.ranks[peer]} did not deliver within {seconds}"
        else:
            reason = f"rank {self.comm.ranks[peer]} did not take what came before within {seconds}"
        if culprit != peer:
            reason += f", itself waiting for rank {self.comm.ranks[culprit]}"
        return PeerLost(self.comm.ranks[self.comm.rank], self.comm.ranks[culprit], what, reason)

    def _status(self, rank: int) -> list[int]:
        """A rank's, now: on a stream of its own, for the others may stand."""
        with torch.cuda.stream(self._side):
            return self.memories[rank][:4].tolist()

    def _follow(self, peer: int) -> int:
        """The rank at the end of those who wait for another: each rank's memory says whom it waits for."""
        seen, last = {self.comm.rank}, peer
        while peer not in seen:
            seen.add(peer)
            last = peer
            peer = self._status(peer)[1] - 1
            if peer < 0:
                break
        return last


class Symmetric(Region):
    """The scan's memory, and this rank's ends of it. Ranks call :meth:`meet` together."""

    def __init__(self, comm: Transport, device: torch.device) -> None:
        super().__init__(comm, device)
        self.capacity = 0
        self._met: set[tuple[Any, ...]] = set()
        self._parts: list[_Part] = []

    # Once a shape.

    def meet(self, U_NBHKV: Tensor) -> None:
        """Before the first message of a shape, which is the same on all ranks: the kernels are proven and loaded on
        every one, and there is room. Deadlines count from here.

        Raises: CannotShare with the figures of what does not fit.
        """
        self.check()
        shape = tuple(U_NBHKV.shape[1:])
        if shape in self._met:
            return
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the first scan of states [B, HV, K, V]={list(shape)} comes while a CUDA graph is captured: "
                f"memory is shared out then, which takes all ranks' hosts; run it once before the capture"
            )
        proof.require_fold(U_NBHKV)
        _warm_up(U_NBHKV)
        self.comm.barrier()  # however long the others compile
        self.reserve(triton_scan.tiles_of(U_NBHKV))
        torch.cuda.synchronize(self.device)
        self.comm.barrier()
        self._met.add(shape)

    def reserve(self, tiles: int) -> None:
        """Room for states of so many tiles. All ranks together; nothing is done where there is room."""
        if (capacity := capacity_of(tiles)) > self.capacity:
            self.grow(words_of(capacity), f"2 sides x {DEPTH} states of {capacity} tiles")

    def take(self, memories: Sequence[Tensor], stamps: int = 1) -> None:
        self.capacity = (memories[0].numel() - STATUS) // (4 + 2 * DEPTH * TILE)
        super().take(memories, self.capacity)
        self._parts = [_Part.of(words, self.capacity) for words in memories]
        shape = 2, self.capacity
        self._taken, self._sent = (torch.zeros(shape, dtype=torch.int32, device=self.device) for _ in range(2))
        self._kept.append((self._taken, self._sent))
        self._inboxes: dict[int, Inbox] = {}
        self._outboxes: dict[int, Outbox] = {}

    # Every message.

    def inbox(self, source: int) -> Inbox:
        """Of what comes from a neighbour (a rank of the group)."""
        if source not in self._inboxes:
            mine, its = self._sides(source)
            here, there = self._parts[self.comm.rank], self._parts[source]
            self._inboxes[source] = Inbox(here.slots[mine], here.ready[mine], self._taken[mine], there.free[its])
        return self._inboxes[source]

    def outbox(self, target: int) -> Outbox:
        """Of what goes to a neighbour."""
        if target not in self._outboxes:
            mine, its = self._sides(target)
            here, there = self._parts[self.comm.rank], self._parts[target]
            self._outboxes[target] = Outbox(there.slots[its], there.ready[its], self._sent[mine], here.free[mine])
        return self._outboxes[target]

    def wait(
        self, U_NBHKV: Tensor, rows: slice | None, source: int | None, target: int | None, what: str
    ) -> tuple[Inbox | None, Outbox | None]:
        """The stream waits until these rows of the ``B * HV`` of a state like U's, all unless told, have come from
        ``source``, and have room on the way to ``target``: the ends of both. ``what``: for PeerLost."""
        inbox = None if source is None else self.inbox(source)
        outbox = None if target is None else self.outbox(target)
        peer = source if source is not None else target
        if peer is not None:
            with WAITS.counted():  # the stream's own time in it
                tiles, first = triton_scan.tiles_of(U_NBHKV), 0
                if rows is not None:
                    each = tiles // (U_NBHKV.shape[1] * U_NBHKV.shape[2])
                    tiles, first = each * (rows.stop - rows.start), each * rows.start
                triton_scan.wait(tiles, inbox, outbox, self.clock, self.where(what, source, target), peer, first)
        return inbox, outbox

    def _sides(self, peer: int) -> tuple[int, int]:
        """(my side that faces a neighbour, its side that faces me)"""
        assert abs(peer - self.comm.rank) == 1, (peer, self.comm.rank)
        return (LEFT, RIGHT) if peer < self.comm.rank else (RIGHT, LEFT)


def _warm_up(U_NBHKV: Tensor) -> None:
    """Every binary is loaded before anyone waits for a rank that still compiles."""
    _, B, HV, K, V = U_NBHKV.shape
    device, tiles = U_NBHKV.device, triton_scan.tiles_of(U_NBHKV)
    M, U = torch.zeros(1, B, HV, K, K, device=device), torch.zeros(1, B, HV, K, V, device=device)
    inbox, outbox, clock = triton_scan.loopback(tiles, device)
    passes = None, torch.ones(1, B, dtype=torch.bool, device=device)
    flags = None, torch.ones(1, B, HV, dtype=torch.int32, device=device)
    for continues, forgets, reverse in product(passes, flags, (False, True)):
        triton_scan.wait(tiles, None, outbox, clock)
        triton_scan.fold(M, U, None, continues, forgets, 1, reverse, outbox=outbox, clock=clock)
        triton_scan.wait(tiles, inbox, None, clock)
        triton_scan.fold(M, U, None, continues, forgets, 1, reverse, inbox=inbox, clock=clock)


def _allocate(words: int, comm: Transport, device: torch.device, shared: bool) -> tuple[Tensor, Any]:
    """Zeroed words of symmetric memory, and torch's handle on everyone's."""
    if shared:
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # never used here, and not everywhere to be had
    os.environ.setdefault("TORCH_SYMMMEM_IMPLICIT_POOL", "0")  # a pool's blocks begin elsewhere on every rank
    symmetric_memory = importlib.import_module("torch.distributed._symmetric_memory")
    mine = symmetric_memory.empty(words, dtype=torch.int32, device=device)
    mine.zero_()
    assert comm.control is not None
    torch.cuda.synchronize(device)
    return mine, symmetric_memory.rendezvous(mine, comm.control)


R = TypeVar("R", bound=Region)
_regions: dict[tuple[str, type], Any] = {}  # of this process, by the name of the group and the purpose


def of_group(purpose: type[R], comm: Transport, device: torch.device) -> R:
    """The group's memory for a purpose; made at the first call, which all its ranks make together."""
    assert comm.control is not None
    key = comm.control.group_name, purpose
    if key not in _regions:
        _regions[key] = purpose(comm, device)
    return _regions[key]


def memory(comm: Transport, device: torch.device) -> Symmetric:
    """The scan's."""
    return of_group(Symmetric, comm, device)


def check_all() -> None:
    """Raises PeerLost where a wait of this process was in vain. Waits for nothing."""
    for region in list(_regions.values()):
        region.check()
