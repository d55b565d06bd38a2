"""Which tokens of a sequence each rank holds.

A sequence is cut into equal *intervals* in global order. Contiguous: one a rank. Zigzag: 2P of them, rank r holds
r and 2P-1-r, so that causal attention (whose work grows with the position) costs every rank the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import LayoutError

CHUNK = 64  # tokens; the delta rule's fixed global grid, which no cut may leave
KINDS = ("contiguous", "zigzag")


@dataclass(frozen=True)
class Layout:
    """``tokens`` of one sequence over ``ranks`` ranks. Raises LayoutError where they do not fit."""

    kind: str
    ranks: int
    tokens: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise LayoutError(f"layout {self.kind!r} is unknown: use one of {', '.join(KINDS)}")
        if self.ranks < 1 or self.tokens < 1:
            raise LayoutError(f"a layout needs at least 1 rank and 1 token, not {self.ranks} and {self.tokens}")
        unit = self.count * CHUNK
        if self.ranks > 1 and self.tokens % unit:
            below, above = self.tokens // unit * unit, (self.tokens // unit + 1) * unit
            ways = f"{below} or {above}" if below else f"{above}, or fewer ranks"
            raise LayoutError(
                f"sequence length {self.tokens} does not split into {self.count} intervals of whole {CHUNK}-token "
                f"chunks ({self.kind} over {self.ranks} ranks): use {ways}"
            )

    @property
    def count(self) -> int:
        """Number of intervals of the whole sequence."""
        return 2 * self.ranks if self.kind == "zigzag" and self.ranks > 1 else self.ranks

    @property
    def interval_tokens(self) -> int:
        return self.tokens // self.count

    def owner(self, interval: int) -> int:
        """The rank (within the sequence group) that holds an interval, 0 <= interval < count."""
        return min(interval, self.count - 1 - interval) if self.count > self.ranks else interval

    def indices(self, rank: int) -> tuple[int, ...]:
        """The intervals of a rank by index, increasing: its local order."""
        return (rank, self.count - 1 - rank) if self.count > self.ranks else (rank,)

    def bounds(self, interval: int) -> tuple[int, int]:
        """Global (start, stop) of an interval."""
        return interval * self.interval_tokens, (interval + 1) * self.interval_tokens

    def intervals(self, rank: int) -> tuple[tuple[int, int], ...]:
        """Global (start, stop) of a rank's intervals, increasing: its local tokens in local order."""
        return tuple(self.bounds(i) for i in self.indices(rank))
