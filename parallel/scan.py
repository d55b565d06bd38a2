"""The scan of boundary states over ranks: segments of one device and ranks of a group are one chain.

A state crosses every segment by ``kernels.scan.fold`` alone, in global order, one segment at a time and in the shapes
of :class:`~dnsp.kernels.scan.LocalScan`; so neither the layout nor the transport shows in its bits.

    peer    as p2p, on the device alone: the kernel that folds an interval writes the state into the next rank's memory
            (see symmetric.py), tile by tile, and raises flags there; that rank's stream waits for them. No host.
    p2p     each interval waits for the state of the interval before it, folds its own segments and sends the state on:
            one state a hop. Where a document starts in an interval, what leaves it is sent before anything is awaited.
    gather  every rank gathers all summaries and folds the chain by itself: one collective, (M, U) of every segment.

A pass is started and awaited (see ``kernels.scan.Scan``). On a GPU all of it runs on a stream of its own, before whose
kernels others of this rank give way; the compute stream goes on with what needs no state, and follows that stream when
the pass is awaited. Where the host carries messages (gloo), a pass is started as far as it goes without waiting for
another rank (what is sent before anything is awaited is sent), and the rest is done when it is awaited.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dnsp.kernels.scan import Coming, LocalScan, fold, on_gpu, reverse_fold

from .errors import PlanError
from .layout import Layout
from .transport import Exchange, Message, Transport
from .waits import WAITS

Fold = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
Steps = Generator[None, None, Tensor | None]  # stops before each wait for another rank; returns the chain's end


@dataclass(frozen=True)
class ParallelScan:
    """A scan (see ``kernels.scan.Scan``) over the sequence group. ``per_interval``: segments of one interval;
    ``open``: for each local segment, whether any row's state passes through it, known on the host;
    ``continues_all_NB``: that by row, on the device, for every segment of the sequence."""

    layout: Layout
    rank: int
    comm: Transport
    kind: str  # peer | p2p | gather
    per_interval: int
    open: tuple[bool, ...]
    continues_all_NB: Tensor
    layer: int | None = None  # of a model, for messages

    def forward(
        self,
        M_NBHKK: Tensor,
        U_NBHKV: Tensor,
        continues_NB: Tensor | None,
        initial_BHKV: Tensor | None,
        want_final: bool,
    ) -> Coming:
        """``(incoming_NBHKV, final_BHKV)``; the final state on the rank with the last interval, elsewhere None."""
        if self.layout.ranks == 1:  # the same bits in one launch
            return LocalScan().forward(M_NBHKK, U_NBHKV, continues_NB, initial_BHKV, want_final)
        has_initial = initial_BHKV is not None
        chain = _Chain(self, M_NBHKK, U_NBHKV, continues_NB, fold, has_initial, want_final, backward=False)
        return chain.start(initial_BHKV)

    def reverse(
        self,
        M_NBHKK: Tensor,
        D_NBHKV: Tensor,
        continues_NB: Tensor | None,
        final_grad_BHKV: Tensor | None,
        has_initial: bool,
        want_final: bool,
    ) -> Coming:
        """``(outgoing_NBHKV, initial_grad_BHKV)``; the initial state's gradient on the rank that holds interval 0."""
        if self.layout.ranks == 1:
            return LocalScan().reverse(M_NBHKK, D_NBHKV, continues_NB, final_grad_BHKV, has_initial, want_final)
        chain = _Chain(self, M_NBHKK, D_NBHKV, continues_NB, reverse_fold, want_final, has_initial, backward=True)
        return chain.start(final_grad_BHKV)


def in_layer(layer: int | None) -> str:
    """The words that follow an operation's name."""
    return "" if layer is None else f" of layer {layer}"


@lru_cache
def _side(device: torch.device) -> torch.cuda.Stream | None:
    """The stream that scans take; none on a CPU."""
    return torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None


class _Steps:
    """A pass as far as it has gone; ``end``: what it returned."""

    def __init__(self, steps: Steps) -> None:
        self._steps, self._over = steps, False
        self.end: Tensor | None = None

    def go(self, to_the_end: bool) -> None:
        """On to the next wait for another rank, or to the end."""
        while not self._over:
            try:
                next(self._steps)
            except StopIteration as stop:
                self.end, self._over = stop.value, True
            if not to_the_end:
                return


class _Chain:
    """One pass. ``order`` names intervals as the pass meets them: left to right, or right to left in the backward.
    ``has_start``, ``want_end``: whether a state enters the first of them, and whether the last one's is wanted."""

    def __init__(
        self,
        scan: ParallelScan,
        M: Tensor,
        U: Tensor,
        continues: Tensor | None,
        step: Fold,
        has_start: bool,
        want_end: bool,
        backward: bool,
    ) -> None:
        self.scan, self.M, self.U, self.continues = scan, M, U, continues
        self.step, self.has_start, self.want_end, self.backward = step, has_start, want_end, backward
        count = scan.layout.count
        self.order = list(reversed(range(count))) if backward else list(range(count))
        self._way = "backward" if backward else "forward"
        self.mine = scan.layout.indices(scan.rank)
        self.entering: list[Tensor | None] = [None] * len(U)
        # The compute stream's memory, given back in its order: it follows before this, M or U is used again.
        self.states = torch.empty_like(U, memory_format=torch.contiguous_format)

    def start(self, start: Tensor | None) -> Coming:
        self.first = start  # held until awaited: the side stream reads it
        steps, side, device = _Steps(self._steps(start)), _side(self.U.device), self.U.device
        on_host = self.scan.kind != "peer" and (side is None or not self.scan.comm.sends_from_gpu())

        def go(to_the_end: bool) -> None:
            with torch.cuda.stream(side), nullcontext() if on_host else WAITS.aside():
                steps.go(to_the_end)

        if side is not None:
            side.wait_stream(torch.cuda.current_stream(device))
        go(not on_host)

        def arrived() -> tuple[Tensor, Tensor | None]:
            go(True)
            if side is not None:
                here = torch.cuda.current_stream(device)
                with WAITS.counted():
                    here.wait_stream(side)
                if steps.end is not None:
                    steps.end.record_stream(here)
            return self.states, steps.end

        return arrived

    def _steps(self, start: Tensor | None) -> Steps:
        if self.scan.kind == "peer":
            return self._peer(start)
        end = yield from self._gather(start) if self.scan.kind == "gather" else self._hop(start)
        states = [torch.zeros_like(self.U[0]) if state is None else state for state in self.entering]
        torch.stack(states, out=self.states)
        return end

    def _peer(self, start: Tensor | None) -> Tensor | None:
        """A wait and a launch an interval; where a document starts in it, first what does not depend on what enters.
        States go from host to host by p2p."""
        if not on_gpu(self.U):
            raise PlanError(
                f"transport peer: it carries states that the fold's kernel takes, and not [..., K, V]="
                f"{list(self.U.shape[-2:])} in {str(self.U.dtype).removeprefix('torch.')} on {self.U.device.type}; "
                f"use p2p (parallel.transport)"
            )
        from dnsp.kernels import triton_scan

        from . import symmetric

        comm, near = self.scan.comm, self.scan.comm.near
        memory = symmetric.memory(comm.nearby(), self.U.device) if len(near) > 1 else None
        if memory is not None:
            memory.meet(self.U)
        tiles, each = triton_scan.tiles_of(self.U), self.scan.per_interval
        state = start

        def through(first: int, last: int, goes_on: bool, **boxes: Any) -> Tensor:
            part = slice(first, last)
            _, leaving = triton_scan.fold(
                self.M[part], self.U[part], None if boxes.get("inbox") else state,
                None if self.continues is None else self.continues[part], last - first - (not goes_on), self.backward,
                states_NBHKV=self.states[part], clock=None if memory is None else memory.clock, **boxes,
            )  # fmt: skip
            return leaving

        def mail(source: int | None, target: int | None, what: str) -> dict[str, Any]:
            """Of neighbours on this host, whom the stream has waited for."""
            come, go = (rank - near[0] if rank is not None and rank in near else None for rank in (source, target))
            if memory is None or (come is None and go is None):
                return {}
            comm.calls += 1
            return dict(zip(("inbox", "outbox"), memory.wait(tiles, come, go, what), strict=True))

        def send(target: int | None, leaving: Tensor, what: str) -> None:
            if target is not None and target not in near:
                under_way.append(comm.exchange([(target, leaving.contiguous())], [], what))

        under_way: list[Exchange] = []

        for place, interval in enumerate(self.order):
            if interval not in self.mine:
                continue
            first = self.mine.index(interval) * each
            last, goes_on = first + each, place + 1 < len(self.order) or self.want_end
            source, target = self._neighbour(place - 1), self._neighbour(place + 1)
            what = self._what(interval)
            closed = [n for n in range(first, last) if not self.scan.open[n]]
            leaving = None
            if source is not None and closed and goes_on:
                state = None
                to = mail(None, target, what)
                if self.backward:
                    leaving, first = through(first, closed[0] + 1, True, **to), closed[0]
                else:
                    leaving, last = through(closed[-1], last, True, **to), closed[-1] + 1
                send(target, leaving, what)
                target, goes_on = None, False
            if source is not None and source not in near:
                state = torch.empty_like(self.U[0], memory_format=torch.contiguous_format)
                comm.exchange([], [(source, state)], what).wait()
            onward = through(first, last, goes_on, **mail(source, target, what))
            send(target, onward, what)
            state = onward if leaving is None else leaving
        for exchange in under_way:
            exchange.wait()
        return state if self.want_end and self._owner(len(self.order) - 1) == self.scan.rank else None

    def _neighbour(self, place: int) -> int | None:
        """The rank that holds a place; None where that is this one, or there is none."""
        if not 0 <= place < len(self.order) or self._owner(place) == self.scan.rank:
            return None
        return self._owner(place)

    def _hop(self, start: Tensor | None) -> Steps:
        state, under_way = start, []
        for place, interval in enumerate(self.order):
            if interval not in self.mine:
                continue
            segments, goes_on = self._segments(interval), place + 1 < len(self.order) or self.want_end
            closed = [at for at, n in enumerate(segments) if not self.scan.open[n]]
            leaving = None
            if closed and goes_on:  # a document starts here: what leaves does not depend on what enters
                leaving = self._through(segments[closed[-1] :], None, True)
                segments, goes_on = segments[: closed[-1] + 1], False
            arriving = self._source(place)
            # Posted together, so that neither waits for the other where a transport takes its messages in order.
            under_way.append(self._exchange(self._target(place, leaving), arriving, interval))
            if arriving:
                yield
            under_way[-1].arrived()
            onward = self._through(segments, arriving[0][1] if arriving else state, goes_on)
            if leaving is None:
                leaving = onward
                under_way.append(self._exchange(self._target(place, leaving), [], interval))
            state = leaving
        yield
        for exchange in under_way:
            exchange.wait()
        return state if self.want_end and self._owner(len(self.order) - 1) == self.scan.rank else None

    def _segments(self, interval: int) -> list[int]:
        """Local segments of a local interval, as the pass meets them."""
        first = self.mine.index(interval) * self.scan.per_interval
        segments = list(range(first, first + self.scan.per_interval))
        return segments[::-1] if self.backward else segments

    def _through(self, segments: list[int], state: Tensor | None, goes_on: bool) -> Tensor | None:
        """Notes what enters each segment; returns what leaves the last of them, where that is wanted."""
        for n in segments:
            self.entering[n] = state
            if goes_on or n != segments[-1]:
                state = self.step(self.M[n], self.U[n], state, None if self.continues is None else self.continues[n])
        return state if goes_on else None

    def _source(self, place: int) -> list[Message]:
        """The message that brings the state into a place; none at the start, or where this rank has it already."""
        if place == 0 or self._owner(place - 1) == self.scan.rank:
            return []
        return [(self._owner(place - 1), torch.empty_like(self.U[0], memory_format=torch.contiguous_format))]

    def _target(self, place: int, leaving: Tensor | None) -> list[Message]:
        """The message that takes a state on from a place."""
        if leaving is None or place + 1 == len(self.order) or self._owner(place + 1) == self.scan.rank:
            return []
        return [(self._owner(place + 1), leaving.contiguous())]

    def _exchange(self, sends: list[Message], receives: list[Message], interval: int) -> Exchange:
        return self.scan.comm.exchange(sends, receives, self._what(interval))

    def _what(self, interval: int) -> str:
        return f"the delta rule's hop at interval {interval} ({self._way}){in_layer(self.scan.layer)}"

    def _gather(self, start: Tensor | None) -> Steps:
        width, each = self.M.shape[-1], self.scan.per_interval
        what = f"the delta rule's gather of summaries ({self._way}){in_layer(self.scan.layer)}"
        yield
        packed = self.scan.comm.all_gather(torch.cat([self.M, self.U], dim=-1), what)
        state = self._shared(start, what) if self.has_start else None
        for place, interval in enumerate(self.order):
            owner = self.scan.layout.owner(interval)
            first = self.scan.layout.indices(owner).index(interval) * each
            for at in reversed(range(each)) if self.backward else range(each):
                M, U = packed[owner][first + at].split([width, self.U.shape[-1]], dim=-1)
                if owner == self.scan.rank:
                    self.entering[first + at] = state
                last = place + 1 == len(self.order) and at == (0 if self.backward else each - 1)
                if not last or self.want_end:
                    # The same memory layout as a local fold, so that the product takes the same path.
                    state = self.step(
                        M.contiguous(), U.contiguous(), state, self.scan.continues_all_NB[interval * each + at]
                    )
        return state if self.want_end and self._owner(len(self.order) - 1) == self.scan.rank else None

    def _shared(self, start: Tensor | None, what: str) -> Tensor:
        """The state at the pass's start, which only the rank there has; zero where not even that one has it."""
        mine = torch.zeros_like(self.U[0]) if start is None else start
        return self.scan.comm.all_gather(mine, what)[self._owner(0)]

    def _owner(self, place: int) -> int:
        return self.scan.layout.owner(self.order[place])
