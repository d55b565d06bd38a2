"""Packing: a source's documents, shuffled anew each epoch, as one endless stream of tokens cut into sequences.

A sequence is the next ``length`` tokens of the stream from some position on; nothing else is state. So any length may
follow any other, a position is all that a checkpoint needs, and no rank has to have read what came before. Where a cut
falls inside a document, its rest begins the next sequence as a document of its own: no token is lost, and none is seen
twice within an epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from dnsp.data.indexed import IndexedSource
from dnsp.errors import RunError, UsageError

IGNORE = -100  # the target of a token that nothing is predicted from
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio
_MASK = (1 << 64) - 1
Split = Literal["train", "heldout"]


def hash64(seed: int, *words: int | np.ndarray) -> np.ndarray:
    """Independent-looking uint64 for each combination of words, by splitmix64's finaliser (Steele et al. 2014).

    Arrays broadcast. Written out because a run must go on with the same order under any version of numpy, whose
    generators promise no such thing.
    """
    state = np.asarray([seed & _MASK], dtype=np.uint64)
    for word in words:
        bits = word.astype(np.uint64) if isinstance(word, np.ndarray) else np.asarray([word & _MASK], dtype=np.uint64)
        state = (state ^ bits) + np.uint64(GOLDEN)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


@dataclass(frozen=True)
class PackedSequence:
    """One sequence as pieces of documents; tokens are read only when asked for, and only those."""

    source: IndexedSource
    length: int
    starts_N: np.ndarray  # index in the sequence of each piece's first token; starts_N[0] == 0
    documents_N: np.ndarray  # which document each piece is of
    offsets_N: np.ndarray  # where in its document each piece begins

    @property
    def doc_starts(self) -> list[int]:
        """Index of the first token of each document, increasing, the first 0."""
        starts: list[int] = self.starts_N.tolist()
        return starts

    @property
    def targets_count(self) -> int:
        """Tokens with a target: all but the last of each piece. Reads nothing."""
        return self.length - len(self.starts_N)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Ids of the sequence's tokens ``start`` to ``stop``, int64 [stop - start]."""
        out_T = np.empty(stop - start, dtype=np.int64)
        first = int(np.searchsorted(self.starts_N, start, side="right")) - 1
        last = int(np.searchsorted(self.starts_N, stop, side="left"))
        for piece in range(first, last):
            piece_start = int(self.starts_N[piece])
            piece_stop = int(self.starts_N[piece + 1]) if piece + 1 < len(self.starts_N) else self.length
            begin, end = max(start, piece_start), min(stop, piece_stop)
            offset = int(self.offsets_N[piece]) + begin - piece_start
            out_T[begin - start : end - start] = self.source.read(int(self.documents_N[piece]), offset, end - begin)
        return out_T

    def tokens_and_targets(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of tokens ``start`` to ``stop`` and the id that follows each, both int64 [stop - start].

        The target is -100 for the last token of a document and of the sequence. A target across ``stop`` is read from
        beyond it.
        """
        ids = self.tokens(start, min(stop + 1, self.length))
        targets_T = np.full(stop - start, IGNORE, dtype=np.int64)
        following = ids[1:]
        targets_T[: len(following)] = following
        low, high = np.searchsorted(self.starts_N, [start, stop], side="right")
        targets_T[self.starts_N[low:high] - 1 - start] = IGNORE
        return ids[: stop - start], targets_T


class Packer:
    """The stream of one source's ``train`` or ``heldout`` documents.

    seed: everything is determined by it, the documents' number and the position in the stream.
    holdout: share of the documents that belong to ``heldout``; at least one does if it is above 0.

    Raises UsageError where a split would have no tokens.
    """

    def __init__(self, source: IndexedSource, *, seed: int, holdout: float, split: Split = "train") -> None:
        if not 0 <= holdout < 1:
            raise UsageError(f"data.holdout={holdout} is not a share of the documents: give 0 or more, and below 1")
        self.source, self.split, self._seed = source, split, seed
        filled = np.flatnonzero(source.lengths_N)
        held = min(len(filled), max(1, round(holdout * len(filled)))) if holdout > 0 else 0
        order = filled[np.argsort(hash64(seed, -1, filled), kind="stable")]
        self.documents_N: np.ndarray = np.sort(order[:held] if split == "heldout" else order[held:])
        if len(self.documents_N) == 0:
            whole = f"data.holdout={holdout} of the {len(filled)} documents in {source.prefix}"
            if split == "heldout":
                raise UsageError(f"{whole} leaves none to evaluate on: set data.holdout above 0")
            raise UsageError(f"{whole} leaves none to train on: prepare at least two documents, or lower data.holdout")
        self.tokens = int(source.lengths_N[self.documents_N].sum())  # in one epoch
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)  # a sequence touches two epochs at most

    def check_length(self, length: int) -> None:
        """Raises UsageError where a sequence would hold a document twice."""
        if length > self.tokens:
            raise UsageError(
                f"sequence length {length:,} is more than the {self.tokens:,} {self.split} tokens of "
                f"{self.source.prefix}: prepare more text, shorten the sequence"
                + (", or raise data.holdout" if self.split == "heldout" else "")
            )

    def sequence(self, position: int, length: int) -> PackedSequence:
        """Tokens ``position`` to ``position + length`` of the stream."""
        self.check_length(length)
        epoch, begin = divmod(position, self.tokens)
        pieces = [self._pieces(epoch, begin, min(begin + length, self.tokens))]
        left = begin + length - self.tokens
        if left > 0:
            starts_N, documents_N, offsets_N = self._pieces(epoch + 1, 0, left)
            pieces.append((starts_N + length - left, documents_N, offsets_N))
        starts_N, documents_N, offsets_N = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        return PackedSequence(self.source, length, starts_N, documents_N, offsets_N)

    def _pieces(self, epoch: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Starts from ``begin``, documents and offsets of what lies between two positions of one epoch."""
        order_N, starts_N = self._epoch(epoch)
        first = int(np.searchsorted(starts_N, begin, side="right")) - 1
        last = int(np.searchsorted(starts_N, end, side="left"))
        offsets_N = np.zeros(last - first, dtype=np.int64)
        offsets_N[0] = begin - starts_N[first]
        return np.maximum(starts_N[first:last] - begin, 0), order_N[first:last], offsets_N

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents in this epoch's order, and the position in the epoch at which each starts."""
        order_N = self.documents_N[np.argsort(hash64(self._seed, epoch, self.documents_N), kind="stable")]
        lengths_N = self.source.lengths_N[order_N]
        return order_N, np.cumsum(lengths_N) - lengths_N


class Named(Protocol):
    """What data come from, as messages name it."""

    @property
    def prefix(self) -> str | Path: ...


def check_ids(ids: np.ndarray, vocab_size: int, source: Named) -> None:
    """Raises RunError where an id is none of the model's."""
    if len(ids) and (int(ids.max()) >= vocab_size or int(ids.min()) < 0):
        worst = int(ids.max()) if int(ids.max()) >= vocab_size else int(ids.min())
        raise RunError(
            f"data {source.prefix} holds token id {worst}, outside the model's vocabulary of {vocab_size}: "
            "set model.vocab_size to the tokenizer's, or prepare the data again"
        )
