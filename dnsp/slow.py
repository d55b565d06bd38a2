"""Which rank is slower than the others: all of them wait for it.

Ranks of a run end their steps together, so that their step times are equal; what tells them apart is the time of their
own work, without the waiting for messages, and on GPUs the clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, median_high, median_low

from dnsp.nvml import throttles

WINDOW = 16  # steps whose medians are compared
SLOW_WORK = 1.25  # times the median of the ranks with the same share of work
SLOW_CLOCK = 0.9  # times the median clock
AGAIN = 500  # steps until a rank is named anew


@dataclass(frozen=True)
class Sample:
    """Of one rank in one step; None: not known."""

    work_s: float
    clock_mhz: float | None = None
    throttle: int = 0


class SlowRanks:
    """Names ranks off the median of their peers.

    Args:
        names: of each rank, for people.
        peers: of each rank, which others do the same work: equal numbers are compared with each other.
    """

    def __init__(self, names: Sequence[str], peers: Sequence[int]) -> None:
        self.names, self.peers = list(names), list(peers)
        self._window: deque[list[Sample]] = deque(maxlen=WINDOW)
        self._named: dict[int, int] = {}

    def update(self, step: int, samples: Sequence[Sample]) -> list[str]:
        """A line for each rank that is slow now and was not named lately."""
        self._window.append(list(samples))
        if len(self._window) < WINDOW or len(samples) < 2:
            return []
        lines = []
        for rank, (name, why) in enumerate(zip(self.names, self._reasons(), strict=True)):
            if why and step - self._named.get(rank, -AGAIN) >= AGAIN:
                self._named[rank] = step
                lines.append(f"rank {rank} ({name}) is slow: {why}")
        return lines

    def _reasons(self) -> list[str]:
        work = [median_low(step[rank].work_s for step in self._window) for rank in range(len(self.names))]
        clocks = [
            None if any(step[rank].clock_mhz is None for step in self._window)
            else median_high(step[rank].clock_mhz or 0.0 for step in self._window)
            for rank in range(len(self.names))
        ]  # fmt: skip
        reasons = []
        for rank in range(len(self.names)):
            found = []
            usual = median(work[other] for other, peer in enumerate(self.peers) if peer == self.peers[rank])
            if work[rank] > SLOW_WORK * usual:
                found.append(f"its own work takes {work[rank]:.3g} s a step, the median is {usual:.3g} s")
            known = [clock for clock in clocks if clock is not None]
            clock = clocks[rank]
            if clock is not None and clock < SLOW_CLOCK * median(known):
                causes = throttles(self._window[-1][rank].throttle)
                cause = f" ({causes})" if causes else ""
                found.append(f"its clock is {clock:.0f} MHz, the median is {median(known):.0f} MHz{cause}")
            reasons.append("; ".join(found))
        return reasons
