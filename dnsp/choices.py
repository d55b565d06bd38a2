"""What may vary from machine to machine is chosen once: by rank 0, taken by all ranks, kept in the checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from dnsp.config import Config
from dnsp.parallel.attention_backends import REPEATABLE, Heads, choose, unusable
from dnsp.parallel.layout import Layout
from dnsp.parallel.plan import filling_segment_tokens

MULTIPROCESSORS = 132  # of an H100 or H200; where bits must not depend on the device


@dataclass(frozen=True)
class Choices:
    """``attention_backend``: of ``parallel/attention_backends.py``. ``multiprocessors``: that the delta rule's segments
    are to fill; 0 on a CPU, where one segment an interval is the fewest summaries."""

    attention_backend: str = "auto"
    multiprocessors: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def segment_tokens(self, config: Config, layout: Layout) -> int | None:
        """Tokens of the delta rule's segments; None: one segment an interval."""
        if config.parallel.segment_tokens is not None or not self.multiprocessors:
            return config.parallel.segment_tokens
        model, rows = config.model, config.train.micro_batch
        heads, width = model.linear_num_value_heads, model.linear_value_head_dim
        return filling(layout, rows, heads, width, self.multiprocessors)


def filling(layout: Layout, rows: int, value_heads: int, value_width: int, multiprocessors: int) -> int:
    """Tokens of segments that fill a GPU."""
    return filling_segment_tokens(layout, rows * value_heads * max(1, value_width // 64), multiprocessors)


def make_choices(config: Config, before: dict[str, Any] | None = None) -> tuple[Choices, str]:
    """What this machine is given, and in words why attention is not computed by something faster.

    ``before``: the choices of the run that goes on; they are kept where they work here, too, and the configuration
    names no others.

    Raises: PlanError where the configuration asks for what cannot be used.
    """
    before = before or {}
    backend, why = _attention(config, before.get("attention_backend"))
    if not torch.cuda.is_available():
        return Choices(backend), why
    count = MULTIPROCESSORS if config.engine.deterministic else torch.cuda.get_device_properties().multi_processor_count
    return Choices(backend, before.get("multiprocessors") or count), why


def _attention(config: Config, before: str | None) -> tuple[str, str]:
    model, settings, repeat = config.model, config.parallel, config.engine.deterministic
    if "attention" not in model.layers:
        return settings.attention_backend, ""
    heads = Heads(
        torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu"),
        torch.bfloat16 if config.engine.dtype == "bf16" else torch.float32,
        model.num_attention_heads,
        model.num_key_value_heads,
        model.head_dim,
        model.head_dim,
    )
    keeps = before and settings.attention_backend == "auto" and not (repeat and before in REPEATABLE)
    if before and keeps and unusable(before, heads) is None:
        return before, ""
    backend, why = choose(heads, settings.attention_backend, repeat)
    return backend.name, why
