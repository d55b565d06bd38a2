"""Messages of one sequence group: exchanges between pairs of ranks, and all-gathers. Peers are ranks of the group.

Every message is posted in the same program order on all ranks, so a pair's messages match by their order alone (NCCL
has no tags). A peer that died, or that stayed away longer than the group's timeout, surfaces as PeerLost.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import PeerLost
from .waits import WAITS

T = TypeVar("T")
Message = tuple[int, Tensor]  # (peer, contiguous tensor)


Works = list[tuple[int | None, dist.Work]]  # by peer; None where one work is several peers'


class Exchange:
    """Messages under way. It holds their tensors until :meth:`wait`."""

    def __init__(self, transport: Transport, sent: Works, received: Works, tensors: list[Tensor], what: str) -> None:
        self._transport, self._sent, self._received = transport, sent, received
        self._tensors, self._what = tensors, what

    def arrived(self) -> None:
        """Waits for what is received, which may then be read; what is sent may still be under way."""
        self._wait(self._received)
        self._received = []

    def wait(self) -> None:
        """Waits for everything."""
        self.arrived()
        self._wait(self._sent)
        self._sent, self._tensors = [], []

    def _wait(self, works: Works) -> None:
        for peer, work in works:
            self._transport.guard(work.wait, peer, self._what)


class Transport:
    """The messages of a group. ``group`` None: the group of one, which never sends; ``ranks``: its global ranks."""

    def __init__(self, group: dist.ProcessGroup | None = None, ranks: Sequence[int] = (0,), rank: int = 0) -> None:
        self.group, self.ranks, self.rank = group, tuple(ranks), rank
        self.calls = 0  # exchanges and gathers started: recomputation must add none

    @property
    def size(self) -> int:
        return len(self.ranks)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message], what: str) -> Exchange:
        """Starts sends and receives together; the order between two ranks is the order of the lists. Empty tensors
        are not sent, and must be empty on both sides."""
        sends = [(peer, tensor) for peer, tensor in sends if tensor.numel()]
        receives = [(peer, buffer) for peer, buffer in receives if buffer.numel()]
        tensors = [tensor for _, tensor in [*sends, *receives]]
        if not tensors:
            return Exchange(self, [], [], [], what)
        self.calls += 1
        ops = [dist.P2POp(dist.isend, tensor, self.ranks[peer], self.group) for peer, tensor in sends]
        ops += [dist.P2POp(dist.irecv, buffer, self.ranks[peer], self.group) for peer, buffer in receives]
        peers: list[int | None] = [peer for peer, _ in [*sends, *receives]]
        works = self.guard(lambda: dist.batch_isend_irecv(ops), peers[0], what)
        if len(works) != len(ops):  # NCCL makes one of them all
            one_peer = peers[0] if len(set(peers)) == 1 else None
            return Exchange(self, [], [(one_peer, work) for work in works], tensors, what)
        by_peer = list(zip(peers, works, strict=True))
        return Exchange(self, by_peer[: len(sends)], by_peer[len(sends) :], tensors, what)

    def all_gather(self, tensor: Tensor, what: str) -> list[Tensor]:
        """Every rank's tensor, by rank of the group; equal shapes."""
        if self.group is None:
            return [tensor]
        self.calls += 1
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in self.ranks]
        self.guard(lambda: dist.all_gather(parts, tensor, group=self.group), None, what)
        return parts

    def guard(self, call: Callable[[], T], peer: int | None, what: str) -> T:
        try:
            with WAITS.counted():
                return call()
        except RuntimeError as error:
            missing = None if peer is None else self.ranks[peer]
            raise PeerLost(self.ranks[self.rank], missing, what, _reason(error)) from error


def _reason(error: RuntimeError) -> str:
    """The library's first line, without its source file's name and its advice."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"\[[^]]*\.(cc|cpp|h):\d+\]\s*", "", line).split(" This is typically")[0]
