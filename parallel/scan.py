"""The scan of boundary states over ranks: segments of one device and ranks of a group are one chain.

A state crosses every segment by ``kernels.scan.fold`` alone, in global order, one segment at a time and in the shapes
of :class:`~dnsp.kernels.scan.LocalScan`; so neither the layout nor the transport shows in its bits.

    p2p     each interval waits for the state of the interval before it, folds its own segments and sends the state on:
            one state a hop. Where a document starts in an interval, what leaves it is sent before anything is awaited.
    gather  every rank gathers all summaries and folds the chain by itself: one collective, (M, U) of every segment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dnsp.kernels.scan import fold, reverse_fold, stack_states

from .layout import Layout
from .transport import Exchange, Transport

Fold = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


@dataclass(frozen=True)
class ParallelScan:
    """A scan (see ``kernels.scan.Scan``) over the sequence group. ``per_interval``: segments of one interval;
    ``open``: for each local segment, whether any row's state passes through it, known on the host;
    ``continues_all_NB``: that by row, on the device, for every segment of the sequence."""

    layout: Layout
    rank: int
    comm: Transport
    kind: str  # p2p | gather
    per_interval: int
    open: tuple[bool, ...]
    continues_all_NB: Tensor

    def forward(
        self,
        M_NBHKK: Tensor,
        U_NBHKV: Tensor,
        continues_NB: Tensor | None,
        initial_BHKV: Tensor | None,
        want_final: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """``(incoming_NBHKV, final_BHKV)``; the final state on the rank with the last interval, elsewhere None."""
        has_initial = initial_BHKV is not None
        chain = _Chain(self, M_NBHKK, U_NBHKV, continues_NB, fold, has_initial, want_final, backward=False)
        return chain.run(initial_BHKV)

    def reverse(
        self,
        M_NBHKK: Tensor,
        D_NBHKV: Tensor,
        continues_NB: Tensor | None,
        final_grad_BHKV: Tensor | None,
        has_initial: bool,
        want_final: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """``(outgoing_NBHKV, initial_grad_BHKV)``; the initial state's gradient on the rank that holds interval 0."""
        chain = _Chain(self, M_NBHKK, D_NBHKV, continues_NB, reverse_fold, want_final, has_initial, backward=True)
        return chain.run(final_grad_BHKV)


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
        self.mine = scan.layout.indices(scan.rank)
        self.entering: list[Tensor | None] = [None] * len(U)

    def run(self, start: Tensor | None) -> tuple[Tensor, Tensor | None]:
        end = self._gather(start) if self.scan.kind == "gather" and self.scan.layout.ranks > 1 else self._hop(start)
        return stack_states(self.entering, self.U), end

    def _segments(self, interval: int) -> list[int]:
        """Local segments of a local interval, as the pass meets them."""
        first = self.mine.index(interval) * self.scan.per_interval
        segments = list(range(first, first + self.scan.per_interval))
        return segments[::-1] if self.backward else segments

    def _fold(self, n: int, state: Tensor | None) -> Tensor:
        return self.step(self.M[n], self.U[n], state, None if self.continues is None else self.continues[n])

    def _hop(self, start: Tensor | None) -> Tensor | None:
        leaving: dict[int, Tensor] = {}
        sending: list[Exchange] = []

        def leave(place: int, state: Tensor) -> None:
            leaving[place] = state
            if place + 1 < len(self.order) and (peer := self._owner(place + 1)) != self.scan.rank:
                sending.append(self.scan.comm.send(state, peer, self._what(place + 1)))

        places = [place for place, interval in enumerate(self.order) if interval in self.mine]
        for place in places:  # what needs no incoming state goes first
            segments = self._segments(self.order[place])
            closed = [at for at, n in enumerate(segments) if not self.scan.open[n]]
            if closed and self._goes_on(place):
                state = None
                for n in segments[closed[-1] :]:
                    self.entering[n] = state
                    state = self._fold(n, state)
                assert state is not None
                leave(place, state)
        for place in places:
            state = self._enter(place, start, leaving)
            segments = self._segments(self.order[place])
            if place in leaving:  # its tail is done
                segments = segments[: 1 + max(at for at, n in enumerate(segments) if not self.scan.open[n])]
            for at, n in enumerate(segments):
                self.entering[n] = state
                if at + 1 < len(segments) or (place not in leaving and self._goes_on(place)):
                    state = self._fold(n, state)
            if place not in leaving and self._goes_on(place):
                assert state is not None
                leave(place, state)
        for exchange in sending:
            exchange.wait()
        return leaving.get(len(self.order) - 1) if self.want_end else None

    def _goes_on(self, place: int) -> bool:
        return place + 1 < len(self.order) or self.want_end

    def _enter(self, place: int, start: Tensor | None, leaving: dict[int, Tensor]) -> Tensor | None:
        if place == 0:
            return start
        peer = self._owner(place - 1)
        if peer == self.scan.rank:
            return leaving[place - 1]
        return self.scan.comm.receive(self.U[0], peer, self._what(place))

    def _gather(self, start: Tensor | None) -> Tensor | None:
        width, each = self.M.shape[-1], self.scan.per_interval
        packed = self.scan.comm.all_gather(torch.cat([self.M, self.U], dim=-1), self._what(None))
        state = self._shared_start(start) if self.has_start else None
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

    def _shared_start(self, start: Tensor | None) -> Tensor:
        """The state at the pass's start, which only the rank there has; zero where not even that one has it."""
        mine = torch.zeros_like(self.U[0]) if start is None else start
        return self.scan.comm.all_gather(mine, self._what(None))[self._owner(0)]

    def _owner(self, place: int) -> int:
        return self.scan.layout.owner(self.order[place])

    def _what(self, place: int | None) -> str:
        direction = "backward" if self.backward else "forward"
        if place is None:
            return f"the delta rule's gather of summaries ({direction})"
        return f"the delta rule's hop into interval {self.order[place]} ({direction})"
