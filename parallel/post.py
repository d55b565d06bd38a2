"""Exchanges between pairs of ranks through symmetric memory: what ``Transport.exchange`` does, on the device alone.

Every rank has some slots. A message is copied into the next one, on a stream for sends, and taken from there by the
receiver, on a stream for receives (see ``kernels.triton_post``); so messages travel while the compute stream computes,
and the host waits for nothing. Keys and values, their gradients and halos go this way.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from dnsp.kernels import triton_post
from dnsp.kernels.triton_post import APART, RING
from dnsp.kernels.triton_scan import make_clock

from .symmetric import STATUS, Region
from .transport import Message, Transport
from .waits import WAITS

SLOTS = 4  # of a rank: messages on their way, to whomever; at most RING
GRAIN = 64  # words


class _Box(NamedTuple):
    """A rank's memory as its parts; P ranks, S slots."""

    posted_PA: Tensor  # messages that each rank has sent here
    ring_PR: Tensor  # in which of its slots they are
    emptied_SA: Tensor  # messages taken from each slot here
    slots_SN: Tensor

    @staticmethod
    def of(words: Tensor, ranks: int) -> _Box:
        sizes = [STATUS, ranks * APART, ranks * RING, SLOTS * APART]
        _, posted, ring, emptied, slots = words.split([*sizes, words.numel() - sum(sizes)])
        by_rank = posted.view(ranks, APART), ring.view(ranks, RING)
        return _Box(*by_rank, emptied.view(SLOTS, APART), slots.view(SLOTS, -1))


class Posted:
    """Messages under way, as ``transport.Exchange``; the waiting is the compute stream's."""

    def __init__(self, post: Post, tensors: list[Tensor], received: torch.cuda.Event | None, sent: object) -> None:
        self._post, self._tensors, self._received, self._sent = post, tensors, received, sent

    def arrived(self) -> None:
        self._post.follow(self._received)
        self._received = None

    def wait(self) -> None:
        self.arrived()
        self._post.follow(self._sent)
        self._sent, self._tensors = None, []


class Post(Region):
    """A group's slots, and this rank's counts. All its ranks make the same calls in the same order."""

    def __init__(self, comm: Transport, device: torch.device) -> None:
        super().__init__(comm, device)
        self.slot_words, self._next = 0, 0
        self._out, self._in = (torch.cuda.Stream(device) for _ in range(2))

    def reserve(self, size: int) -> None:
        """Room for messages of ``size`` bytes. All ranks together; nothing is done where there is room."""
        words = _slot_words(size)
        if words <= self.slot_words:
            return
        self.grow(_words(self.comm.size, words), f"{SLOTS} messages of {4 * words / 2**20:.1f} MiB")
        _load(self.device)
        self.comm.barrier()

    def take(self, memories: Sequence[Tensor], stamps: int = 2) -> None:
        super().take(memories, stamps)
        ranks = self.comm.size
        self._boxes = [_Box.of(words, ranks) for words in memories]
        self.slot_words, self._next = self._boxes[0].slots_SN.shape[1], 0

        def counters(n: int) -> Tensor:
            return torch.zeros(n, APART, dtype=torch.int32, device=self.device)

        self._sent, self._taken, self._filled = counters(ranks), counters(ranks), counters(SLOTS)
        self._kept.append((self._sent, self._taken, self._filled))

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message], what: str) -> Posted:
        """Starts sends and receives together; as ``Transport.exchange``."""
        self.check()
        sends = [(peer, tensor) for peer, tensor in sends if tensor.numel()]
        receives = [(peer, buffer) for peer, buffer in receives if buffer.numel()]
        if not sends and not receives:
            return Posted(self, [], None, None)
        mine = self._boxes[self.comm.rank]
        tensors = [tensor for _, tensor in [*sends, *receives]]
        with self._on(self._out if sends else None) as sent:
            for peer, tensor in sends:
                slot, self._next = self._next, (self._next + 1) % SLOTS
                size = tensor.numel() * tensor.element_size()
                assert size <= 4 * self.slot_words and tensor.is_contiguous(), (tensor.shape, self.slot_words)
                where = self.where(what, None, peer)
                triton_post.wait_room(self._filled[slot], mine.emptied_SA[slot], self.clock, where, peer)
                mine.slots_SN[slot].view(torch.uint8)[:size].copy_(tensor.flatten().view(torch.uint8))
                there = self._boxes[peer]
                triton_post.post(
                    self._sent[peer], self._filled[slot], there.ring_PR[self.comm.rank],
                    there.posted_PA[self.comm.rank], self.clock, slot,
                )  # fmt: skip
        with self._on(self._in if receives else None) as received:
            for peer, buffer in receives:
                size = buffer.numel() * buffer.element_size()
                whole = size % 4 == 0 and buffer.is_contiguous() and buffer.data_ptr() % 16 == 0
                out = buffer.view(-1).view(torch.int32) if whole else None
                if out is None:
                    out = torch.empty(-(-size // 4), dtype=torch.int32, device=buffer.device)
                where = self.where(what, peer, None)
                triton_post.wait_message(mine.posted_PA[peer], self._taken[peer], self.clock, where, peer)
                there = self._boxes[peer]
                triton_post.take(there.slots_SN, mine.ring_PR[peer], self._taken[peer], there.emptied_SA, out)
                if not whole:
                    buffer.view(-1).copy_(out.view(torch.uint8)[:size].view(buffer.dtype))
        return Posted(self, tensors, received.event, sent.event)

    def _on(self, stream: torch.cuda.Stream | None) -> _Aside:
        return _Aside(stream if self.device.type == "cuda" else None)

    def follow(self, event: object) -> None:
        """The compute stream waits for what was done aside."""
        if isinstance(event, torch.cuda.Event):
            with WAITS.counted():
                torch.cuda.current_stream(self.device).wait_event(event)


def bytes_of(ranks: int, size: int) -> int:
    """Bytes of symmetric memory a rank, for messages of ``size`` bytes between so many."""
    return 4 * _words(ranks, _slot_words(size))


def _slot_words(size: int) -> int:
    return -(-size // (4 * GRAIN)) * GRAIN


def _words(ranks: int, slot_words: int) -> int:
    return STATUS + ranks * (APART + RING) + SLOTS * (APART + slot_words)


class _Aside:
    """Work on a stream behind what the current stream has been given; ``event``: when it is done."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self.stream = stream
        self.event: torch.cuda.Event | None = None
        self._context: AbstractContextManager[object] = nullcontext()

    def __enter__(self) -> _Aside:
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
            self._context = torch.cuda.stream(self.stream)
        self._context.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.stream is not None:
            self.event = self.stream.record_event()
        self._context.__exit__(*exception)  # type: ignore[arg-type]


def _load(device: torch.device) -> None:
    """Every binary is proven and loaded before anyone waits for a rank that still compiles: a message of this rank to
    itself."""
    triton_post.require(device)
    counter = torch.zeros(4, APART, dtype=torch.int32, device=device)
    ring, slots = (torch.zeros(n, dtype=torch.int32, device=device) for n in (RING, 64))
    clock = make_clock(1, device, 30.0)
    sent, filled, posted, taken = counter
    emptied = torch.zeros(1, APART, dtype=torch.int32, device=device)
    triton_post.wait_room(filled, emptied[0], clock, 0, 0)
    triton_post.post(sent, filled, ring, posted, clock, 0)
    triton_post.wait_message(posted, taken, clock, 0, 0)
    triton_post.take(slots.view(1, -1), ring, taken, emptied, torch.zeros(64, dtype=torch.int32, device=device))
