"""Recall tasks as data sources: ``data.sources: [{path: "task:mqar", options: {vocab: 8192, pairs: [4, 64]}}]``.

A source gives any number of sequences, each one document as long as ``data.sequence_length`` (or several, ``packed``),
and the target of a token is -100 except where something is to be recalled. A sequence is a function of the seed, the
split and its index alone, so that a run is taken up again, and a rank reads its own part, as with text.

    kv     k1 v1 ... kN vN, then every key once in random order, each followed by its value
    copy   x1 ... xN, a separator, x1 ... xN again
    mqar   k1 v1 ... kN vN, then tokens drawn at random, and among them every key once at a power-law gap
           (multi-query associative recall, Arora et al., arXiv:2312.04927)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dnsp.data.pack import IGNORE, Split, hash64
from dnsp.errors import UsageError

PREFIX = "task:"
DRAWN = 2**16  # tokens that are drawn at once: of each numpy call there are then few
VERSION = 2  # of what is drawn; with another a run does not go on, nor a queue
ENDLESS = 2**50  # tokens of a source that has no end, for who asks how many an epoch has
GAP_POWER = 0.01  # of the gaps' density, as in the work that MQAR comes from
_SPLITS: dict[Split, int] = {"train": 1, "heldout": 2}


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    vocab: int = Field(8192, gt=1)  # ids of the task
    first_id: int = Field(0, ge=0)  # the lowest of them: beside text, above the tokenizer's


class _PairOptions(_Options):
    """``pairs``: of a sequence; of several numbers each sequence takes one at random. ``[low, high]`` with high at
    least twice low is all doublings of low up to high. ``packed``: of several numbers sequences take one in turn, and
    are filled with documents of so many pairs, no longer than these need; unless a sequence has room for a document of
    every number's, and is one document, whose gaps are then long."""

    pairs: tuple[int, ...] = (64,)
    packed: bool = False

    @field_validator("pairs", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(v, int) for v in value):
            low, high = value
            if low > 0 and high >= 2 * low:
                return tuple(low * 2**n for n in range(64) if low * 2**n <= high)
        return tuple(value) if isinstance(value, list | tuple) else (value,)

    @field_validator("pairs")
    @classmethod
    def _above_zero(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or min(value) < 1:
            raise ValueError(f"pairs={list(value)}: give a number above 0, or several as in [4, 64]")
        return value


class _CopyOptions(_Options):
    vocab: int = Field(64, gt=2)  # the last id is the separator


OPTIONS: dict[str, type[_Options]] = {"kv": _PairOptions, "copy": _CopyOptions, "mqar": _PairOptions}


@dataclass(frozen=True)
class Block:
    """Rows of one length, before ``first_id`` is added: both ``[rows, length]`` int64."""

    tokens: np.ndarray
    targets: np.ndarray  # -100 where nothing is asked
    doc_starts: list[list[int]] | None = None  # of each row; None: each is one document

    @cached_property
    def targets_counts(self) -> list[int]:
        """Of each row, how many tokens have a target."""
        counts: list[int] = (self.targets != IGNORE).sum(1).tolist()
        return counts


@dataclass(frozen=True)
class TaskSource:
    """What a packer has behind it: the task and its options."""

    task: str
    options: _Options
    metadata: None = None  # made with no tokenizer

    @property
    def prefix(self) -> str:
        return PREFIX + self.task

    @property
    def identity(self) -> str:
        return f"{self.prefix}, version {VERSION}, {json.dumps(self.options.model_dump(), sort_keys=True)}"

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises UsageError where the model does not know all of the task's ids."""
        end = self.options.first_id + self.options.vocab
        if end > vocab_size:
            raise UsageError(
                f"{self.prefix} has token ids up to {end - 1}, model.vocab_size={vocab_size} knows 0 to "
                f"{vocab_size - 1}: raise model.vocab_size to {end}, or lower the task's vocab"
            )


@dataclass(frozen=True)
class TaskSequence:
    """One sequence; what :class:`~dnsp.data.pack.PackedSequence` offers."""

    source: TaskSource
    length: int
    tokens_T: np.ndarray
    targets_T: np.ndarray
    doc_starts: list[int]
    targets_count: int

    def tokens_and_targets(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of tokens ``start`` to ``stop`` and what is to be predicted from each, both int64 [stop - start]."""
        return self.tokens_T[start:stop], self.targets_T[start:stop]


class TaskPacker:
    """The endless stream of a task's ``train`` or ``heldout`` sequences, which have nothing in common.

    Raises UsageError for options that do not fit each other.
    """

    tokens = ENDLESS

    def __init__(self, source: TaskSource, *, seed: int, split: Split = "train") -> None:
        self.source, self.split, self._seed = source, split, seed
        self._block = lru_cache(maxsize=4)(self._make_block)
        if isinstance(source.options, _PairOptions):
            most, keys = max(source.options.pairs), source.options.vocab // 2
            if most > keys:
                raise UsageError(
                    f"{source.prefix}: pairs={most} need as many different keys, and half of vocab="
                    f"{source.options.vocab} are {keys}: lower pairs, or raise vocab to {2 * most} or more"
                )

    def check_length(self, length: int) -> None:
        """Raises UsageError where a sequence of ``length`` tokens cannot hold the task."""
        options = self.source.options
        if isinstance(options, _PairOptions):
            most = max(options.pairs)
            if 4 * most > length:
                raise UsageError(
                    f"{self.source.prefix}: pairs={most} need {4 * most} tokens (a key, a value and two for the "
                    f"question), the sequence length is {length}: lower pairs to {length // 4}, or lengthen it"
                )
        elif length < 4 or length % 2:
            raise UsageError(
                f"{self.source.prefix}: a sequence is a text and its copy, {length} tokens are not two halves of 2 or "
                "more: give an even sequence length"
            )

    def sequence(self, position: int, length: int) -> TaskSequence:
        """Sequence ``position // length`` of the stream."""
        self.check_length(length)
        block, row = divmod(position // length, rows_of_block(length))
        drawn = self._block(block, length)
        starts = [0] if drawn.doc_starts is None else drawn.doc_starts[row]
        return TaskSequence(
            self.source, length, drawn.tokens[row], drawn.targets[row], starts, drawn.targets_counts[row]
        )  # fmt: skip

    def _make_block(self, block: int, length: int) -> Block:
        # Philox's raw output is the same in every version of numpy; the distributions of its generators are not
        key = hash64(self._seed, _SPLITS[self.split], block, length)
        bits, task, options = np.random.Philox(key=int(key[0])), self.source.task, self.source.options
        rows = rows_of_block(length)
        if isinstance(options, _PairOptions) and options.packed and length <= PACKED[task] * max(options.pairs):
            drawn = draw_packed(bits, task, options, block * rows, rows, length)
        else:
            drawn = _DRAWS[task](bits, options, rows, length)
        targets = np.where(drawn.targets == IGNORE, IGNORE, drawn.targets + options.first_id)
        return Block(drawn.tokens + options.first_id, targets, drawn.doc_starts)


def rows_of_block(length: int) -> int:
    """Sequences that are drawn at once."""
    return max(1, DRAWN // length)


def is_task(path: str) -> bool:
    return path.startswith(PREFIX)


def open_task(path: str, options: dict[str, Any], *, seed: int, split: Split) -> TaskPacker:
    """The packer of ``task:NAME``.

    Raises UsageError for an unknown task, and for options that it does not have or that do not fit.
    """
    name = path.removeprefix(PREFIX)
    if name not in OPTIONS:
        raise UsageError(f"data.sources: {path!r} is not known: the tasks are {', '.join(PREFIX + n for n in OPTIONS)}")
    try:
        checked = OPTIONS[name].model_validate(options)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"][:1]))
        if problem["type"] == "extra_forbidden":
            known = ", ".join(OPTIONS[name].model_fields)
            raise UsageError(f"{path}: unknown option {where!r}; it has {known}") from None
        text = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        raise UsageError(f"{path}: {where}={problem['input']!r}: {text}") from None
    return TaskPacker(TaskSource(name, checked), seed=seed, split=split)


# The tasks. Each draws ``rows`` sequences from a bit generator.


def _draw_pairs(bits: np.random.Philox, options: _Options, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many pairs each row has ``[rows]``, and keys and values ``[rows, most]`` for the most that a row may have.

    Keys are different ids of the vocabulary's lower half, values different ids of its upper half.
    """
    assert isinstance(options, _PairOptions)
    half = options.vocab // 2
    choices, most = np.asarray(options.pairs), max(options.pairs)
    counts = choices[_below(bits, (rows,), len(choices))]
    return counts, _distinct(bits, rows, half, most), half + _distinct(bits, rows, options.vocab - half, most)


def draw_kv(bits: np.random.Philox, options: _Options, rows: int, length: int) -> Block:
    """Unused tokens, where there are fewer pairs than fit, lie between pairs and questions: drawn from all ids."""
    counts, keys, values = _draw_pairs(bits, options, rows)
    tokens, targets = _below(bits, (rows, length), options.vocab), np.full((rows, length), IGNORE, dtype=np.int64)
    order = _uniform(bits, keys.shape)
    for count, which in _alike(counts):
        own_keys, own_values = keys[which, :count], values[which, :count]
        tokens[which, 0 : 2 * count : 2], tokens[which, 1 : 2 * count : 2] = own_keys, own_values
        asked = np.argsort(order[which, :count], axis=1, kind="stable")
        answers = np.take_along_axis(own_values, asked, axis=1)
        tokens[which, length - 2 * count :: 2] = np.take_along_axis(own_keys, asked, axis=1)
        tokens[which, length - 2 * count + 1 :: 2] = answers
        targets[which, length - 2 * count :: 2] = answers
    return Block(tokens, targets)


def draw_mqar(bits: np.random.Philox, options: _Options, rows: int, length: int) -> Block:
    """Question j stands at ``2 N + 2 gap_j``, gaps without repetition from a density that falls as gap^(a-1), a = 0.01,
    as in the published generator; what stands between questions is drawn from all ids."""
    counts, keys, values = _draw_pairs(bits, options, rows)
    tokens, targets = _below(bits, (rows, length), options.vocab), np.full((rows, length), IGNORE, dtype=np.int64)
    draws = _uniform(bits, (rows, length // 2))
    for count, which in _alike(counts):
        own_keys, own_values = keys[which, :count], values[which, :count]
        tokens[which, 0 : 2 * count : 2], tokens[which, 1 : 2 * count : 2] = own_keys, own_values
        at = 2 * count + 2 * power_law_gaps(draws[which, : (length - 2 * count) // 2], count)
        tokens[which[:, None], at], targets[which[:, None], at] = own_keys, own_values
    return Block(tokens, targets)


def draw_packed(bits: np.random.Philox, task: str, options: _PairOptions, first: int, rows: int, length: int) -> Block:
    """Sequences, the first of them the stream's ``first``-th. What is left at a sequence's end is a document of tokens
    drawn at random. Sequences have their documents where those a turn before them had theirs."""
    tokens, targets = np.empty((rows, length), dtype=np.int64), np.full((rows, length), IGNORE, dtype=np.int64)
    turn = (first + np.arange(rows)) % len(options.pairs)
    starts: list[list[int]] = [[0]] * rows
    for count, which in _alike(np.asarray(options.pairs)[turn]):
        each = min(PACKED[task] * count, length)
        documents = length // each
        alone = options.model_copy(update={"pairs": (count,)})
        drawn = _DRAWS[task](bits, alone, len(which) * documents, each)
        full = documents * each
        tokens[which, :full], targets[which, :full] = (
            drawn.tokens.reshape(len(which), full), drawn.targets.reshape(len(which), full)
        )  # fmt: skip
        tokens[which, full:] = _below(bits, (len(which), length - full), options.vocab)
        for row in which:
            starts[row] = list(range(0, length, each))
    return Block(tokens, targets, starts)


def _alike(counts: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Each number of pairs, and the rows that have it: they are drawn at once."""
    return [(int(count), np.flatnonzero(counts == count)) for count in np.unique(counts)]


def power_law_gaps(uniform_RN: np.ndarray, count: int) -> np.ndarray:
    """``count`` different gaps in 0..N-1 a row, drawn one after another with probability proportional to
    (gap + 1)^(a - 1), ``[R, count]``.

    By exponential races (the first of N clocks of these rates, the next, ...), one uniform number in (0, 1) a gap.
    """
    rates = np.arange(1, uniform_RN.shape[1] + 1, dtype=np.float64) ** (GAP_POWER - 1)
    return _lowest(-np.log(uniform_RN) / rates, count)


def draw_copy(bits: np.random.Philox, options: _Options, rows: int, length: int) -> Block:
    half = length // 2
    text = _below(bits, (rows, half), options.vocab - 1)
    separator = np.full((rows, 1), options.vocab - 1, dtype=np.int64)
    targets = np.concatenate([np.full((rows, half), IGNORE, dtype=np.int64), text], axis=1)
    return Block(np.concatenate([text, separator, text[:, :-1]], axis=1), targets)


_DRAWS = {"kv": draw_kv, "copy": draw_copy, "mqar": draw_mqar}
# Tokens of a packed document for each of its pairs: none too many in kv; in mqar as it is published, 64 for 4 pairs.
PACKED = {"kv": 4, "mqar": 16}


def _below(bits: np.random.Philox, shape: Sequence[int], bound: int) -> np.ndarray:
    """Uniform integers below ``bound`` (far below 2^64: the remainder's bias is nothing)."""
    return (bits.random_raw(int(np.prod(shape))) % np.uint64(bound)).astype(np.int64).reshape(shape)


def _uniform(bits: np.random.Philox, shape: Sequence[int]) -> np.ndarray:
    """Uniform in (0, 1), both ends left out."""
    raw = bits.random_raw(int(np.prod(shape))) >> np.uint64(11)
    return ((raw.astype(np.float64) + 0.5) * 2.0**-53).reshape(shape)


def _distinct(bits: np.random.Philox, rows: int, bound: int, count: int) -> np.ndarray:
    """``count`` different integers below ``bound`` in random order, ``[rows, count]``.

    Where a good part of all draws has none twice a row is drawn until that is so, which favours no row; elsewhere all
    integers are put in random order, and the first taken.
    """
    if count * count > 2 * bound:
        return _lowest(_uniform(bits, (rows, bound)), count)
    found = np.empty((rows, count), dtype=np.int64)
    wanted = np.arange(rows)
    while len(wanted):
        found[wanted] = _below(bits, (len(wanted), count), bound)
        ordered = np.sort(found[wanted], axis=1)
        wanted = wanted[(ordered[:, 1:] == ordered[:, :-1]).any(axis=1)]
    return found


def _lowest(values_RN: np.ndarray, count: int) -> np.ndarray:
    """Where each row has its ``count`` lowest values, from the lowest up, ``[R, count]``; the rest is not sorted."""
    first = np.argpartition(values_RN, count - 1, axis=1)[:, :count]
    order = np.argsort(np.take_along_axis(values_RN, first, axis=1), axis=1, kind="stable")
    return np.take_along_axis(first, order, axis=1)
