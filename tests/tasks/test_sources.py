"""Recall tasks as data sources, held against oracles that read a sequence as a person would."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dnsp.config import parse_config
from dnsp.data.batch import batch
from dnsp.data.mix import open_data
from dnsp.data.pack import IGNORE
from dnsp.errors import UsageError
from dnsp.model.decoder import Decoder
from dnsp.parallel.plan import local_plan
from dnsp.tasks.sources import GAP_POWER, TaskPacker, TaskSequence, open_task, power_law_gaps

SEQUENCES = 150  # over two blocks
SIZES: dict[str, tuple[dict[str, Any], int]] = {
    "kv": ({"vocab": 128, "pairs": [4, 16]}, 80),
    "mqar": ({"vocab": 128, "pairs": [4, 16]}, 128),
    "copy": ({"vocab": 16}, 64),
}
DIGESTS = {"kv": "59cef974e0f2ab9d", "mqar": "4b1769c597d96c35", "copy": "e19c81b7bdc9cded"}  # of sha256


def sequences(task: str, split: str = "train", seed: int = 0, count: int = SEQUENCES) -> list[TaskSequence]:
    options, length = SIZES[task]
    packer = open_task(f"task:{task}", options, seed=seed, split=split)  # type: ignore[arg-type]
    return [packer.sequence(n * length, length) for n in range(count)]


def asked(sequence: TaskSequence) -> list[int]:
    return np.flatnonzero(sequence.targets_T != IGNORE).tolist()


def lookup(task: str, tokens: list[int], position: int, pairs: int) -> int:
    """What a perfect memory answers at a position, from the tokens up to it alone."""
    before = tokens[: position + 1]
    if task == "copy":
        half = before.index(15)  # the separator
        return before[position - half]
    memory = {before[2 * n]: before[2 * n + 1] for n in range(pairs)}
    return memory[before[position]]


@pytest.mark.parametrize("task", SIZES)
def test_a_perfect_lookup_answers_every_question(task: str) -> None:
    counts = Counter()
    for sequence in sequences(task):
        tokens, positions = sequence.tokens_T.tolist(), asked(sequence)
        pairs = len(positions)
        counts[pairs] += 1
        assert [lookup(task, tokens, at, pairs) for at in positions] == sequence.targets_T[positions].tolist()
    if task == "copy":
        assert set(counts) == {32}
    else:
        assert set(counts) == {4, 8, 16} and min(counts.values()) > SEQUENCES / 6  # each as often as the others


@pytest.mark.parametrize("task", ["kv", "mqar"])
def test_pairs_and_questions(task: str) -> None:
    for sequence in sequences(task):
        tokens, positions = sequence.tokens_T, asked(sequence)
        pairs = len(positions)
        keys, values = tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert keys.max() < 64 <= values.min() and values.max() < 128
        assert sorted(tokens[positions]) == sorted(keys)  # every key once
        assert min(positions) >= 2 * pairs and not np.array(positions).__mod__(2).any()
        if task == "kv":
            assert np.array_equal(tokens[np.array(positions) + 1], sequence.targets_T[positions])
            assert positions == list(range(80 - 2 * pairs, 80, 2))


PACKED = {"kv": (52, [0, 16, 32, 48]), "mqar": (80, [0, 64])}  # a length, where documents of 4 pairs begin in it


@pytest.mark.parametrize("task", PACKED)
def test_packed_sequences_are_documents_in_turn(task: str) -> None:
    """Each document answers from itself alone; sequences that are a turn apart have the same documents."""
    packer = open_task(f"task:{task}", {"vocab": 128, "pairs": [4, 4, 13], "packed": True}, seed=0, split="train")
    length, of_4 = PACKED[task]
    drawn = [packer.sequence(n * length, length) for n in range(SEQUENCES)]
    for n, sequence in enumerate(drawn):
        pairs = (4, 4, 13)[n % 3]
        assert sequence.doc_starts == (of_4 if pairs == 4 else [0])
        for start, end in zip(sequence.doc_starts, [*sequence.doc_starts[1:], length], strict=True):
            tokens = sequence.tokens_T[start:end].tolist()
            positions = [at - start for at in asked(sequence) if start <= at < end]
            assert len(positions) == (0 if start == of_4[-1] else pairs)  # no room for one more: nothing is asked
            answers = [lookup(task, tokens, at, pairs) for at in positions]
            assert answers == [sequence.targets_T[start + at] for at in positions]
            assert len({tokens[at] for at in positions}) == len(positions)
    first, again = drawn[0], drawn[3]
    assert first.doc_starts == again.doc_starts and not np.array_equal(first.tokens_T, again.tokens_T)
    long = packer.sequence(0, 512)  # room for a document of every number's: one, with long gaps
    assert long.doc_starts == [0] and len(asked(long)) in (4, 13)


def test_gaps_follow_the_power_law() -> None:
    """The first gap drawn has the law itself; all of them are different."""
    places, draws = 32, 20_000
    weights = np.arange(1, places + 1) ** (GAP_POWER - 1.0)
    law = weights / weights.sum()
    uniform = np.random.default_rng(0).random((draws, places))
    gaps = power_law_gaps(uniform, 4)
    assert all(len(set(row)) == 4 for row in gaps[:200])
    seen = np.bincount(gaps[:, 0], minlength=places) / draws
    assert np.abs(seen - law).max() < 4 * np.sqrt(law.max() / draws)
    assert (np.bincount(gaps[:, 1], minlength=places) / draws)[0] < law[0]  # what is taken is taken


def test_mqar_asks_near_more_often_than_far() -> None:
    packer = open_task("task:mqar", {"vocab": 512, "pairs": 4}, seed=1, split="train")
    gaps = Counter()
    for n in range(400):
        sequence = packer.sequence(n * 256, 256)
        gaps.update((at - 8) // 2 for at in asked(sequence))
    near, far = sum(gaps[g] for g in range(12)), sum(gaps[g] for g in range(112, 124))
    assert near > 5 * far > 0


@pytest.mark.parametrize("task", SIZES)
def test_a_sequence_follows_from_seed_split_and_index(task: str) -> None:
    first, again = sequences(task, count=3), sequences(task, count=3)
    assert all(np.array_equal(a.tokens_T, b.tokens_T) for a, b in zip(first, again, strict=True))
    others = [*sequences(task, split="heldout", count=3), *sequences(task, seed=1, count=3), *first[1:]]
    assert not any(np.array_equal(first[0].tokens_T, other.tokens_T) for other in others)


@pytest.mark.parametrize("task", SIZES)
def test_sequences_are_those_of_every_version(task: str) -> None:
    """A run goes on under any numpy, and a queue's runs are compared: what is drawn never changes."""
    drawn = hashlib.sha256()
    for sequence in [*sequences(task), *sequences(task, split="heldout", seed=1)]:
        drawn.update(np.stack([sequence.tokens_T, sequence.targets_T]).astype("<i8").tobytes())
    assert drawn.hexdigest()[:16] == DIGESTS[task]


def config(sources: list[dict[str, Any]], length: int = 64, vocab: int = 400) -> Any:
    return parse_config(
        {"data": {"sources": sources, "sequence_length": length}, "model": {"vocab_size": vocab}}, "test"
    )


def test_a_rank_reads_its_part_alone() -> None:
    settings = config([{"path": "task:mqar", "options": {"vocab": 64, "pairs": 4}}])
    data = open_data(settings.data, vocab_size=400)
    step = data.step(data.start, 64, 4)
    arguments = dict(micro_batch=4, data_rank=0, data_size=1, vocab_size=400)
    whole = batch(step, 0, intervals=[(0, 64)], **arguments)
    parts = [
        batch(step, 0, intervals=[(a, b), (c, d)], **arguments) for a, b, c, d in ((0, 16, 48, 64), (16, 32, 32, 48))
    ]
    assert step.targets == 16 == sum(int((part.targets_BT != IGNORE).sum()) for part in parts)
    assert whole.tokens_BT[:, :16].equal(parts[0].tokens_BT[:, :16])
    assert whole.targets_BT[:, 16:48].equal(parts[1].targets_BT)
    assert whole.doc_starts == [[0]] * 4


def test_the_loss_of_what_is_asked_is_the_same_without_the_other_logits() -> None:
    source = {"path": "task:mqar", "options": {"vocab": 64, "pairs": [4, 8], "packed": True}}
    settings = parse_config(
        {
            "data": {"sources": [source], "sequence_length": 64},
            "model": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "pattern": ["deltanet"]},
        },
        "test",
    )
    data = open_data(settings.data, vocab_size=64)
    step = data.step(data.start, 64, 4)
    part = batch(step, 0, micro_batch=4, data_rank=0, data_size=1, intervals=[(0, 64)], vocab_size=64)
    tokens, targets, asked_N = part.to(torch.device("cpu"))
    assert asked_N is not None and asked_N.tolist() == np.flatnonzero(targets != IGNORE).tolist()
    torch.manual_seed(0)
    model, plan = Decoder(settings.model).double(), local_plan(part.doc_starts, 64)
    whole = torch.autograd.grad(model(tokens, targets, plan), list(model.parameters()))
    alone = torch.autograd.grad(model(tokens, targets, plan, asked_N=asked_N), list(model.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-13) for a, b in zip(whole, alone, strict=True))
    text = replace(part, targets_BT=torch.where(torch.arange(64) % 64 == 63, IGNORE, tokens))
    assert text.asked_N is None  # all but a few: nothing would be saved


def test_text_and_recall_mix_by_weight(tmp_path: Any) -> None:
    from dnsp.data.prepare import prepare

    (tmp_path / "text.txt").write_text("the delta rule writes what it got wrong. " * 40)
    (tmp_path / "more.txt").write_text("another document. " * 40)
    prepare(str(tmp_path), tmp_path / "data", "bytes")
    recall = {"path": "task:mqar", "weight": 3, "options": {"vocab": 64, "first_id": 257, "pairs": 4}}
    settings = config([{"path": str(tmp_path / "data")}, recall])
    data = open_data(settings.data, vocab_size=400)
    step = data.step(data.start, 64, 40)
    tasks = [sequence for sequence in step.sequences if isinstance(sequence, TaskSequence)]
    assert len(tasks) == 30
    assert all(set(sequence.tokens_T) <= set(range(257, 321)) for sequence in tasks)
    assert all(set(sequence.targets_T[asked(sequence)]) <= set(sequence.tokens_T) for sequence in tasks)


REFUSED = (
    ("task:mqra", {}, 64, "the tasks are task:kv, task:copy, task:mqar"),
    ("task:mqar", {"pair": 4}, 64, "unknown option 'pair'; it has vocab, first_id, pairs"),
    ("task:mqar", {"pairs": 0}, 64, "give a number above 0"),
    ("task:mqar", {"pairs": 17, "vocab": 64}, 64, "pairs=17 need 68 tokens.*the sequence length is 64.*to 16"),
    ("task:kv", {"pairs": 33, "vocab": 64}, 512, "half of vocab=64 are 32.*raise vocab to 66"),
    ("task:copy", {"vocab": 2}, 64, "vocab=2: must be greater than 2"),
    ("task:copy", {}, 63, "63 tokens are not two halves"),
    ("task:kv", {"vocab": 8192}, 256, "token ids up to 8191, model.vocab_size=400.*raise model.vocab_size to 8192"),
    ("python-stdlib", {"pairs": 4}, 64, "python-stdlib has no options"),
)


@pytest.mark.parametrize(("path", "options", "length", "words"), REFUSED)
def test_refusals_name_value_rule_and_way_out(path: str, options: dict[str, Any], length: int, words: str) -> None:
    settings = config([{"path": path, "options": options}], length)
    with pytest.raises(UsageError, match=words):
        open_data(settings.data, vocab_size=400).check_length(length)


def test_pairs_are_written_in_any_form() -> None:
    for given, meant in ((4, (4,)), ([4, 64], (4, 8, 16, 32, 64)), ([3, 5], (3, 5)), ([2, 4, 6], (2, 4, 6))):
        packer = open_task("task:kv", {"pairs": given}, seed=0, split="train")
        assert isinstance(packer, TaskPacker) and packer.source.options.pairs == meant  # type: ignore[attr-defined]


def test_keys_are_uniform() -> None:
    """Every id is a key, and the first one, as often as any other."""
    packer = open_task("task:kv", {"vocab": 16, "pairs": 3}, seed=0, split="train")
    drawn = np.stack([packer.sequence(n * 16, 16).tokens_T[:6:2] for n in range(4000)])
    for column in drawn.T:
        counts = np.bincount(column, minlength=8)
        assert len(counts) == 8 and np.abs(counts - 500).max() < 4 * np.sqrt(500)
