"""Several sources mixed by weight, and the sequences of each optimizer step.

Which source a sequence comes from depends on its index and the seed alone; what a source gives depends on how many of
its tokens were taken before. Both are in the cursor, every rank advances it alike, and a checkpoint keeps it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from dnsp.config import DataConfig
from dnsp.data.indexed import IndexedSource
from dnsp.data.pack import GOLDEN, PackedSequence, Packer, Split, hash64
from dnsp.data.prepare import ensure
from dnsp.data.tokenizer import Tokenizer, load_tokenizer
from dnsp.errors import UsageError
from dnsp.tasks.sources import TaskPacker, TaskSequence, is_task, open_task


@dataclass(frozen=True)
class Cursor:
    """How far the data has been used."""

    sequences: int  # handed out, of all sources
    tokens: tuple[int, ...]  # handed out, of each source

    def to_dict(self) -> dict[str, int | list[int]]:
        return {"sequences": self.sequences, "tokens": list(self.tokens)}

    @classmethod
    def from_dict(cls, saved: dict) -> Cursor:
        return cls(int(saved["sequences"]), tuple(int(tokens) for tokens in saved["tokens"]))


@dataclass(frozen=True)
class Step:
    """The sequences of one optimizer step, over all data ranks and micro-batches."""

    sequences: tuple[PackedSequence | TaskSequence, ...]
    targets: int  # predicted tokens in all of them: what the step's loss is divided by
    cursor: Cursor  # after this step


class Mixture:
    """Sources with weights, as one order of sequences.

    packers: one a source, of the same split. weights: shares of the sequences, in any unit.
    Raises UsageError for a weight that is not above 0.
    """

    def __init__(self, packers: Sequence[Packer | TaskPacker], weights: Sequence[float], *, seed: int) -> None:
        for packer, weight in zip(packers, weights, strict=True):
            if not 0 < weight < float("inf"):
                raise UsageError(
                    f"data.sources: weight {weight} of {packer.source.prefix} is not a number above 0: "
                    "give one, or remove the source"
                )
        total = sum(weights)
        self.packers = tuple(packers)
        self._bounds = [int(part / total * 2**64) for part in accumulate(weights)][:-1]
        self._offset = int(hash64(seed, -2)[0])

    @property
    def start(self) -> Cursor:
        """Nothing used yet."""
        return Cursor(0, (0,) * len(self.packers))

    def source_of(self, index: int) -> int:
        """Which source sequence ``index`` comes from.

        Steps of the golden ratio around a circle that the sources share by weight (a Kronecker sequence): any run of
        sequences holds each source's share to within a few.
        """
        return bisect_right(self._bounds, (self._offset + index * GOLDEN) % 2**64)

    def check_length(self, length: int) -> None:
        """Raises UsageError where a source has fewer tokens than a sequence; for every stage, before the first step."""
        for packer in self.packers:
            packer.check_length(length)

    def step(self, cursor: Cursor, length: int, sequences: int) -> Step:
        """The next ``sequences`` sequences of ``length`` tokens. Reads no tokens."""
        if len(cursor.tokens) != len(self.packers):
            raise UsageError(
                f"the saved data position is of {len(cursor.tokens)} sources, data.sources has {len(self.packers)}: "
                "resume with the run's own data.sources"
            )
        taken, chosen = list(cursor.tokens), []
        for index in range(cursor.sequences, cursor.sequences + sequences):
            source = self.source_of(index)
            chosen.append(self.packers[source].sequence(taken[source], length))
            taken[source] += length
        after = Cursor(cursor.sequences + sequences, tuple(taken))
        return Step(tuple(chosen), sum(sequence.targets_count for sequence in chosen), after)


def open_data(
    config: DataConfig, *, vocab_size: int, split: Split = "train", cache_dir: str | Path | None = None
) -> Mixture:
    """The mixture that ``data`` in a configuration describes; ``python-stdlib`` is prepared if it is not there yet.

    vocab_size: the model's. Raises UsageError for unusable files or weights, data made with another tokenizer than
    ``data.tokenizer``, and a vocabulary beyond the model's.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    packers: list[Packer | TaskPacker] = []
    for entry in config.sources:
        if is_task(entry.path):
            task = open_task(entry.path, entry.options, seed=config.seed, split=split)
            task.source.check_vocabulary(vocab_size)
            packers.append(task)
            continue
        if entry.options:
            raise UsageError(f"data.sources: {entry.path} has no options; {entry.options} are a task's, as task:mqar")
        source = IndexedSource(ensure(entry.path, config.tokenizer, cache_dir))
        check_tokenizer(source, tokenizer)
        source.check_vocabulary(vocab_size)
        packers.append(Packer(source, seed=config.seed, holdout=config.holdout, split=split))
    return Mixture(packers, [entry.weight for entry in config.sources], seed=config.seed)


def check_tokenizer(source: IndexedSource, tokenizer: Tokenizer) -> None:
    """Raises UsageError where a source is known to be made with another tokenizer."""
    made = source.metadata
    if made and made.fingerprint != tokenizer.fingerprint:
        raise UsageError(
            f"data {source.prefix} was made with tokenizer {made.tokenizer!r}, which is not data.tokenizer="
            f"{tokenizer.name!r}: set data.tokenizer={made.tokenizer}, or prepare the text again"
        )
