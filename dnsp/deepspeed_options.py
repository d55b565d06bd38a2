"""DeepSpeed's own options in our YAML (``engine.deepspeed``): added to what is generated, never against it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from dnsp.errors import UsageError

# what dnsp decides by other means, whatever the value
DECIDED = {
    "gradient_accumulation_steps": "it follows from train.global_batch, train.micro_batch and the ranks",
    "optimizer": "the optimizer is AdamW with train.lr, train.betas, train.eps and train.weight_decay",
    "scheduler": "the learning rate is train.lr's, by train.schedule",
    "activation_checkpointing": "set engine.activation_checkpointing and engine.activation_offloading",
    "sequence_parallel_size": "set parallel.sequence",
}

# what has a key of ours: here it may only repeat it
SETTLED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_clipping",
    "zero_optimization.stage",
    "bf16.enabled",
    "fp16.enabled",
)


def contradiction(options: Mapping[str, Any], ours: Mapping[str, tuple[str, Any]]) -> str | None:
    """Why these options cannot be: which key, both values and the way out. None where they can.

    Args:
        options: nested, as in DeepSpeed's JSON.
        ours: dotted DeepSpeed key to (our key, the value that it has DeepSpeed use).
    """
    for key, value in leaves(options):
        top = key.split(".")[0]
        if top in DECIDED:
            return f"engine.deepspeed.{key}={value!r} is not DeepSpeed's to decide here: {DECIDED[top]}; remove it"
        if key in ours and ours[key][1] != value:
            name, wanted = ours[key]
            return (
                f"engine.deepspeed.{key}={_yaml(value)} contradicts {name}, which makes it {_yaml(wanted)}; remove "
                f"engine.deepspeed.{key}, or change {name}"
            )
    return None


def merged(generated: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The generated configuration with the options added; those of ``SETTLED`` say nothing new and are left out.

    Raises:
        UsageError: an option has another value than what was generated; the message names both.
    """
    result = copy.deepcopy(dict(generated))
    for key, value in leaves(options):
        if key in SETTLED:
            continue
        *parents, last = key.split(".")
        node = result
        for part in parents:
            node = node.setdefault(part, {})
        if node.get(last, value) != value:
            raise UsageError(
                f"engine.deepspeed.{key}={_yaml(value)} contradicts what dnsp needs there, {_yaml(node[last])}; "
                "remove it"
            )
        node[last] = value
    return result


def leaves(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every (dotted key, value)."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"
