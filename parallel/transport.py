"""Messages of one sequence group: exchanges between pairs of ranks, and all-gathers. Peers are ranks of the group.

Every message is posted in the same program order on all ranks, so a pair's messages match by their order alone (NCCL
has no tags). A peer that died, or that stayed away longer than the group's timeout, surfaces as PeerLost. Tensors of a
GPU go through pinned memory where the group speaks gloo alone, which cannot send them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import PeerLost, PlanError, first_line
from .waits import WAITS

T = TypeVar("T")
COMPILING = {"cuda"}  # devices whose kernels are compiled, and proven, at their first launch
_together: set[tuple[Any, ...]] = set()  # what the ranks of a group have come to together, by the group's name
# One tensor for all ranks' parts; torch 2.13 has another name for it, and warns of the old one.
_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
Message = tuple[int, Tensor]  # (peer, contiguous tensor)
Works = list[tuple[int | None, dist.Work]]  # by peer; None where one work is several peers'


class Exchange:
    """Messages under way. It holds their tensors until :meth:`wait`; ``staged``: where what arrives in the host's
    memory belongs."""

    def __init__(
        self,
        transport: Transport,
        sent: Works,
        received: Works,
        tensors: list[Tensor],
        what: str,
        staged: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> None:
        self._transport, self._sent, self._received = transport, sent, received
        self._tensors, self._what, self._staged = tensors, what, staged

    def arrived(self) -> None:
        """Waits for what is received, which may then be read; what is sent may still be under way."""
        self._wait(self._received)
        for host, device in self._staged:
            device.copy_(host, non_blocking=True)
        self._received, self._staged = [], ()

    def wait(self) -> None:
        """Waits for everything."""
        self.arrived()
        self._wait(self._sent)
        self._sent, self._tensors = [], []

    def _wait(self, works: Works) -> None:
        for peer, work in works:
            self._transport.guard(work.wait, peer, self._what)


class Transport:
    """The messages of a group. ``group`` None: the group of one, which never sends; ``ranks``: its global ranks.
    ``control``: the same ranks in a gloo group that has long patience, for what hosts tell each other before a step;
    ``timeout``: seconds that a message may take; ``near``: the ranks of the group on this rank's host, neighbours of
    each other, and ``near_control`` those as a group; ``hosts``: how many the group spans."""

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        ranks: Sequence[int] = (0,),
        rank: int = 0,
        control: dist.ProcessGroup | None = None,
        timeout: float = 30.0,
        near: Sequence[int] | None = None,
        near_control: dist.ProcessGroup | None = None,
        hosts: int = 1,
    ) -> None:
        self.group, self.ranks, self.rank = group, tuple(ranks), rank
        self.control, self.timeout = control, timeout
        self.near = tuple(range(len(self.ranks)) if near is None else near)
        self.near_control, self.hosts = near_control, hosts
        self.calls = 0  # exchanges, gathers and hops started: recomputation must add none

    @property
    def size(self) -> int:
        return len(self.ranks)

    def sends_from_gpu(self) -> bool:
        """Whether the group's backend sends tensors of a GPU itself."""
        return "nccl" in backend_of(self.group)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message], what: str) -> Exchange:
        """Starts sends and receives together; the order between two ranks is the order of the lists. Empty tensors
        are not sent, and must be empty on both sides."""
        sends = [(peer, tensor) for peer, tensor in sends if tensor.numel()]
        receives = [(peer, buffer) for peer, buffer in receives if buffer.numel()]
        tensors = [tensor for _, tensor in [*sends, *receives]]
        if not tensors:
            return Exchange(self, [], [], [], what)
        self.calls += 1
        staged: list[tuple[Tensor, Tensor]] = []
        if tensors[0].is_cuda and not self.sends_from_gpu():
            sends = [(peer, _on_host(tensor)) for peer, tensor in sends]
            staged = [(torch.empty_like(buffer, device="cpu", pin_memory=True), buffer) for _, buffer in receives]
            receives = [(peer, host) for (peer, _), (host, _) in zip(receives, staged, strict=True)]
            if sends:
                torch.cuda.current_stream(tensors[0].device).synchronize()  # gloo reads the host's memory at once
            tensors += [tensor for _, tensor in [*sends, *receives]]
        ops = [dist.P2POp(dist.isend, tensor, self.ranks[peer], self.group) for peer, tensor in sends]
        ops += [dist.P2POp(dist.irecv, buffer, self.ranks[peer], self.group) for peer, buffer in receives]
        peers: list[int | None] = [peer for peer, _ in [*sends, *receives]]
        works = self.guard(lambda: dist.batch_isend_irecv(ops), peers[0], what)
        if len(works) != len(ops):  # NCCL makes one of them all
            one_peer = peers[0] if len(set(peers)) == 1 else None
            return Exchange(self, [], [(one_peer, work) for work in works], tensors, what, staged)
        by_peer = list(zip(peers, works, strict=True))
        return Exchange(self, by_peer[: len(sends)], by_peer[len(sends) :], tensors, what, staged)

    def all_gather(self, tensor: Tensor, what: str) -> Tensor:
        """Every rank's tensor, ``[P, ...]`` by rank of the group; equal shapes. NCCL writes them where they stay."""
        if self.group is None:
            return tensor[None]
        self.calls += 1
        mine = tensor.contiguous().view(-1)  # flat on both sides, which every backend takes
        whole = mine.new_empty(self.size * mine.numel())
        self.guard(lambda: _gather_single(whole, mine, group=self.group), None, what)
        return whole.view(self.size, *tensor.shape)

    def all_to_all(self, tensor: Tensor, what: str) -> Tensor:
        """Part r of every rank's contiguous tensor, along its first axis of as many parts as ranks, to rank r."""
        arriving = torch.empty_like(tensor)
        self.calls += 1
        self.guard(lambda: dist.all_to_all_single(arriving, tensor, group=self.group), None, what)
        return arriving

    def nearby(self) -> Transport:
        """The messages of the ranks on this host."""
        if len(self.near) == self.size:
            return self
        ranks, control = [self.ranks[rank] for rank in self.near], self.near_control
        return Transport(control, ranks, self.near.index(self.rank), control, self.timeout)

    # What hosts tell each other; nothing on a GPU waits for it.

    def from_all(self, value: Any) -> list[Any]:
        """Every rank's value, by rank of the group."""
        if self.control is None:
            return [value] * self.size
        values: list[Any] = [None] * self.size
        self.guard(lambda: dist.all_gather_object(values, value, group=self.control), None, "what the ranks agree on")
        return values

    def barrier(self) -> None:
        """Until every rank's host is here."""
        self.from_all(None)

    def first(self, what: str, tensor: Tensor, way: str, layer: int | None, **fields: int) -> None:
        """Before the first message of a kind in a layer: until every rank's host has come to it, however long it
        compiles what comes before, of this layer or the last. The time that a message may take counts from there. All
        ranks call it together.

        Raises: PlanError on every rank, naming rank and field, where one means another type or another of ``fields``.
        """
        if self.control is None or tensor.device.type not in COMPILING:
            return
        key = self.control.group_name, what, way, layer, tensor.dtype, *fields.values()
        if key not in _together:
            self._hold_against({**fields, "dtype": str(tensor.dtype).removeprefix("torch.")}, what)
            _together.add(key)

    def compare(self, fields: dict[str, Any], what: str) -> None:
        """Raises PlanError on every rank, naming rank and field, where one has another value than the group's first."""
        if self.control is not None and not self._digests_agree(fields, what):
            self._hold_against(fields, what)

    def _hold_against(self, fields: dict[str, Any], what: str) -> None:
        first, *others = self.from_all(fields)
        for rank, mine in enumerate(others, 1):
            for name, value in mine.items():
                if value != first.get(name):
                    raise PlanError(
                        f"the ranks disagree about {what}: {name} is {_short(first.get(name))} on rank {self.ranks[0]} "
                        f"and {_short(value)} on rank {self.ranks[rank]}; give every rank of a group the same"
                    )

    def _digests_agree(self, fields: dict[str, Any], what: str) -> bool:
        """Whether all ranks have these fields; asked within the time that a message may take, where the group's
        backends carry tensors of the host."""
        if "gloo" not in str(dist.get_backend_config(self.group)):
            return False
        digest = hashlib.sha256(repr(sorted(fields.items())).encode()).digest()
        mine = torch.frombuffer(bytearray(digest), dtype=torch.int64)
        return all(torch.equal(mine, other) for other in self.all_gather(mine, f"the comparison of {what}"))

    def guard(self, call: Callable[[], T], peer: int | None, what: str) -> T:
        try:
            with WAITS.counted():
                return call()
        except RuntimeError as error:
            missing = None if peer is None else self.ranks[peer]
            raise PeerLost(self.ranks[self.rank], missing, what, first_line(error)) from error


def backend_of(group: dist.ProcessGroup | None) -> str:
    """What carries a group's tensors on a GPU: nccl or gloo."""
    config = str(dist.get_backend_config(group))
    found = re.search(r"cuda:(\w+)", config)
    return found[1] if found else config


def _on_host(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
