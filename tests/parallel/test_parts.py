"""States that travel in parts: the same bits, whoever is late, the first parts ahead of the others, and no rank that
waits for a later message, whatever order a transport keeps."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from dnsp.kernels.scan import Coming, LocalScan
from dnsp.parallel import scan
from dnsp.parallel.grid import Grid, make_grid
from dnsp.parallel.layout import KINDS, Layout
from dnsp.parallel.plan import Plan, make_plan
from dnsp.parallel.transport import Exchange, Message, Transport
from tests.ranks import dawdling, run_ranks

B, HV, K, V = 2, 3, 16, 32
ROWS = B * HV


class Problem:
    """Summaries of a whole sequence, two segments an interval, and what one process makes of them."""

    def __init__(self, seed: int, kind: str, ranks: int, numbers: int = 0) -> None:
        draw, generator = random.Random(seed), torch.Generator().manual_seed(seed + 100 * numbers)
        self.layout = Layout(kind, ranks, 128 * ranks * (2 if kind == "zigzag" else 1))
        tokens = self.layout.tokens
        cuts = [[0, *sorted(draw.sample(range(1, tokens), draw.choice((0, 0, 1, 3))))] for _ in range(B)]
        self.starts = [cuts[0]] * B if draw.random() < 0.7 else cuts
        self.M, self.U = (torch.randn(tokens // 64, B, HV, K, width, generator=generator) for width in (K, V))
        self.M /= K**0.5
        state = torch.randn(B, HV, K, V, generator=generator)
        # What comes in from the left, and from the right; where something does, the other pass has to say its gradient.
        self.initial, self.final = (state if draw.random() < 0.5 else None for _ in range(2))
        one = make_plan(self.starts, Layout("contiguous", 1, tokens), Grid(1, 0, 1), 64)
        self.truth = [self.begin(one, backward, LocalScan())() for backward in (False, True)]

    def plan(self, grid: Grid, transport: str = "p2p") -> Plan:
        return make_plan(self.starts, self.layout, grid, 64, transport=transport)

    def summaries(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """A rank's own, in memory of their own."""
        held = [start // 64 for start in plan.segments.starts]
        return self.M[held], self.U[held]

    def begin(self, plan: Plan, backward: bool, way: Any = None) -> Coming:
        has_initial, want_final, way = self.initial is not None, self.final is not None, way or plan.scan
        given = *self.summaries(plan), plan.segments.continues_NB, None
        if backward:
            return way.reverse(*given, self.final, has_initial, want_final)
        return way.forward(*given, self.initial, want_final)

    def wrong(self, plan: Plan, found: Sequence[tuple[Tensor, Tensor | None]]) -> list[str]:
        """The passes of a rank, forward and backward, that have other bits than one process's."""
        held = [start // 64 for start in plan.segments.starts]
        ends = plan.holds_last and self.final is not None, 0 in plan.intervals[0] and self.initial is not None
        wrong = []
        for way, (states, last), (all_states, truth), here in zip("><", found, self.truth, ends, strict=True):
            same = torch.equal(states, all_states[held]) and (last is None) == (not here)
            if not same or (last is not None and truth is not None and not torch.equal(last, truth)):
                wrong.append(f"{self.layout} {self.starts} {way} on rank {plan.rank}")
        return wrong


class InOrder(Transport):
    """Of ranks that are threads, as strict as NCCL may be: what a rank posts together is over before it posts the next,
    and a message is over when both sides have posted it."""

    def __init__(self, ranks: int, rank: int, news: threading.Condition, posted: dict[Any, list[Tensor]]) -> None:
        super().__init__(None, range(ranks), rank)
        self.news, self.posted = news, posted

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message], what: str) -> Exchange:
        with self.news:
            for peer, tensor in sends:
                self.posted[self.rank, peer, "sent"].append(tensor.clone())
            for peer, buffer in receives:
                self.posted[peer, self.rank, "wanted"].append(buffer)
            self.news.notify_all()
            mine = [("wanted", self.rank, peer, len(self.posted[self.rank, peer, "sent"])) for peer, _ in sends]
            mine += [("sent", peer, self.rank, len(self.posted[peer, self.rank, "wanted"])) for peer, _ in receives]

            def over() -> bool:
                return all(len(self.posted[source, target, other]) >= n for other, source, target, n in mine)

            assert self.news.wait_for(over, 10), f"rank {self.rank} waits for ever in {what}"
            for peer, _ in receives:
                pair = self.posted[peer, self.rank, "wanted"], self.posted[peer, self.rank, "sent"]
                for buffer, tensor in zip(*pair, strict=False):
                    buffer.copy_(tensor)
        self.calls += 1
        return Exchange(self, [], [], [], what)


def as_on_gpu(chain: Any, start: Tensor | None) -> Coming:
    """A pass as where the device takes messages: it is all posted when it is started."""
    chain.into[0] = start
    steps = scan._Steps(chain._hops(False))
    steps.go(True)
    return lambda: (chain.states.view(chain.shape), steps.end)


@pytest.mark.parametrize(("kind", "ranks"), list(itertools.product(KINDS, (2, 3, 4, 5))))
def test_no_message_waits_for_a_later_one(kind: str, ranks: int) -> None:
    for seed, size in itertools.product(range(6), (1, 2**8, 2**14)):  # as many parts as rows, some, one
        problem = Problem(seed, kind, ranks)
        news, posted = threading.Condition(), defaultdict(list)

        def on_rank(rank: int, problem: Problem = problem, mail: Any = (news, posted)) -> tuple[list[str], int]:
            plan, comm = problem.plan(Grid(ranks, rank, ranks)), InOrder(ranks, rank, *mail)
            plan = replace(plan, scan=replace(plan.scan, comm=comm))
            return problem.wrong(plan, [problem.begin(plan, backward)() for backward in (False, True)]), comm.calls

        with (
            patch.object(scan, "MESSAGE", size),
            patch.object(scan._Chain, "start", as_on_gpu),
            ThreadPoolExecutor(ranks) as pool,
        ):
            for wrong, calls in pool.map(on_rank, range(ranks)):
                assert not wrong and calls > 0


def test_the_number_of_parts() -> None:
    """Least time by brute force, of a chain of hops, each part's and message's cost in bytes."""
    state = torch.empty(1, 32, 128, 128, device="meta")
    with patch.object(scan, "on_gpu", lambda U: True):
        for hops in (1, 2, 3, 7, 14, 126):
            times = {n: (hops + n - 1) * (scan.MESSAGE + state.nbytes / n) for n in range(1, 33)}
            assert times[scan.parts_of(state, hops)] <= 1.01 * min(times.values())
        assert [scan.parts_of(state, hops) for hops in (0, 1, 3, 6, 14)] == [1, 1, 1, 2, 3]
        assert scan.parts_of(state[:, :2], 126) == 2
    small, odd = torch.empty(1, 4, 16, 16), torch.empty(1, 64, 130, 130)
    assert scan.parts_of(small, 14) == scan.parts_of(odd, 14) == 1


def on_every_rank(ranks_are_late: bool) -> tuple[list[str], list[int]]:
    """Parts of one row each over gloo, two calls under way at once: what has other bits, and messages by plan."""
    grid, wrong, calls = make_grid(timeout=20), [], []
    late = dawdling(random.Random(grid.rank)) if ranks_are_late else nullcontext()
    with patch.object(scan, "MESSAGE", 1), late:
        for kind, seed in itertools.product(KINDS, range(5)):
            problems = [Problem(seed, kind, grid.world, numbers) for numbers in range(2)]
            plan = problems[0].plan(grid)
            passes = []
            for backward in (False, True):
                under_way = [problem.begin(plan, backward) for problem in problems]
                passes.append([arrived() for arrived in under_way])
            for problem, found in zip(problems, zip(*passes, strict=True), strict=True):
                wrong += problem.wrong(plan, found)
            calls.append(plan.comm.calls)
    return wrong + kept_too_long(grid), calls


def kept_too_long(grid: Grid) -> list[str]:
    """Summaries whose memory is not free when the states have come, though the call is still held, or was free before
    they had; by one part and by several."""
    wrong = []
    for kind, transport, size in itertools.product(KINDS, ("p2p", "gather"), (1, 2**22)):
        problem = Problem(1, kind, grid.world)
        plan = problem.plan(grid, transport)
        M, U = problem.summaries(plan)
        memories = [StorageWeakRef(x.untyped_storage()) for x in (M, U)]
        with patch.object(scan, "MESSAGE", size):
            coming = plan.scan.forward(M, U, plan.segments.continues_NB, None, None, False)
            del M, U
            early = any(memory.expired() for memory in memories)
            coming()
            until = time.monotonic() + 2.0  # the backend's own thread may hold a message a little longer
            while not all(memory.expired() for memory in memories) and time.monotonic() < until:
                time.sleep(0.001)
        if early or not all(memory.expired() for memory in memories):
            wrong.append(f"summaries of {kind}, {transport}, {size} on rank {grid.rank}")
    return wrong


@pytest.mark.parametrize(("ranks", "ranks_are_late"), [(2, False), (4, True)])
def test_parts_have_one_processs_bits(ranks: int, ranks_are_late: bool) -> None:
    for wrong, calls in run_ranks(on_every_rank, ranks, ranks_are_late, timeout=60):
        assert not wrong
        assert max(calls) >= 4 * ROWS


def held_up() -> list[int]:
    """Passes whose first rank keeps each part back until the last rank has had the part before; how many of them."""
    grid = make_grid(timeout=10)
    tell, token = dist.new_group([0, 2]), torch.zeros(1)
    problem = Problem(1, "contiguous", 3)
    problem.starts = [[0]] * B
    plan, counts = problem.plan(grid), []
    exchange, arrived = Transport.exchange, Exchange.arrived
    for backward in (False, True):
        first, last, had = (2, 0, [0]) if backward else (0, 2, [0])

        def hold(*given: Any, first: int = first, last: int = last, had: list[int] = had) -> Exchange:
            if grid.rank == first:
                if had[0]:
                    dist.recv(token, last, group=tell)
                had[0] += 1
            return exchange(*given)

        def have(self: Exchange, first: int = first, last: int = last, had: list[int] = had) -> None:
            news = bool(self._received)
            arrived(self)
            if grid.rank == last and news:
                had[0] += 1
                if had[0] < ROWS:
                    dist.send(token, first, group=tell)

        with (
            patch.object(scan, "MESSAGE", 1),
            patch.object(Transport, "exchange", hold),
            patch.object(Exchange, "arrived", have),
        ):
            problem.begin(plan, backward)()
        counts += had
    return counts


def test_the_first_parts_go_on_while_others_are_kept_back() -> None:
    first, _, last = run_ranks(held_up, 3, timeout=60)
    assert first == last == [ROWS, ROWS]
