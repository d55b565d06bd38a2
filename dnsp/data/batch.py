"""A micro-batch for one rank: its rows, and of each row its own intervals alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dnsp.data.mix import Step
from dnsp.data.pack import IGNORE, check_ids
from dnsp.errors import UsageError
from dnsp.parallel.plan import to_device


@dataclass(frozen=True)
class Batch:
    """B rows, T local tokens: the intervals one after the other, in increasing order."""

    tokens_BT: Tensor  # int64
    targets_BT: Tensor  # int64, -100 where nothing is predicted
    doc_starts: list[list[int]]  # of each row, over the whole sequence: index of each document's first token

    @property
    def asked_N(self) -> Tensor | None:
        """Indices, of the B times T tokens, of those with a target, where they are at most half; else None.

        Found on the host: the loss then does without the others' logits, and nobody waits for a number of the GPU's.
        """
        asked = (self.targets_BT != IGNORE).flatten()
        return asked.nonzero().flatten() if 2 * int(asked.count_nonzero()) <= len(asked) else None

    def to(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens, targets and ``asked_N`` on a device; the host does not wait for the copies."""
        asked_N = self.asked_N
        return (
            to_device(self.tokens_BT, device),
            to_device(self.targets_BT, device),
            None if asked_N is None else to_device(asked_N, device),
        )


def micro_batches(global_batch: int, micro_batch: int, data_size: int, setting: str = "train") -> int:
    """Micro-batches that every data rank runs in one optimizer step (gradient accumulation).

    Raises UsageError where that is not a whole number; ``setting`` has both.
    """
    rows = micro_batch * data_size
    if global_batch < 1 or micro_batch < 1 or global_batch % rows:
        raise UsageError(
            f"{setting}.global_batch={global_batch} is not a multiple of {setting}.micro_batch={micro_batch} times "
            f"{data_size} data-parallel ranks: use a multiple of {max(rows, 1)}"
        )
    return global_batch // rows


def batch(
    step: Step,
    micro: int,
    *,
    micro_batch: int,
    data_rank: int,
    data_size: int,
    intervals: Sequence[tuple[int, int]],
    vocab_size: int,
) -> Batch:
    """Micro-batch ``micro`` of an optimizer step, as one rank sees it.

    intervals: (start, stop) token indices of this rank's part of every sequence, in increasing order.
    Reads those tokens and one after each interval, for the target across the cut.
    Raises RunError for an id that is not below ``vocab_size``.
    """
    first = (micro * data_size + data_rank) * micro_batch
    rows = step.sequences[first : first + micro_batch]
    tokens_BT, targets_BT = [], []
    for sequence in rows:
        parts = [sequence.tokens_and_targets(start, stop) for start, stop in intervals]
        tokens_T, targets_T = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
        tokens_BT.append(tokens_T)
        targets_BT.append(targets_T)
    whole_BT = np.stack(tokens_BT)
    if int(whole_BT.max()) >= vocab_size or int(whole_BT.min()) < 0:
        for tokens_T, sequence in zip(tokens_BT, rows, strict=True):
            check_ids(tokens_T, vocab_size, sequence.source)
    return Batch(
        torch.from_numpy(whole_BT),
        torch.from_numpy(np.stack(targets_BT)),
        [sequence.doc_starts for sequence in rows],
    )
