"""Causal attention inside documents as whole blocks: what each rank computes, and whose keys it needs for it.

For each row, each local interval and each piece of a document in it: one square causal block on the piece itself, and
full rectangles over the document's earlier tokens, one for each interval that holds some of them. Blocks are grouped by
the rank that holds the keys, in *rounds*: in round s a rank works on the keys of the rank s places before it, whose
needed ranges alone travel. Rectangles that lie side by side in memory are one: under zigzag a document of the whole
sequence has one rectangle in every round. Squares that lie side by side, over rows too, are one call of a backend, but
for long ones. All of it is Python integers, made once a micro-batch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import NamedTuple

from .attention_backends import CUDNN_TOKENS
from .layout import Layout

Range = tuple[int, int]  # (start, stop)
# All are estimates. cuDNN is the fastest, and takes no several documents. A call costs some 50 us of the device, and
# some 0.3 ms, there and back, of the host, which has to stay ahead. Other backends take neighbours in one call as fast
# as by themselves, so lengths that cuDNN does not take stay together.
LONG = 2048  # tokens of a document's part from which on its interval shares no call with other intervals
APART = 4096  # tokens of a part, no fewer than LONG, from which on it has a call of its own, where cuDNN takes it
JOINED = 2**16  # the most tokens, padded, of a call of several intervals, whose temporary memory grows with them
# Tokens: FlashAttention-2's backward sums dq in [tokens + 128 x documents, H, D] of fp32. Counting them also keeps a
# call far below the 65,535 documents that a launch's grid may have.
PADDING = 128


class Block(NamedTuple):
    """Queries in local tokens of row ``row``, keys in tokens of the round's key piece."""

    row: int
    query: Range
    piece: int
    key: Range
    causal: bool  # a square on the diagonal; otherwise a full rectangle


class Call(NamedTuple):
    """One call of a backend: queries in local tokens of all rows, one row after another. Squares have their bounds
    among the queries, ``edges``, and the keys of the same tokens; a rectangle has none, and ``key`` of a piece."""

    query: Range
    edges: tuple[int, ...] = ()
    row: int = 0
    piece: int = 0
    key: Range = (0, 0)


@dataclass(frozen=True)
class Round:
    """The blocks whose keys ``owner`` holds; ranks of the group, ranges in local tokens of the rank that holds them."""

    owner: int
    pieces: tuple[Range, ...]  # ranges of the owner's tokens that this rank needs, all rows together
    blocks: tuple[Block, ...]
    reader: int  # the rank that reads this rank's keys in the same round
    sends: tuple[Range, ...]  # ranges of this rank's tokens that the reader needs
    local_tokens: int  # of this rank, a row
    interval_tokens: int

    @cached_property
    def calls(self) -> tuple[Call, ...]:
        """The blocks as a backend takes them, squares first."""
        tokens, size = self.local_tokens, self.interval_tokens
        most = max(JOINED, 2 * size)  # of one interval: cut only where its documents are tiny
        groups: list[list[int]] = []  # edges among the tokens of all rows

        def unit(square: Block) -> tuple[int, int, int | None]:
            """What shares a call: a square that has one of its own, or neighbours in an interval that have not."""
            start, stop = square.query
            return square.row, start // size, start if _apart(stop - start) else None

        long, held = True, 0
        for (row, *_), blocks in groupby((block for block in self.blocks if block.causal), unit):
            parts = [(row * tokens + start, row * tokens + stop) for start, stop in (block.query for block in blocks)]
            before, long = long, max(stop - start for start, stop in parts) >= LONG
            joins = not (before or long) and held + sum(_padded(*part) for part in parts) <= JOINED
            for start, stop in parts:
                if not joins or held + _padded(start, stop) > most:
                    groups.append([start])
                    joins, held = True, 0
                groups[-1].append(stop)
                held += _padded(start, stop)
        squares = [Call((edges[0], edges[-1]), tuple(edge - edges[0] for edge in edges)) for edges in groups]
        return *squares, *(
            Call((row * tokens + query[0], row * tokens + query[1]), (), row, piece, key)
            for row, query, piece, key, causal in self.blocks
            if not causal
        )


def _apart(tokens: int) -> bool:
    """Whether a square of so many tokens has a call of its own, whatever lies beside it."""
    return tokens >= APART and tokens % CUDNN_TOKENS == 0


def _padded(start: int, stop: int) -> int:
    """Tokens of a document's square, as a call's temporary memory counts them."""
    return stop - start + PADDING


def make_rounds(starts: Sequence[Sequence[int]], layout: Layout, rank: int) -> tuple[Round, ...]:
    """The rounds of one rank; ``starts``: for each row, the sorted global document starts, the first of them 0."""
    rounds, size = [], layout.interval_tokens
    local = size * len(layout.indices(rank))
    for shift in range(layout.ranks):
        owner, reader = (rank - shift) % layout.ranks, (rank + shift) % layout.ranks
        pieces: tuple[Range, ...]
        sends: tuple[Range, ...]
        if shift == 0:
            pieces, sends = ((0, local),), ()
        else:
            pieces = _needed(starts, layout, owner, rank)
            sends = _needed(starts, layout, rank, reader)
        blocks = _squares(starts, layout, rank) if shift == 0 else []
        blocks += _rectangles(starts, layout, rank, owner, pieces)
        rounds.append(Round(owner, pieces, tuple(blocks), reader, sends, local, size))
    return tuple(rounds)


def _squares(starts: Sequence[Sequence[int]], layout: Layout, rank: int) -> list[Block]:
    blocks = []
    for row, row_starts in enumerate(starts):
        for n, (start, stop) in enumerate(layout.intervals(rank)):
            shift = n * layout.interval_tokens - start
            inner = row_starts[bisect_right(row_starts, start) : bisect_left(row_starts, stop)]
            edges = [start, *inner, stop]
            for a, b in pairwise(edges):
                tokens = (a + shift, b + shift)
                blocks.append(Block(row, tokens, 0, tokens, True))
    return blocks


def _rectangles(
    starts: Sequence[Sequence[int]], layout: Layout, rank: int, owner: int, pieces: tuple[Range, ...]
) -> list[Block]:
    blocks = []
    for row, row_starts in enumerate(starts):
        found: list[tuple[Range, Range]] = []  # queries and keys, in local tokens of their ranks
        for n, reading in enumerate(layout.indices(rank)):
            for interval in layout.indices(owner):
                crossing = _crossing(row_starts, layout, interval, reading)
                if crossing is None:
                    continue
                key_start, query_stop = crossing
                query_shift = n * layout.interval_tokens
                shift = _local(layout, owner, interval) - layout.bounds(interval)[0]
                query = (query_shift, query_shift + query_stop - layout.bounds(reading)[0])
                found.append((query, (key_start + shift, layout.bounds(interval)[1] + shift)))
        for query, key in _joined(found):
            piece = next(n for n, (start, stop) in enumerate(pieces) if start <= key[0] and key[1] <= stop)
            first = pieces[piece][0]
            blocks.append(Block(row, query, piece, (key[0] - first, key[1] - first), False))
    return blocks


def _joined(rectangles: list[tuple[Range, Range]]) -> list[tuple[Range, Range]]:
    """Neighbours of the same queries as one, then neighbours of the same keys."""
    joined: list[tuple[Range, Range]] = []
    for query, key in rectangles:
        if joined and joined[-1][0] == query and joined[-1][1][1] == key[0]:
            joined[-1] = query, (joined[-1][1][0], key[1])
        elif joined and joined[-1][1] == key and joined[-1][0][1] == query[0]:
            joined[-1] = (joined[-1][0][0], query[1]), key
        else:
            joined.append((query, key))
    return joined


def _needed(starts: Sequence[Sequence[int]], layout: Layout, owner: int, reader: int) -> tuple[Range, ...]:
    """The ranges of the owner's local tokens that the reader needs."""
    needed: list[Range] = []
    for interval in layout.indices(owner):
        start, stop = layout.bounds(interval)
        firsts = [
            crossing[0]
            for reading in layout.indices(reader)
            for row_starts in starts
            if (crossing := _crossing(row_starts, layout, interval, reading)) is not None
        ]
        if not firsts:
            continue
        shift = _local(layout, owner, interval) - start
        first, last = min(firsts) + shift, stop + shift
        if needed and needed[-1][1] == first:
            needed[-1] = needed[-1][0], last
        else:
            needed.append((first, last))
    return tuple(needed)


def _crossing(row_starts: Sequence[int], layout: Layout, interval: int, reading: int) -> Range | None:
    """The document that reaches from ``interval`` into the later interval ``reading``: (its first key there, the end of
    its queries in ``reading``), global; None where there is none."""
    if interval >= reading:
        return None
    start, stop = layout.bounds(reading)
    document = bisect_right(row_starts, start) - 1
    first = max(row_starts[document], layout.bounds(interval)[0])
    if first >= layout.bounds(interval)[1]:
        return None
    end = row_starts[document + 1] if document + 1 < len(row_starts) else stop
    return first, min(end, stop)


def _local(layout: Layout, rank: int, interval: int) -> int:
    """The local token at which an interval begins on the rank that holds it."""
    return layout.indices(rank).index(interval) * layout.interval_tokens
