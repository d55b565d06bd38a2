"""Results kept across activation recomputation.

A recomputed layer must not communicate, and need not scan or attend, a second time. Whatever passes through
:func:`once` is put on a tape in the first forward of a checkpointed region and read back from it, in the same
order, when the region is recomputed. Everything else is recomputed as usual.

    y = kept.checkpoint(layer, x)          # instead of torch.utils.checkpoint.checkpoint
    incoming = kept.once(lambda: scan(...))  # inside an autograd function's forward
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint

T = TypeVar("T")


class _Current(threading.local):
    """The tape of the checkpointed region that this thread is inside of (autograd recomputes in its own threads)."""

    tape: list[Any] | None = None
    position: int | None = None  # None: recording


_current = _Current()


class _Region:
    """A context that may be entered again: a graph kept for a second backward pass is recomputed a second time."""

    def __init__(self, tape: list[Any], position: int | None) -> None:
        self.tape, self.position = tape, position
        self.outer: list[tuple[list[Any] | None, int | None]] = []

    def __enter__(self) -> None:
        self.outer.append((_current.tape, _current.position))
        _current.tape, _current.position = self.tape, self.position

    def __exit__(self, *exception: object) -> None:
        _current.tape, _current.position = self.outer.pop()


def recording(tape: list[Any]) -> _Region:
    """A context in which :func:`once` appends its results to ``tape``."""
    return _Region(tape, None)


def replaying(tape: list[Any]) -> _Region:
    """A context in which :func:`once` returns what ``tape`` holds, from its start, and runs nothing."""
    return _Region(tape, 0)


def once(fn: Callable[[], T]) -> T:
    """``fn()``, or in a recomputation what it returned the first time.

    Call it inside an autograd function's forward: the values are kept as they are, without a graph.

    Raises:
        RuntimeError: gradients are enabled (the kept value would lose its graph), or the recomputation asks for
            more results than the first pass kept.
    """
    if _current.tape is None:
        return fn()
    if torch.is_grad_enabled():
        raise RuntimeError("kept.once inside a checkpointed region needs torch.no_grad: what it keeps has no graph")
    return _next(fn)


def _next(fn: Callable[[], T]) -> T:
    """The current tape's next entry; made and put there where it records."""
    assert _current.tape is not None
    if _current.position is None:
        value = fn()
        _current.tape.append(value)
        return value
    if _current.position >= len(_current.tape):
        raise RuntimeError(f"the recomputation asks for result {_current.position}, the first pass kept that many")
    _current.position += 1
    return cast(T, _current.tape[_current.position - 1])


def checkpoint(fn: Callable[..., T], *args: Any, tape: list[Any] | None = None) -> T:
    """``fn(*args)`` with its activations recomputed in the backward pass, all but what passed through :func:`once`.

    Non-reentrant :func:`torch.utils.checkpoint.checkpoint` with a tape of its own (or the list that is given, which may
    keep its entries elsewhere); random states are preserved. Inside another checkpoint the tape is on the outer one's,
    so that the outer's recomputation replays it.
    """
    if tape is None or _current.tape is not None:
        tape = [] if _current.tape is None else _next(list)
    forward = recording if _current.position is None else replaying
    return torch_checkpoint(fn, *args, use_reentrant=False, context_fn=lambda: (forward(tape), replaying(tape)))
