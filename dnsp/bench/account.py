"""Where a step's time goes on every rank, while all of them work: it tells waiting from slower work and from a host
that comes late.

    step      from one step's end to the next one's, on the device
    waiting   of it, the compute stream stands still until states have come and are folded; the rest is the rank's own
              work
    host      what the host takes to launch a step: where that is as long as the step, the device waits for the host
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.table import Table

from dnsp.bench.ranks import Ranks, Work, new_table
from dnsp.parallel.waits import WAITS


class Account(NamedTuple):
    """Of a rank, ms a step. ``waits``: one after another, on a GPU of the forward and of the backward scan."""

    step: float
    waits: list[float]
    host: float

    @property
    def waiting(self) -> float:
        return sum(self.waits)

    @property
    def own(self) -> float:
        return self.step - self.waiting


class Alone(NamedTuple):
    """What the slowest rank takes alone on its GPU, ms a step: its own work, and its folds."""

    own: float
    folds: float


def account(work: Work | None, ranks: Ranks, repeat: int) -> list[Account]:
    """Of so many steps, two or more, one behind another, on every rank that does them; None: this rank only waits."""
    ranks.wait()
    mine = None if work is None else _account(work, ranks, repeat)
    return [found for found in ranks.comm.from_all(mine) if found]


def _account(work: Work, ranks: Ranks, repeat: int) -> Account:
    on_gpu = ranks.device.type == "cuda"

    def now() -> Any:
        if not on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end) if on_gpu else 1e3 * (end - begin))

    WAITS.take()
    WAITS.on, WAITS.cuda = True, on_gpu
    waits: list[tuple[float, list[Any]]] = []
    try:
        began, ends = time.perf_counter(), [now()]
        for _ in range(repeat):
            work()
            ends.append(now())
            waits.append(WAITS.take())
        host = time.perf_counter() - began
        ranks.synchronize()
    finally:
        WAITS.on = False
    steps = [between(*pair) for pair in zip(ends, ends[1:], strict=False)]
    waited = [[between(*span) for span in spans] if on_gpu else [1e3 * seconds] for seconds, spans in waits]
    # In the first step the device waits for its first launches, and for whoever began later.
    return Account(median(steps[1:]), [median(each) for each in zip(*waited[1:], strict=True)], 1e3 * host / repeat)


def table(title: str, found: Mapping[str, Sequence[Account]], replayed: Mapping[str, Alone]) -> Table:
    """For people."""
    rows = new_table(title, "step, ms", "own work", "alone", "waiting", "its folds", "host")
    for name, ranks in found.items():
        rows.add_row(
            name,
            f"{max(rank.step for rank in ranks):.3f}",
            _range([rank.own for rank in ranks]),
            f"{replayed[name].own:.3f}" if name in replayed else "",
            _range([rank.waiting for rank in ranks]),
            f"{replayed[name].folds:.3f}" if name in replayed else "",
            _range([rank.host for rank in ranks]),
        )
    return rows


def _range(values: Sequence[float]) -> str:
    """From the least to the most of the ranks."""
    least, most = f"{min(values):.3f}", f"{max(values):.3f}"
    return least if least == most else f"{least} to {most}"
