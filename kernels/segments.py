"""The global grid of segments, and one call's inputs on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .reference import Rule

CHUNK = 64
WHOLE = 128  # width of keys and values of the heads that Hopper's kernels hold whole
T = TypeVar("T")


def cached(fn: Callable[..., T]) -> Callable[..., T]:
    """An lru_cache of 256 results; torch.compile, which traces the function itself, need not warn of that."""
    quick = lru_cache(maxsize=256)(fn)

    @wraps(fn)
    def call(*args: Any) -> T:
        return fn(*args) if torch.compiler.is_compiling() else quick(*args)

    return call


@dataclass(frozen=True)
class Segments:
    """Which segments of the global sequence the local tokens are.

    tokens: tokens of a segment, a multiple of 64; the sequence's last segment may be shorter.
    starts: global index of the first token of each local segment, in the order in which they lie in memory.
    total: tokens of the whole sequence.
    continues_NB: bool ``[N, B]``, whether the state passes through local segment n in row b, that is, no document
        starts inside it or at its first token; None where there are no documents.
    open: for each local segment, whether ``continues_NB`` holds in any row, known on the host; None: in all.
    """

    tokens: int
    starts: tuple[int, ...]
    total: int
    continues_NB: Tensor | None = None
    open: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        check_segment_tokens(self.tokens)

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def held(self) -> int:
        """Tokens of all local segments."""
        return _held(self.tokens, self.starts, self.total)

    def length(self, n: int) -> int:
        """Tokens of local segment n."""
        return min(self.tokens, self.total - self.starts[n])

    def needs(self, has_initial: bool, want_final: bool) -> Needs:
        """What of each local segment's summary is needed."""
        return _needs(self.tokens, self.starts, self.total, self.open, has_initial, want_final)


class Needs(NamedTuple):
    """Of each segment: whether M is needed, where a state comes in and goes on, the same in the forward and the
    backward pass; U, where anyone wants the state that leaves it; D, the gradient of the state that enters it, where
    that may be other than zero."""

    M: tuple[bool, ...]
    U: tuple[bool, ...]
    D: tuple[bool, ...]


@cached
def _needs(
    tokens: int, starts: tuple[int, ...], total: int, open: tuple[bool, ...] | None, has_initial: bool, want_final: bool
) -> Needs:
    comes_in = tuple(has_initial or start > 0 for start in starts)
    goes_on = tuple(want_final or start + tokens < total for start in starts)
    passes = open or (True,) * len(starts)
    return Needs(tuple(map(all, zip(comes_in, goes_on, passes, strict=True))), goes_on, comes_in)


@cached
def _held(tokens: int, starts: tuple[int, ...], total: int) -> int:
    return sum(min(tokens, total - start) for start in starts)


def check_segment_tokens(tokens: int) -> None:
    if not isinstance(tokens, int | torch.SymInt) or tokens <= 0 or tokens % CHUNK:
        raise ValueError(
            f"segment_tokens={tokens!r}: segments are whole chunks of {CHUNK} tokens; give a positive multiple of "
            f"{CHUNK}"
        )


class Heads(NamedTuple):
    """Sizes of a call's states: rows, heads of keys and of values, their widths, the operands' type. ``hopper``: the
    GPU is one."""

    rows: int
    key_heads: int
    value_heads: int
    K: int
    V: int
    dtype: torch.dtype
    hopper: bool = True

    @property
    def whole(self) -> bool:
        """Whether there are kernels of which a program holds a value head's state whole."""
        return self.hopper and held_whole(self.K, self.V, self.dtype)


def held_whole(K: int, V: int, dtype: torch.dtype) -> bool:
    """Whether Hopper has kernels that hold the state of such a head whole."""
    return K == V == WHOLE and dtype in (torch.bfloat16, torch.float16)


def filling_tokens(heads: Heads, multiprocessors: int, tokens: int, intervals: int = 1, held: int = 1) -> int:
    """Length of segments whose programs fill a GPU that holds ``held`` of ``intervals`` of so many tokens.

    A program that holds a head whole has a multiprocessor to itself, and the backward pass takes a value head of each
    key head at a time; else a multiprocessor has four, of 64 columns each. More would only be more to summarise: where
    decays are strong, a summary is of the segment's last chunks alone. A segment has at least 16 chunks, which pay for
    the state's worth of work that it adds, and the whole chain at most 64 segments, or 2 an interval.
    """
    quarters = heads.rows * (4 * heads.key_heads if heads.whole else heads.value_heads * max(1, heads.V // 64))
    chunks = -(-tokens // CHUNK)
    wanted = max(1, min(4 * multiprocessors // (quarters * held), chunks // 16, max(2, 64 // intervals)))
    if intervals == 1:  # the last segment may be short
        return -(-chunks // wanted) * CHUNK
    return chunks // max(n for n in range(1, wanted + 1) if chunks % n == 0) * CHUNK


class Inputs(NamedTuple):
    """The local tokens: ``q, k [B, T, H, K]``, ``v [B, T, HV, V]``, ``g, beta [B, T, HV]``, g None for no decay.

    ``doc_start [B, T]`` holds the global index of each token's document's first token, None for one document.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor
    doc_start: Tensor | None
    segments: Segments
    scale: float
    rule: Rule
    normalise_qk: bool

    @property
    def state_dtype(self) -> torch.dtype:
        """Of states, summaries and sums: fp32, or fp64 for fp64 inputs."""
        return torch.float64 if self.v.dtype == torch.float64 else torch.float32

    def by_segment(self) -> Iterator[tuple[int, slice, Inputs]]:
        """``(n, its tokens, its inputs)`` for each local segment."""
        offset = 0
        for n, start in enumerate(self.segments.starts):
            part = slice(offset, offset + self.segments.length(n))
            offset = part.stop
            yield (
                n,
                part,
                self._replace(
                    q=self.q[:, part],
                    k=self.k[:, part],
                    v=self.v[:, part],
                    g=None if self.g is None else self.g[:, part],
                    beta=self.beta[:, part],
                    doc_start=None if self.doc_start is None else self.doc_start[:, part],
                    segments=replace(self.segments, starts=(start,), continues_NB=None, open=None),
                ),
            )


class Gradients(NamedTuple):
    """Of the inputs, in their shapes and dtypes; ``g`` is None where there was no decay."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor
