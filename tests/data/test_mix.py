from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dnsp.config import DataConfig
from dnsp.data.batch import batch, micro_batches
from dnsp.data.indexed import IndexedSource, beside
from dnsp.data.mix import Cursor, Mixture, open_data
from dnsp.data.pack import Packer
from dnsp.errors import RunError, UsageError

Write = Callable[..., IndexedSource]
Documents = list[np.ndarray]

# How far a source's count among the first n sequences may be from its share of n.
SHARE_TOLERANCE = 4
VOCAB = 60_000
WEIGHTS = [1.0, 2.5, 0.5]


def zigzag(ranks: int, length: int) -> list[list[tuple[int, int]]]:
    if ranks == 1:
        return [[(0, length)]]
    size = length // (2 * ranks)
    return [[(r * size, (r + 1) * size), (length - (r + 1) * size, length - r * size)] for r in range(ranks)]


def contiguous(ranks: int, length: int) -> list[list[tuple[int, int]]]:
    return [[(r * length // ranks, (r + 1) * length // ranks)] for r in range(ranks)]


@pytest.fixture
def mixture(write: Write, distinct: Documents) -> Mixture:
    """Ids below 20,000 are of source 0, below 40,000 of source 1, above of source 2."""
    sources = [write([ids + 20_000 * n for ids in distinct], name=f"s{n}") for n in range(3)]
    packers = [Packer(source, seed=5, holdout=0.1) for source in sources]
    return Mixture(packers, WEIGHTS, seed=5)


def whole(mixture: Mixture, cursor: Cursor, length: int, sequences: int) -> np.ndarray:
    step = mixture.step(cursor, length, sequences)
    return np.stack([sequence.tokens(0, length) for sequence in step.sequences])


def test_shares(mixture: Mixture) -> None:
    for first in (0, 12_345, 10**12):
        for count in (10, 100, 5_000):
            drawn = np.bincount([mixture.source_of(i) for i in range(first, first + count)], minlength=3)
            assert np.abs(drawn - count * np.array([0.25, 0.625, 0.125])).max() <= SHARE_TOLERANCE


def test_the_choice_depends_on_seed_and_index_alone(mixture: Mixture) -> None:
    choice = [mixture.source_of(i) for i in range(100)]
    assert choice == [Mixture(mixture.packers, [2, 5, 1], seed=5).source_of(i) for i in range(100)]
    assert choice != [Mixture(mixture.packers, [2, 5, 1], seed=6).source_of(i) for i in range(100)]
    step = mixture.step(mixture.start, 64, 100)
    assert [int(sequence.tokens(0, 1)[0]) // 20_000 for sequence in step.sequences] == choice


def test_one_source_is_always_chosen(mixture: Mixture) -> None:
    alone = Mixture(mixture.packers[:1], [0.001], seed=0)
    assert {alone.source_of(i) for i in range(100)} == {0}


def test_no_token_of_any_source_is_skipped_or_repeated(mixture: Mixture) -> None:
    tokens = whole(mixture, mixture.start, 100, 80)
    for number, packer in enumerate(mixture.packers):
        mine = tokens[tokens[:, 0] // 20_000 == number].ravel()
        first_epoch = mine[: packer.tokens]
        assert len(np.unique(first_epoch)) == len(first_epoch)


def test_resumed_equals_uninterrupted(mixture: Mixture) -> None:
    """Over a change of the sequence length too, and with the cursor through JSON, as a checkpoint keeps it."""
    plan = [(64, 4)] * 5 + [(256, 2)] * 6 + [(128, 8)] * 4
    cursor, uninterrupted = mixture.start, []
    for length, sequences in plan:
        uninterrupted.append(whole(mixture, cursor, length, sequences))
        cursor = mixture.step(cursor, length, sequences).cursor
    for stop in range(1, len(plan)):
        cursor = mixture.start
        for length, sequences in plan[:stop]:
            cursor = mixture.step(cursor, length, sequences).cursor
        cursor = Cursor.from_dict(json.loads(json.dumps(cursor.to_dict())))
        fresh = Mixture(
            [Packer(IndexedSource(p.source.prefix), seed=5, holdout=0.1) for p in mixture.packers], WEIGHTS, seed=5
        )
        for (length, sequences), expected in zip(plan[stop:], uninterrupted[stop:], strict=True):
            assert np.array_equal(whole(fresh, cursor, length, sequences), expected)
            cursor = fresh.step(cursor, length, sequences).cursor


def test_a_longer_stage_goes_on_where_the_shorter_one_was(mixture: Mixture) -> None:
    short = mixture.step(mixture.start, 64, 40).cursor
    assert short == Cursor(40, tuple(64 * n for n in np.bincount([mixture.source_of(i) for i in range(40)])))
    step = mixture.step(short, 512, 1)
    source = mixture.source_of(40)
    expected = mixture.packers[source].sequence(short.tokens[source], 512).tokens(0, 512)
    assert np.array_equal(step.sequences[0].tokens(0, 512), expected)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("layout", [zigzag, contiguous])
@pytest.mark.parametrize("data_size", [1, 2])
def test_ranks_together_hold_what_one_holds(
    mixture: Mixture, ranks: int, layout: Callable[[int, int], list[list[tuple[int, int]]]], data_size: int
) -> None:
    length, global_batch, rows = 256, 8, 2
    step = mixture.step(mixture.step(mixture.start, length, 8).cursor, length, global_batch)
    whole_tokens = np.stack([sequence.tokens(0, length) for sequence in step.sequences])
    seen = np.zeros_like(whole_tokens)
    targets = np.zeros_like(whole_tokens)
    predicted = 0
    accumulation = micro_batches(global_batch, rows, data_size)
    for micro in range(accumulation):
        for data_rank in range(data_size):
            first = (micro * data_size + data_rank) * rows
            for intervals in layout(ranks, length):
                part = batch(
                    step,
                    micro,
                    micro_batch=rows,
                    data_rank=data_rank,
                    data_size=data_size,
                    intervals=intervals,
                    vocab_size=VOCAB,
                )
                assert part.tokens_BT.shape == part.targets_BT.shape == (rows, length // ranks)
                assert part.doc_starts == [s.doc_starts for s in step.sequences[first : first + rows]]
                at = 0
                for start, stop in intervals:
                    here = slice(at, at + stop - start)
                    seen[first : first + rows, start:stop] = part.tokens_BT[:, here].numpy()
                    targets[first : first + rows, start:stop] = part.targets_BT[:, here].numpy()
                    at += stop - start
                predicted += int((part.targets_BT != -100).sum())
    assert np.array_equal(seen, whole_tokens)
    assert np.array_equal(targets, np.stack([s.tokens_and_targets(0, length)[1] for s in step.sequences]))
    assert predicted == step.targets


def test_micro_batches() -> None:
    assert micro_batches(12, 2, 3) == 2
    for wrong in ((8, 3, 1), (8, 2, 3), (0, 1, 1), (4, 0, 1)):
        with pytest.raises(UsageError, match=r"train.global_batch=\d is not a multiple of train.micro_batch=\d times"):
            micro_batches(*wrong)


def config(*sources: tuple[Path | str, float], **others: object) -> DataConfig:
    return DataConfig.model_validate({"sources": [{"path": str(p), "weight": w} for p, w in sources], **others})


def test_open_data(write: Write, distinct: Documents) -> None:
    first, second = (write([ids % 257 for ids in distinct], name=name, vocab_size=257) for name in ("a", "b"))
    mixture = open_data(config((first.prefix, 1), (beside(second.prefix, ".bin"), 3), holdout=0.1), vocab_size=257)
    assert [p.source.prefix for p in mixture.packers] == [first.prefix, second.prefix]
    mixture.check_length(1000)
    with pytest.raises(UsageError, match=r"sequence length 1,000,000 is more than the [\d,]+ train tokens of"):
        mixture.check_length(1_000_000)
    with pytest.raises(UsageError, match="needs a vocabulary of 257, the model has 256: set model.vocab_size=257"):
        open_data(config((first.prefix, 1)), vocab_size=256)
    with pytest.raises(UsageError, match="saved data position is of 3 sources, data.sources has 2"):
        mixture.step(Cursor(0, (0, 0, 0)), 64, 1)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_weights_are_refused(mixture: Mixture, weight: float) -> None:
    with pytest.raises(UsageError, match=r"weight .* of .*s1 is not a number above 0"):
        Mixture(mixture.packers, [1.0, weight, 1.0], seed=0)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.idx does not exist. Make it with: dnsp data prepare SOURCE .*none"):
        open_data(config((tmp_path / "none", 1)), vocab_size=257)


def test_other_tokenizer_is_refused(write: Write) -> None:
    source = write([np.arange(50)] * 3)
    path = beside(source.prefix, ".json")
    path.write_text(path.read_text().replace('"bytes"', '"gpt2"').replace("bytes-257", "1234"))
    with pytest.raises(UsageError, match="made with tokenizer 'gpt2', which is not data.tokenizer='bytes'"):
        open_data(config((source.prefix, 1)), vocab_size=VOCAB)


def test_ids_beyond_the_vocabulary_are_found_in_the_batch(write: Write) -> None:
    mixture = Mixture([Packer(write([np.arange(300)]), seed=0, holdout=0)], [1], seed=0)
    step = mixture.step(mixture.start, 300, 1)
    one = dict(micro_batch=1, data_rank=0, data_size=1)
    batch(step, 0, intervals=[(0, 200)], vocab_size=200, **one)
    with pytest.raises(RunError, match="holds token id 299, outside the model's vocabulary of 200"):
        batch(step, 0, intervals=[(200, 300)], vocab_size=200, **one)
