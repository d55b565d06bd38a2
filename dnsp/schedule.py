"""What changes over the steps of a run: the learning rate, the length of the context, and how many sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dnsp.config import Config, TrainConfig
from dnsp.errors import UsageError
from dnsp.parallel.layout import Layout

DEFAULT_STEPS = 100  # where neither train.steps nor train.stages says


@dataclass(frozen=True)
class Span:
    """Steps ``start`` to ``stop`` at one context length and batch, by ``setting`` (for messages)."""

    start: int
    stop: int
    sequence_length: int
    rope_theta: float
    micro_batch: int
    global_batch: int
    setting: str = "train"

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.sequence_length * self.global_batch

    @property
    def shape(self) -> tuple[int, int]:
        """Of a micro-batch: rows and tokens."""
        return self.micro_batch, self.sequence_length

    def of(self, config: Config) -> Config:
        """The configuration as it is in these steps: with their batches."""
        batches = {"micro_batch": self.micro_batch, "global_batch": self.global_batch}
        return config.model_copy(update={"train": config.train.model_copy(update=batches)})


def spans(config: Config) -> list[Span]:
    """The run's stages as steps, in order; without ``train.stages`` there is one.

    A stage's tokens are rounded up to whole steps. ``train.steps`` above the stages' sum lengthens the last one, below
    it ends the run early.
    """
    settings, theta = config.train, config.model.rope_theta
    batches = settings.micro_batch, settings.global_batch
    if not settings.stages:
        steps = DEFAULT_STEPS if settings.steps is None else settings.steps
        return [Span(0, steps, config.data.sequence_length, theta, *batches)]
    found: list[Span] = []
    for n, stage in enumerate(settings.stages):
        start = found[-1].stop if found else 0
        theta = stage.rope_theta or theta
        micro, whole = stage.micro_batch or settings.micro_batch, stage.global_batch or settings.global_batch
        steps = math.ceil(stage.tokens / (stage.sequence_length * whole))
        where = "train" if (micro, whole) == batches else f"train.stages[{n}]"
        found.append(Span(start, start + steps, stage.sequence_length, theta, micro, whole, where))
    if settings.steps is None:
        return found
    last = found[-1]
    found[-1] = replace(last, stop=max(last.stop, settings.steps))
    return [replace(span, stop=min(span.stop, settings.steps)) for span in found if span.start < settings.steps]


def said_behind(stages: Sequence[Span], step: int) -> str:
    """The steps up to ``step`` in words."""
    parts: list[list[int]] = []  # steps, sequences a step, tokens of each
    for span in stages:
        steps = min(span.stop, step) - span.start
        if parts and parts[-1][1:] == [span.global_batch, span.sequence_length]:
            parts[-1][0] += max(0, steps)
        elif steps > 0:
            parts.append([steps, span.global_batch, span.sequence_length])
    return " and ".join(f"{steps:,} of {rows:,} x {tokens:,} tokens" for steps, rows, tokens in parts)


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Of step ``step`` (from 0) of ``steps``: linear warm-up, then a cosine (Loshchilov & Hutter 2017), or a plateau
    with a linear decay over the last ``decay_fraction`` (Hu et al. 2024), down to ``min_lr_ratio``.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    else:
        decay = max(1, round(steps * config.decay_fraction))
        share = min(1.0, (steps - step) / decay) if config.decay_fraction else 1.0
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * share)


def check_ranks(config: Config, ranks: int) -> None:
    """Refuse what can be known to fail before the ranks meet: a world that sequence x data does not make, and so on."""
    sequence = config.parallel.sequence or ranks
    if ranks % sequence:
        raise UsageError(
            f"parallel.sequence={sequence} does not divide {ranks} ranks; "
            f"take a multiple of {sequence} ranks or another size"
        )
    for span in spans(config):
        rows = span.micro_batch * (ranks // sequence)
        if span.global_batch % rows:
            raise UsageError(
                f"{span.setting}.global_batch={span.global_batch} is not a multiple of "
                f"{span.setting}.micro_batch={span.micro_batch} times {ranks // sequence} data-parallel ranks "
                f"({ranks} ranks / parallel.sequence={sequence}): use a multiple of {rows}"
            )
        Layout(config.parallel.layout, sequence, span.sequence_length)
