"""What may vary from machine to machine is chosen once: by rank 0, taken by all ranks, kept in the checkpoint."""

from __future__ import annotations

import torch

from dnsp.checkpoint import Checkpoint
from dnsp.config import Config
from dnsp.parallel.attention_backends import REPEATABLE, Heads, choose, unusable


def attention(config: Config, found: Checkpoint | None) -> tuple[str, str]:
    """What computes attention in a run, by its name, and in words why nothing faster does.

    That of the checkpoint which the run goes on from, where it works here too and the configuration names no other.

    Raises: PlanError where the configuration asks for one that cannot be used.
    """
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
    before = found.state.get("attention_backend") if found and settings.attention_backend == "auto" else None
    if before and not (repeat and before in REPEATABLE) and unusable(before, heads) is None:
        return before, ""
    backend, why = choose(heads, settings.attention_backend, repeat)
    return backend.name, why
