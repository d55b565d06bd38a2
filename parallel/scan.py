"""The scan of boundary states over ranks: segments of one device and ranks of a group are one chain.

A state crosses every segment by ``kernels.scan.fold`` alone, in global order, one segment at a time, each head by the
operations of :class:`~dnsp.kernels.scan.LocalScan`; so neither the layout nor the transport shows in its bits.

    peer    as p2p, on the device alone: the kernel that folds an interval writes the state into the next rank's memory
            (see symmetric.py), tile by tile, and raises flags there; that rank's stream waits for them. No host takes
            part. From one host to another it is p2p.
    p2p     each interval waits for the state of the interval before it, folds its own segments and sends the state on:
            one state a hop, in parts where the chain is long (see :func:`parts_of`). Where a document starts in an
            interval, what leaves it is sent before anything is awaited.
    gather  every rank gathers all summaries and folds the chain by itself: one collective, (M, U) of every segment.

A pass is started and awaited (see ``kernels.scan.Scan``). On a GPU all of it runs on a stream of its own, before whose
kernels others of this rank give way; the compute stream goes on with what needs no state, and follows that stream when
the pass is awaited. Where the host carries messages (gloo), a pass is started as far as it goes without waiting for
another rank (what is sent before anything is awaited is sent), and the rest is done when it is awaited.

Long because when a part comes, what is posted with it and what folds it are read together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dnsp.kernels.scan import Coming, LocalScan, fold, on_gpu, reverse_fold

from .errors import PlanError
from .layout import Layout
from .route import Leg, Part, Route, itinerary, route
from .transport import Exchange, Message, Transport
from .waits import WAITS

if TYPE_CHECKING:
    from .symmetric import Symmetric

Fold = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
Steps = Generator[None, None, Tensor | None]  # stops before each wait for another rank; returns the chain's end
MESSAGE = 2**22  # bytes that a wire carries while a message costs what it costs at any size: 80 us at 50 GB/s


@dataclass(frozen=True)
class ParallelScan:
    """A scan (see ``kernels.scan.Scan``) over the sequence group. ``per_interval``: segments of one interval;
    ``open``: for each segment of the sequence, whether any row's state passes through it, known on the host;
    ``continues_all_NB``: that by row, on the device."""

    layout: Layout
    rank: int
    comm: Transport
    kind: str  # peer | p2p | gather
    per_interval: int
    open: tuple[bool, ...]
    continues_all_NB: Tensor
    layer: int | None = None  # of a model, for messages

    @property
    def here(self) -> bool:
        return self.layout.ranks == 1

    def forward(
        self,
        M_NBHKK: Tensor,
        U_NBHKV: Tensor,
        continues_NB: Tensor | None,
        forgets_NBH: Tensor | None,
        initial_BHKV: Tensor | None,
        want_final: bool,
    ) -> Coming:
        """``(incoming_NBHKV, final_BHKV)``; the final state on the rank with the last interval, elsewhere None."""
        if self.here:  # the same bits in one launch
            return LocalScan().forward(M_NBHKK, U_NBHKV, continues_NB, forgets_NBH, initial_BHKV, want_final)
        has_initial = initial_BHKV is not None
        chain = _Chain(self, M_NBHKK, U_NBHKV, continues_NB, forgets_NBH, fold, has_initial, want_final, backward=False)
        return chain.start(initial_BHKV)

    def reverse(
        self,
        M_NBHKK: Tensor,
        D_NBHKV: Tensor,
        continues_NB: Tensor | None,
        forgets_NBH: Tensor | None,
        final_grad_BHKV: Tensor | None,
        has_initial: bool,
        want_final: bool,
    ) -> Coming:
        """``(outgoing_NBHKV, initial_grad_BHKV)``; the initial state's gradient on the rank that holds interval 0."""
        if self.here:
            return LocalScan().reverse(
                M_NBHKK, D_NBHKV, continues_NB, forgets_NBH, final_grad_BHKV, has_initial, want_final
            )
        chain = _Chain(
            self, M_NBHKK, D_NBHKV, continues_NB, forgets_NBH, reverse_fold, want_final, has_initial, backward=True
        )
        return chain.start(final_grad_BHKV)


def in_layer(layer: int | None) -> str:
    """The words that follow an operation's name."""
    return "" if layer is None else f" of layer {layer}"


def parts_of(state_BHKV: Tensor, hops: int) -> int:
    """In how many parts a state travels over so many messages, one behind another; the same on every rank.

    Value heads know nothing of each other: the first are folded and sent on while others are still on their way. With
    m = MESSAGE, h hops of s bytes in n parts take as long as ``(h + n - 1) (m + s / n)`` bytes on a wire, the least at
    ``n = sqrt((h - 1) s / m)``. Most of m is the host's work on a message. One, where a matrix product's bits may
    depend on how many are formed at once: by torch on a GPU, or at odd widths on a CPU.
    """
    B, HV, K, V = state_BHKV.shape
    alike = on_gpu(state_BHKV) or (not state_BHKV.is_cuda and K % 16 == V % 16 == 0)
    best = round(math.sqrt(max(0, hops - 1) * state_BHKV.nbytes / MESSAGE))
    return max(1, min(best, B * HV)) if alike else 1


@lru_cache
def _side(device: torch.device) -> torch.cuda.Stream | None:
    """The stream that scans take; none on a CPU."""
    return torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None


@contextmanager
def _current(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """A stream of the current device as the current one; None: nothing changes. torch.cuda.stream would look for the
    device first, which takes several times as long."""
    if stream is None:
        yield
        return
    before = torch.cuda.current_stream(stream.device)
    torch.cuda.set_stream(stream)
    try:
        yield
    finally:
        torch.cuda.set_stream(before)


class _Steps:
    """A pass as far as it has gone; ``end``: what it returned."""

    def __init__(self, steps: Steps) -> None:
        self._steps, self.over = steps, False
        self.end: Tensor | None = None

    def go(self, to_the_end: bool) -> None:
        """On to the next wait for another rank, or to the end."""
        while not self.over:
            try:
                next(self._steps)
            except StopIteration as stop:
                self.end, self.over = stop.value, True
            if not to_the_end:
                return


class _Chain:
    """One pass, as its :class:`~dnsp.parallel.route.Itinerary` has it. ``has_start``, ``want_end``: whether a state
    enters the first place, and whether the one that leaves the last is wanted. ``into``: by place, the state that
    enters it."""

    def __init__(
        self,
        scan: ParallelScan,
        M: Tensor,
        U: Tensor,
        continues: Tensor | None,
        forgets: Tensor | None,
        step: Fold,
        has_start: bool,
        want_end: bool,
        backward: bool,
    ) -> None:
        self.scan, self.M, self.U, self.continues, self.forgets = scan, M, U, continues, forgets
        self.step, self.has_start, self.want_end, self.backward = step, has_start, want_end, backward
        self.near = scan.comm.near if scan.kind == "peer" else ()
        self.by_kernel = on_gpu(U)
        self.memory: Symmetric | None = None
        self.into: dict[int, Tensor | None] = {}
        # The compute stream's memory, given back in its order: it follows before this, M or U is used again.
        self.states = self.whole = torch.empty_like(U, memory_format=torch.contiguous_format)
        self.shape = U.shape

    def start(self, start: Tensor | None) -> Coming:
        B, HV, K, V = self.U.shape[1:]
        state = {"rows": B, "value heads": HV, "key width": K, "value width": V}
        self.scan.comm.first("the state of a scan", self.U, self._way, self.scan.layer, **state)
        self.into[0] = start
        self.held = self.M, self.U, self.forgets, start  # until awaited: the side stream reads them
        side, device = _side(self.U.device), self.U.device
        on_host = self.scan.kind != "peer" and (side is None or not self.scan.comm.sends_from_gpu())
        steps = _Steps(self._gather(start) if self.scan.kind == "gather" else self._hops(on_host))

        def go(to_the_end: bool) -> None:
            with _current(side), nullcontext() if on_host else WAITS.aside():
                steps.go(to_the_end)

        if side is not None:
            side.wait_stream(torch.cuda.current_stream(device))
        go(not on_host)

        def arrived() -> tuple[Tensor, Tensor | None]:
            if not steps.over:
                go(True)
            if side is not None:
                here = torch.cuda.current_stream(device)
                with WAITS.counted():
                    here.wait_stream(side)
                if steps.end is not None:
                    steps.end.record_stream(here)
            # Summaries may go now, though the backward pass holds on to this call while it works.
            del self.M, self.U, self.forgets, self.held
            self.into.clear()
            return self.whole, steps.end

        return arrived

    def _hops(self, on_host: bool) -> Steps:
        """States from rank to rank, part by part: by mail between neighbours in memory, elsewhere by messages."""
        self._meet()
        parts = self._parts()
        if len(parts) > 1:
            self._by_row()
        scan = self.scan
        trip = itinerary(
            scan.layout, scan.open, self.backward, scan.rank, scan.per_interval, self.has_start, self.want_end,
            self.near, len(parts), on_host,
        )  # fmt: skip
        for place in trip.buffers:
            self.into[place] = self._state()
        for leg in trip.first:
            self._fold(leg, None)
        under_way: dict[Part, Exchange] = {}
        for posts, turns in trip.agenda:
            for together in posts:
                under_way |= dict.fromkeys(together, self._post(together, parts))
            for leg, part in turns:
                if (leg.place, part) in under_way:
                    yield
                    under_way[leg.place, part].arrived()
                self._fold(leg, parts[part])
        yield
        for leg in trip.ending:
            for part in range(len(parts)):
                if (leg.place, part) in under_way:
                    under_way[leg.place, part].arrived()
            self._fold(leg, None)
        for exchange in under_way.values():
            exchange.wait()
        end = self.into.get(scan.layout.count)
        if end is not None and len(parts) > 1:
            end = end.view(self.shape[1:]).clone()  # autograd lets nobody change a view that a function returned
        return end

    def _meet(self) -> None:
        """The memory that neighbours share, before the first mail."""
        if self.scan.kind == "peer" and not self.by_kernel:
            raise PlanError(
                f"transport peer: it carries states that the fold's kernel takes, and not [..., K, V]="
                f"{list(self.U.shape[-2:])} in {str(self.U.dtype).removeprefix('torch.')} on {self.U.device.type}; "
                f"use p2p (parallel.transport)"
            )
        if len(self.near) > 1:
            from . import symmetric

            self.memory = symmetric.memory(self.scan.comm.nearby(), self.U.device)
            self.memory.meet(self.U)

    def _parts(self) -> list[slice | None]:
        """What of a state's ``B * HV`` heads travels together, None for all; the same on every rank."""
        layout = self.scan.layout
        hops = max(self.route.when)
        if self.scan.kind == "peer":  # by message from host to host
            hops = min(hops, (self.scan.comm.hosts - 1) * layout.count // layout.ranks)
        if hops < 2:
            return [None]
        n, rows = parts_of(self.U[0], hops), self.U.shape[1] * self.U.shape[2]
        return [slice(rows * i // n, rows * (i + 1) // n) for i in range(n)] if n > 1 else [None]

    def _by_row(self) -> None:
        """Each head as a row of one head, so that parts are slices; so are the states that enter places."""
        self.M, self.U, self.states = (x.flatten(1, 2)[:, :, None] for x in (self.M, self.U, self.states))
        if self.continues is not None:
            self.continues = self.continues.repeat_interleave(self.states.shape[1] // self.continues.shape[1], 1)
        if self.forgets is not None:
            self.forgets = self.forgets.flatten(1, 2)[:, :, None]
        start = self.into[0]
        self.into[0] = start if start is None else start.flatten(0, 1)[:, None]

    def _fold(self, leg: Leg, rows: slice | None) -> None:
        """Takes a leg, with these rows of the state alone where they are given."""
        state = self.into.get(leg.place) if leg.enters else None
        leaves = self.into.get(leg.place + 1) if leg.goes_on else None
        given: tuple[Tensor | None, ...] = self.M, self.U, self.continues, self.forgets, self.states
        if leg.segments.stop - leg.segments.start < len(self.U):
            given = tuple(None if x is None else x[leg.segments] for x in given)
        M, U, continues, forgets, states = given
        assert M is not None and U is not None and states is not None
        part = state
        if self.by_kernel:
            from dnsp.kernels import triton_scan

            _, part = triton_scan.fold(
                M, U, state, continues, forgets, leg.steps, self.backward, states_NBHKV=states, last_BHKV=leaves,
                rows=rows, **self._mail(leg, rows),
            )  # fmt: skip
        else:
            if rows is not None:
                M, U, states = (x[:, rows] for x in (M, U, states))
                part = None if part is None else part[rows]
                continues = None if continues is None else continues[:, rows]
            met = range(len(U))
            for at, n in enumerate(reversed(met) if self.backward else met):
                states[n] = 0 if part is None else part
                if at < leg.steps:
                    part = self.step(M[n], U[n], part, None if continues is None else continues[n])
            if leaves is not None and part is not None:
                (leaves if rows is None else leaves[rows]).copy_(part)
        if leg.goes_on and leaves is None:
            self.into[leg.place + 1] = part

    def _mail(self, leg: Leg, rows: slice | None) -> dict[str, Any]:
        """A fold's boxes, where what enters comes from a neighbour in memory or what leaves goes to one: the stream has
        waited for both."""
        if self.memory is None or (leg.source is None and leg.target is None):
            return {}
        self.scan.comm.calls += 1
        inbox, outbox = self.memory.wait(self.U, rows, leg.source, leg.target, self._what(str(leg.interval)))
        return {"inbox": inbox, "outbox": outbox, "clock": self.memory.clock}

    def _post(self, messages: list[Part], parts: list[slice | None]) -> Exchange:
        """Starts messages together: parts of what enters places."""
        sends: list[Message] = []
        receives: list[Message] = []
        way = self.route
        for place, part in messages:
            (source, target), state = way.ends(place) or (0, 0), self.into[place]
            assert state is not None
            to, peer = (receives, source) if target == self.scan.rank else (sends, target)
            rows = parts[part]
            to.append((peer, state.contiguous() if rows is None else state[rows]))
        mine = {way.order[place - (way.owners[place] != self.scan.rank)] for place, _ in messages}
        return self.scan.comm.exchange(sends, receives, self._what(" and ".join(map(str, sorted(mine)))))

    def _what(self, intervals: str) -> str:
        return f"the delta rule's hop at interval {intervals} ({self._way}){in_layer(self.scan.layer)}"

    @cached_property
    def route(self) -> Route:
        return route(self.scan.layout, self.scan.open, self.backward)

    def _state(self) -> Tensor:
        return torch.empty_like(self.U[0], memory_format=torch.contiguous_format)

    @property
    def _way(self) -> str:
        return "backward" if self.backward else "forward"

    def _gather(self, start: Tensor | None) -> Steps:
        """Every segment's summaries, and the whole chain, as one device has it."""
        each, mine = self.scan.per_interval, self.scan.layout.indices(self.scan.rank)
        what = f"the delta rule's gather of summaries ({self._way}){in_layer(self.scan.layer)}"
        yield
        M, U = (self._whole(self.scan.comm.all_gather(x, what)) for x in (self.M, self.U))
        start = self._shared(start, what) if self.has_start else None
        whole, continues = LocalScan(), self.scan.continues_all_NB
        if self.backward:
            coming = whole.reverse(M, U, continues, None, start, has_initial=self.want_end, want_final=self.has_start)
        else:
            coming = whole.forward(M, U, continues, None, start, self.want_end)
        states, end = coming()
        torch.cat([states[interval * each : (interval + 1) * each] for interval in mine], out=self.states)
        return end if self.route.owners[-1] == self.scan.rank else None

    def _whole(self, by_rank_PN: Tensor) -> Tensor:
        """Summaries of all segments in global order: as they come in where a rank's segments are one interval."""
        layout, each = self.scan.layout, self.scan.per_interval
        if layout.count == layout.ranks:
            return by_rank_PN.flatten(0, 1)
        parts = []
        for interval in range(layout.count):
            owner = layout.owner(interval)
            first = layout.indices(owner).index(interval) * each
            parts.append(by_rank_PN[owner, first : first + each])
        return torch.cat(parts)

    def _shared(self, start: Tensor | None, what: str) -> Tensor:
        """The state at the pass's start, which only the rank there has; zero where not even that one has it."""
        mine = torch.zeros_like(self.U[0]) if start is None else start
        return self.scan.comm.all_gather(mine, what)[self.route.owners[0]]
