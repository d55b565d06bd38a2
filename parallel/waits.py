"""How long this rank's work stands still for messages: the part of communication that nothing hides."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Span = tuple[torch.cuda.Event, torch.cuda.Event]
_NOTHING = nullcontext()


class Waits:
    """Sums the time between a wait's begin and its end, where :attr:`on` is set.

    On the CPU that is the time of the call. On a GPU a wait is the stream's, not the host's: events are put before and
    after it, and read when the caller knows that they have passed.
    """

    def __init__(self) -> None:
        self.on = False
        self.cuda = False
        self._seconds = 0.0
        self._spans: list[Span] = []
        self._inside = False

    def counted(self) -> AbstractContextManager[None]:
        """Around what may wait."""
        return self._counted() if self.on and not self._inside else _NOTHING

    def aside(self) -> AbstractContextManager[None]:
        """Around waits of a stream that this rank's work does not stand still for; it awaits that stream later."""
        return self._aside() if self.on else _NOTHING

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._inside = True
        begin = self._now()
        try:
            yield
        finally:
            self._inside = False
            end = self._now()
            if self.cuda:
                self._spans.append((begin, end))
            else:
                self._seconds += end - begin

    @contextmanager
    def _aside(self) -> Iterator[None]:
        was, self._inside = self._inside, True
        try:
            yield
        finally:
            self._inside = was

    def counting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, counted."""

        def counted(*arguments: Any, **options: Any) -> Any:
            with self.counted():
                return call(*arguments, **options)

        return counted

    def take(self) -> tuple[float, list[Span]]:
        """What came together since the last call: seconds, and on a GPU pairs of events."""
        taken = self._seconds, self._spans
        self._seconds, self._spans = 0.0, []
        return taken

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


WAITS = Waits()


def gather_rows(row: list[float], group: dist.ProcessGroup | None) -> list[list[float]]:
    """Every rank's numbers, in the order of the ranks, over the host; equal lengths. ``group`` None: there is one."""
    if group is None or dist.get_world_size(group) == 1:
        return [row]
    mine = torch.tensor(row, dtype=torch.float64)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, mine, group=group)
    return [_numbers(other) for other in rows]


def _numbers(row: Tensor) -> list[float]:
    numbers: list[float] = row.tolist()
    return numbers
