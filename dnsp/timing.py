"""Where a step's time goes: data, forward, backward, waiting for messages, optimizer.

On a GPU the phases are the device's: an event is put into its stream where one phase ends and the next begins, and read
after the step has waited for the loss anyway, so that measuring waits for nothing. The optimizer's own phase is still
running then; its time is that of the step before.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from dnsp.parallel.waits import WAITS, Span

PHASES = ("data", "forward", "backward", "communication", "optimizer")


class StepClock:
    """Measures steps of a model's training.

    ``begin()`` starts a step in the phase ``data``; ``mark(phase)`` ends one phase and begins the next; the model's own
    forward pass is marked by itself; ``end()`` gives the seconds. Waiting for messages is taken out of the phase that
    it happens in and summed as ``communication``: what is not hidden behind work.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        WAITS.cuda = self.cuda
        self._running = False
        self._phase: str | None = None
        self._since: Any = None
        self._spans: list[tuple[str, Any, Any, float, list[Span]]] = []
        self._optimizer: list[tuple[str, Any, Any, float, list[Span]]] = []  # of the step before, on a GPU
        model.register_forward_pre_hook(lambda *_: self.mark("forward"))
        model.register_forward_hook(lambda *_: self.mark("backward"))

    def begin(self) -> None:
        self._running = WAITS.on = True
        WAITS.take()
        self._spans, self._phase = [], None
        self.mark("data")

    def mark(self, phase: str | None) -> None:
        if not self._running:
            return
        now = self._now()
        if self._phase is not None:
            self._spans.append((self._phase, self._since, now, *WAITS.take()))
        self._phase, self._since = phase, now

    def end(self) -> dict[str, float]:
        """Seconds of each of ``PHASES``; those that no mark began are 0. On a GPU after the step's loss is known."""
        self.mark(None)
        self._running = WAITS.on = False
        spans = self._spans
        if self.cuda:  # what comes after the loss was read has not passed yet
            spans = [span for span in spans if span[0] != "optimizer"] + self._optimizer
            self._optimizer = [span for span in self._spans if span[0] == "optimizer"]
        seconds = dict.fromkeys(PHASES, 0.0)
        for phase, begin, end, waited, events in spans:
            waited += sum(_between(*pair) for pair in events)
            whole = _between(begin, end) if self.cuda else end - begin
            seconds[phase] += max(whole - waited, 0.0)
            seconds["communication"] += waited
        return seconds

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
    end.synchronize()  # it has passed, but for the moment that the device may be behind
    return begin.elapsed_time(end) / 1e3
