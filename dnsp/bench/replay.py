"""A rank's work of ``dnsp bench scan`` alone on its GPU, and the makespan that P GPUs would have.

    replay        each rank's work alone, its launches as in the real scan, its messages already in its inbox
    makespan      from these times and the hop, the time until the last of P GPUs ends:

        a state leaves a place at   max(its rank is there + busy - relay, it left the place before + hop) + relay

                  busy: what an interval's launches keep its rank's stream for. relay: of that, from the message's sight
                  to the raising of the next flag, by the device's timer; the rest is done while the message is still on
                  its way (also what it writes when it has sent: a few microseconds, and none of them in the chain).
                  While states travel, a rank does what needs none of them, and then waits
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dnsp.bench.account import Alone
from dnsp.bench.delta_shapes import Shape, make_inputs
from dnsp.bench.ranks import middle
from dnsp.kernels.delta_rule import delta_rule
from dnsp.kernels.scan import Coming, Scan
from dnsp.parallel.layout import Layout
from dnsp.parallel.plan import Plan

AHEAD = 20_000_000  # cycles of the GPU, some 10 ms


@dataclass
class Step:
    """Forward and backward of the op on some tokens."""

    plan: Plan
    inputs: dict[str, Tensor]
    do: Tensor
    scan: Scan | None = None  # instead of the plan's

    def __call__(self) -> None:
        o, _ = self.forward()
        torch.autograd.grad(o, list(self.inputs.values()), self.do)

    def forward(self) -> tuple[Tensor, Tensor | None]:
        i = self.inputs
        return delta_rule(
            i["q"], i["k"], i["v"], i["g"], i["beta"], scale=i["k"].shape[-1] ** -0.5, segments=self.plan.segments,
            scan=self.scan or self.plan.scan, doc_start_BT=self.plan.doc_start_BT, normalise_qk=True,
        )  # fmt: skip


def make_step(plan: Plan, request: dict[str, Any], device: torch.device, like: Step | None = None) -> Step:
    """``like``: a step on as many tokens, whose inputs serve again."""
    if like is not None:
        return Step(plan.to(device), like.inputs, like.do)
    D = request["width"]
    shape = Shape(plan.local_tokens, request["heads"], request["value_heads"], D, D, decay=request["decay"])
    made = make_inputs(shape, device, seed=plan.rank)
    return Step(plan.to(device), dict(zip(("q", "k", "v", "g", "beta"), made.leaves, strict=True)), made.do)


class Replay:
    """A rank's scan alone: the launches of the real one, on mail that has come and room that there is, in one stream.
    ``folds``: events around each interval's launches, of a forward scan and of the reverse one after it;
    ``awaited``: when each was; ``clocks``: the stamps of each interval's last launches, in the order of ``folds``."""

    here = False

    def __init__(self, plan: Plan, U_shape: Sequence[int], device: torch.device) -> None:
        from dnsp.kernels import triton_scan

        B, HV, K, V = U_shape
        self.scan = plan.scan
        tiles = B * HV * V // triton_scan.COLUMNS
        self.tiles = tiles
        inbox, outbox, clock = triton_scan.loopback(tiles, device)
        far = torch.full_like(inbox.ready_C, 2**30)
        self.inbox = inbox._replace(ready_C=far, free_C=torch.zeros_like(far))
        elsewhere = torch.zeros_like(outbox.slots_DCN)  # a fold reads its message again when it has sent its own
        self.outbox = outbox._replace(slots_DCN=elsewhere, free_C=far, ready_C=torch.zeros_like(far))
        mine = self.scan.layout.indices(self.scan.rank)
        self.clocks = [[clock._replace(stamps=torch.zeros_like(clock.stamps)) for _ in mine] for _ in range(2)]
        self.folds: list[list[torch.cuda.Event]] = []
        self.awaited: list[torch.cuda.Event] = []

    def forward(self, M: Tensor, U: Tensor, continues: Any, forgets: Any, initial: Any, want_final: bool) -> Coming:
        return self._pass(M, U, continues, forgets, backward=False)

    def reverse(self, M: Tensor, D: Tensor, continues: Any, forgets: Any, final: Any, has: bool, want: bool) -> Coming:
        return self._pass(M, D, continues, forgets, backward=True)

    def _pass(self, M: Tensor, U: Tensor, continues: Tensor | None, forgets: Tensor | None, backward: bool) -> Coming:
        from dnsp.kernels import triton_scan

        layout, rank, each = self.scan.layout, self.scan.rank, self.scan.per_interval
        entering, state = torch.empty_like(U), None
        events = [_event()]
        mine = layout.indices(rank)
        order = mine[::-1] if backward else mine
        for interval, clock in zip(order, self.clocks[backward], strict=True):
            part = slice(mine.index(interval) * each, (mine.index(interval) + 1) * each)
            before, after = (interval + 1, interval - 1) if backward else (interval - 1, interval + 1)
            goes_on = 0 <= after < layout.count
            inbox = self.inbox if 0 <= before < layout.count and layout.owner(before) != rank else None
            outbox = self.outbox if goes_on and layout.owner(after) != rank else None
            if inbox or outbox:
                triton_scan.wait(self.tiles, inbox, outbox, clock)
            _, state = triton_scan.fold(
                M[part], U[part], None if inbox else state, None if continues is None else continues[part],
                None if forgets is None else forgets[part], each - (not goes_on), backward, inbox=inbox, outbox=outbox,
                clock=clock, states_NBHKV=entering[part],
            )  # fmt: skip
            events.append(_event())
        self.folds.append(events)

        def arrived() -> tuple[Tensor, None]:
            self.awaited.append(_event())
            return entering, None

        return arrived


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass
class Work:
    """What a rank does in a step, ms: before the forward scan, each interval's fold in it, what needs no state beside
    it, between the scans, the same of the reverse one, and after it. A fold's ``relay`` is what a state that is waited
    for takes through it, from its sight to the raising of the next rank's last flag; all of it where it is not sent."""

    before: float
    forward: list[float]
    relay_forward: list[float]
    beside_forward: float
    between: float
    reverse: list[float]
    relay_reverse: list[float]
    beside_reverse: float
    after: float

    @property
    def alone(self) -> Alone:
        own = self.before + self.beside_forward + self.between + self.beside_reverse + self.after
        return Alone(own, sum(self.forward) + sum(self.reverse))

    @staticmethod
    def of(step: Step, replay: Replay, repeats: int) -> Work:
        found: list[Work] = []
        for _ in range(repeats + 2):
            replay.folds.clear()
            replay.awaited.clear()
            torch.cuda._sleep(AHEAD)  # the host comes to be ahead, and the device waits for nothing
            began = _event()
            step()
            ended = _event()
            torch.cuda.synchronize()
            there, back = replay.folds
            folds = [[a.elapsed_time(b) for a, b in zip(p, p[1:], strict=False)] for p in (there, back)]
            relays = [
                [Stamps.of(clock.stamps).relay_ms or busy for clock, busy in zip(clocks, busy_ms, strict=True)]
                for clocks, busy_ms in zip(replay.clocks, folds, strict=True)
            ]
            beside = [p[-1].elapsed_time(at) for p, at in zip((there, back), replay.awaited, strict=True)]
            between, after = replay.awaited[0].elapsed_time(back[0]), replay.awaited[1].elapsed_time(ended)
            before = began.elapsed_time(there[0])
            found.append(
                Work(before, folds[0], relays[0], beside[0], between, folds[1], relays[1], beside[1], after)
            )  # fmt: skip
        return Work.median_of(found[2:])

    @staticmethod
    def median_of(found: Sequence[Work]) -> Work:
        """Every figure's median."""

        def each(rows: Iterable[list[float]]) -> list[float]:
            return [middle(column) for column in zip(*rows, strict=True)]

        return Work(
            middle([w.before for w in found]),
            each(w.forward for w in found),
            each(w.relay_forward for w in found),
            middle([w.beside_forward for w in found]),
            middle([w.between for w in found]),
            each(w.reverse for w in found),
            each(w.relay_reverse for w in found),
            middle([w.beside_reverse for w in found]),
            middle([w.after for w in found]),
        )


def makespan(layout: Layout, works: Sequence[Work], hop_ms: float) -> float:
    """When the last of P GPUs ends a step, ms; every rank begins at 0."""
    there = [work.before for work in works]  # when a rank has come to its next interval
    for backward in (False, True):
        left, owner_before = 0.0, -1
        busy = [list(work.reverse if backward else work.forward) for work in works]
        relay = [list(work.relay_reverse if backward else work.relay_forward) for work in works]
        beside = [work.beside_reverse if backward else work.beside_forward for work in works]
        # A GPU does one thing at a time: what is beside the scan is done before the folds, or while states travel.
        ready = [at + more + sum(own) for at, more, own in zip(there, beside, busy, strict=True)]
        order = range(layout.count)
        for interval in reversed(order) if backward else order:
            rank = layout.owner(interval)
            come = left + (hop_ms if owner_before not in (-1, rank) else 0.0)
            through = relay[rank].pop(0)
            waits = there[rank] + busy[rank].pop(0) - through  # from here on for its message alone
            left = max(waits, come if owner_before >= 0 else 0.0) + through
            there[rank], owner_before = left, rank
        there = [max(at, early) for at, early in zip(there, ready, strict=True)]
        if not backward:
            there = [at + work.between for at, work in zip(there, works, strict=True)]
    return max(at + work.after for at, work in zip(there, works, strict=True))


class Stamps(NamedTuple):
    """Of a rank's pass, by its GPU's timer, ns: when it began to wait for its message, saw it, and raised the next
    rank's last flag; 0 of what did not happen."""

    began: int
    saw: int
    raised: int

    @staticmethod
    def of(stamps: Tensor) -> Stamps:
        """From a :class:`~dnsp.kernels.triton_scan.Clock`'s, whose device is done."""
        began, saw, *raised = stamps.tolist()
        return Stamps(began, saw, max(raised))

    @property
    def relay_ms(self) -> float | None:
        """From the sight of a message to the raising of the next; None where none was sent."""
        return (self.raised - self.saw) / 1e6 if self.raised else None


def hops_there(ranks: Sequence[Stamps]) -> list[float]:
    """Microseconds of the hops to ranks that were waiting, where all have one timer."""
    pairs = zip(ranks, ranks[1:], strict=False)
    return [(after.saw - before.raised) / 1e3 for before, after in pairs if after.began < before.raised]


def hops_and_back(there: Sequence[Stamps], back: Sequence[Stamps]) -> list[float]:
    """The same where every rank has a timer of its own, of which differences alone count: half of what is left of the
    time between a rank's raising in the forward pass and its sight of the answer in the backward one, without the time
    that the next rank had the message."""
    return [
        ((back[r].saw - there[r].raised) - (back[r + 1].raised - there[r + 1].saw)) / 2e3 for r in range(len(there) - 1)
    ]
