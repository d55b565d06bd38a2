from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import numpy as np
import pytest

from dnsp.data.indexed import IndexedSource
from dnsp.data.pack import IGNORE, PackedSequence, Packer, check_ids, hash64
from dnsp.errors import RunError, UsageError

Write = Callable[..., IndexedSource]
Documents = list[np.ndarray]


def stream(packer: Packer, lengths: list[int]) -> np.ndarray:
    position, parts = 0, []
    for length in lengths:
        parts.append(packer.sequence(position, length).tokens(0, length))
        position += length
    return np.concatenate(parts)


def targets_by_definition(sequence: PackedSequence) -> np.ndarray:
    tokens = sequence.tokens(0, sequence.length)
    starts = set(sequence.doc_starts)
    return np.array(
        [tokens[t + 1] if t + 1 < sequence.length and t + 1 not in starts else IGNORE for t in range(sequence.length)]
    )


def test_an_epoch_is_the_documents_each_once_and_whole(write: Write, distinct: Documents) -> None:
    """Ids are distinct, so an id tells its document: the pieces of each document, in order, are the document."""
    packer = Packer(write(distinct), seed=3, holdout=0.0)
    assert packer.tokens == sum(map(len, distinct))
    document_of = {int(i): n for n, ids in enumerate(distinct) for i in ids}
    length, position = 97, 0
    pieces: dict[tuple[int, int], list[np.ndarray]] = defaultdict(list)
    seen = 0
    while seen < 3 * packer.tokens:
        sequence = packer.sequence(position, length)
        tokens = sequence.tokens(0, length)
        starts = sequence.doc_starts
        assert starts[0] == 0 and starts == sorted(set(starts))
        for start, stop in zip(starts, [*starts[1:], length], strict=True):
            assert len({document_of[int(i)] for i in tokens[start:stop]}) == 1  # never two documents under one start
            for part in np.split(
                tokens[start:stop], [min(max(packer.tokens * e - position - start, 0), stop - start) for e in (1, 2)]
            ):
                if len(part):
                    at = position + start
                    pieces[(at // packer.tokens, document_of[int(part[0])])].append(part)
        position += length
        seen += length
    for epoch in range(3):
        for number, ids in enumerate(distinct):
            assert np.array_equal(np.concatenate(pieces[(epoch, number)]), ids)


def test_epochs_are_shuffled_anew(write: Write, distinct: Documents) -> None:
    packer = Packer(write(distinct), seed=3, holdout=0.0)
    epochs = [packer.sequence(e * packer.tokens, packer.tokens).documents_N.tolist() for e in range(3)]
    assert len({tuple(order) for order in epochs}) == 3
    assert all(sorted(order) == list(range(len(distinct))) for order in epochs)
    other = Packer(write(distinct, name="again"), seed=4, holdout=0.0)
    assert other.sequence(0, other.tokens).documents_N.tolist() != epochs[0]


def splitmix64(state: int) -> int:
    """The published algorithm, one number at a time (Steele, Lea, Flood 2014)."""
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_order_is_fixed_for_good(write: Write) -> None:
    """A run goes on with the order it began with, whatever version of anything is installed by then."""
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # as published
    assert hash64(7, -1, np.arange(100)).tolist() == [splitmix64(splitmix64(7 ^ (2**64 - 1)) ^ n) for n in range(100)]
    packer = Packer(write([np.arange(3)] * 30), seed=7, holdout=0.2)
    by_hash = sorted(range(30), key=lambda n: splitmix64(splitmix64(7 ^ (2**64 - 1)) ^ n))
    assert sorted(packer.documents_N.tolist()) == sorted(by_hash[6:])
    for epoch in range(2):
        order = sorted(by_hash[6:], key=lambda n: splitmix64(splitmix64(7 ^ epoch) ^ n))
        assert packer.sequence(72 * epoch, 72).documents_N.tolist() == order


def test_any_lengths_give_the_same_stream(write: Write, distinct: Documents) -> None:
    packer = Packer(write(distinct), seed=0, holdout=0.1)
    total = 2 * packer.tokens
    whole = np.concatenate([packer.sequence(e * packer.tokens, packer.tokens).tokens(0, packer.tokens) for e in (0, 1)])
    for lengths in (
        [64] * (total // 64),
        [1] * 700,
        [64] * 10 + [512] * 5 + [128] * 7,
        [packer.tokens, 5, packer.tokens - 5],
    ):
        assert np.array_equal(stream(packer, lengths), whole[: sum(lengths)])


@pytest.mark.parametrize("length", [1, 2, 64, 1000])
def test_targets(write: Write, distinct: Documents, length: int) -> None:
    packer = Packer(write(distinct), seed=0, holdout=0.0)
    for position in range(0, packer.tokens + length, max(length, 37)):
        sequence = packer.sequence(position, length)
        tokens, targets = sequence.tokens_and_targets(0, length)
        assert np.array_equal(targets, targets_by_definition(sequence))
        assert sequence.targets_count == (targets != IGNORE).sum()
        assert np.array_equal(tokens, sequence.tokens(0, length))


def test_intervals_are_cuts_of_the_whole(write: Write, distinct: Documents) -> None:
    sequence = Packer(write(distinct), seed=0, holdout=0.0).sequence(123, 256)
    tokens, targets = sequence.tokens_and_targets(0, 256)
    for start in range(0, 256):
        for stop in (start + 1, start + 2, start + 13, 256):
            if stop <= 256:
                cut_tokens, cut_targets = sequence.tokens_and_targets(start, stop)
                assert np.array_equal(cut_tokens, tokens[start:stop])
                assert np.array_equal(cut_targets, targets[start:stop])


def test_a_rank_reads_its_own_interval_and_one_token_more(
    write: Write, distinct: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(distinct)
    read, original = [], source.read
    monkeypatch.setattr(source, "read", lambda *where: read.append(where[2]) or original(*where))
    sequence = Packer(source, seed=0, holdout=0.0).sequence(5, 1024)
    assert sequence.targets_count > 0 and read == []
    sequence.tokens_and_targets(256, 512)
    assert sum(read) == 257


@pytest.mark.parametrize("holdout", [0.01, 0.05, 0.5, 0.97])
def test_held_out_documents_are_never_trained_on(write: Write, distinct: Documents, holdout: float) -> None:
    source = write(distinct)
    train, held = (Packer(source, seed=0, holdout=holdout, split=split) for split in ("train", "heldout"))
    assert set(train.documents_N) | set(held.documents_N) == set(range(40))
    assert set(train.documents_N) & set(held.documents_N) == set()
    assert len(held.documents_N) == max(1, round(holdout * 40))
    for split in (train, held):
        ids = np.sort(split.sequence(0, split.tokens).tokens(0, split.tokens))
        assert np.array_equal(ids, np.sort(np.concatenate([distinct[n] for n in split.documents_N])))
    again = Packer(source, seed=1, holdout=0.5, split="heldout")
    assert set(again.documents_N) != set(Packer(source, seed=0, holdout=0.5, split="heldout").documents_N)


def test_empty_documents_are_passed_over(write: Write) -> None:
    nothing = np.arange(0)
    packer = Packer(write([nothing, np.arange(3), nothing, nothing, np.arange(3, 7), nothing]), seed=0, holdout=0.0)
    assert packer.tokens == 7
    assert sorted(packer.sequence(0, 7).tokens(0, 7)) == list(range(7))
    assert len(packer.sequence(0, 7).doc_starts) == 2


def test_refusals(write: Write) -> None:
    one, two = write([np.arange(9)], name="one"), write([np.arange(9), np.arange(5)], name="two")
    with pytest.raises(
        UsageError, match=r"holdout=0.05 of the 1 documents in .*one leaves none to train on: prepare at least two"
    ):
        Packer(one, seed=0, holdout=0.05)
    with pytest.raises(UsageError, match=r"leaves none to evaluate on: set data.holdout above 0"):
        Packer(one, seed=0, holdout=0.0, split="heldout")
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(UsageError, match="is not a share of the documents"):
            Packer(two, seed=0, holdout=share)
    with pytest.raises(UsageError, match=r"sequence length 15 is more than the 14 train tokens of .*two"):
        Packer(two, seed=0, holdout=0.0).check_length(15)
    with pytest.raises(UsageError, match="raise data.holdout"):
        Packer(two, seed=0, holdout=0.5, split="heldout").check_length(15)


def test_ids_outside_the_vocabulary(write: Write) -> None:
    source = write([np.arange(3)])
    check_ids(np.array([0, 256]), 257, source)
    for bad in (257, -1):
        with pytest.raises(RunError, match=rf"corpus holds token id {bad}, outside the model's vocabulary of 257"):
            check_ids(np.array([5, bad]), 257, source)
