"""What a run chooses once, and keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from dnsp import choices
from dnsp.checkpoint import Checkpoint
from dnsp.config import Config, parse_config
from dnsp.errors import UsageError
from dnsp.parallel.errors import PlanError


def config(**tree: dict) -> Config:
    return parse_config(tree, "the test")


def saved(**state: str) -> Checkpoint:
    return Checkpoint(Path("step-00000001"), state)


def test_attention_on_a_cpu() -> None:
    assert choices.attention(config(), None) == ("flash_cpu", "")
    assert choices.attention(config(parallel={"attention_backend": "plain"}), None) == ("plain", "")
    assert choices.attention(config(model={"pattern": ["gated_delta"]}), None) == ("auto", "")
    with pytest.raises(PlanError, match="attention_backend=cudnn: it is for cuda tensors, these are on cpu; use auto"):
        choices.attention(config(parallel={"attention_backend": "cudnn"}), None)


def test_a_run_goes_on_with_what_it_had_where_that_works() -> None:
    assert choices.attention(config(), saved(attention_backend="plain")) == ("plain", "")
    assert choices.attention(config(), saved(attention_backend="cudnn")) == ("flash_cpu", "")  # came from a GPU
    assert choices.attention(config(), saved()) == ("flash_cpu", "")  # written before there was a choice
    asked = config(parallel={"attention_backend": "flash_cpu"})
    assert choices.attention(asked, saved(attention_backend="plain")) == ("flash_cpu", "")


def test_offloading_needs_checkpointing() -> None:
    with pytest.raises(UsageError, match="engine.activation_checkpointing=false keeps everything; set it to true"):
        config(engine={"activation_offloading": True})
