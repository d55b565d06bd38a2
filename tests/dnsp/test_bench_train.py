"""``dnsp bench train`` at a small shape: both sides from the same weights, figures that add up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dnsp.bench import train as bench
from dnsp.config import parse_config
from dnsp.errors import UsageError
from dnsp.flops import state_flops, step_flops
from dnsp.model.decoder import Decoder

SMALL = [
    "model.vocab_size=300",
    "model.hidden_size=64",
    "model.intermediate_size=96",
    "model.num_hidden_layers=4",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=1",
    "model.head_dim=64",
    "model.linear_num_key_heads=1",
    "model.linear_num_value_heads=2",
    "model.linear_key_head_dim=64",
    "model.linear_value_head_dim=64",
]


def measured(tmp_path: Path, *overrides: str, **options) -> tuple[int, dict]:
    file = tmp_path / "figures.json"
    status = bench.run([*SMALL, *overrides], tokens=256, steps=1, json_path=file, **options)
    return status, json.loads(file.read_text())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_both_sides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    status, report = measured(tmp_path, "engine.dtype=fp32", "train.micro_batch=2", profile=tmp_path / "profile.txt")
    assert status == 0 and report["losses_agree"] and report["loss_difference"] < 1e-5
    ours, peer = report["ours"], report["peer"]
    assert (ours["name"], peer["name"]) == ("dnsp", "transformers")
    assert ours["tokens_per_s"] == pytest.approx(2 * 256 / ours["step_s"])
    assert report["tokens_per_s_ratio"] == pytest.approx(ours["tokens_per_s"] / peer["tokens_per_s"])
    said = capsys.readouterr().out
    assert "attention by" in said and "transformers" in said and "tokens/s" in said
    assert "aten::mm" in (tmp_path / "profile.txt").read_text()


def test_ours_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = measured(tmp_path, only_ours=True)
    assert status == 0 and report["peer"] is None and report["peer_missing"] == "not asked for"
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    status, report = measured(tmp_path)
    assert status == 0 and report["peer"] is None
    assert "transformers is not installed" in capsys.readouterr().out


def test_sides_that_do_not_compute_the_same_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(config, ours, device, console):
        side = bench._ours(config, device, console)
        plain = side.loss
        side.loss = lambda: 1.1 * plain()
        return side

    monkeypatch.setattr(bench, "_peer", other)
    status, report = measured(tmp_path)
    assert status == 1 and not report["losses_agree"]
    assert report["loss_difference"] == pytest.approx(0.1 / 1.1, rel=1e-2)


def test_model_flops_are_those_of_the_known_figures() -> None:
    """transformers on fla on an H200 (matrix products at 782 TFLOP/s): 25,300 tokens/s are an MFU of 0.33."""
    config = parse_config(bench.SHAPE, "the test").model
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Decoder(config).parameters())
    assert parameters == pytest.approx(1.13e9, rel=0.01)
    for tokens, speed, mfu in ((32_768, 25_300, 0.33), (131_072, 13_900, 0.35)):
        # those figures left the delta rule out
        flops = step_flops(config, parameters, [tokens]) - 3 * 12 * tokens * state_flops(config, "gated_delta")
        assert flops * speed / tokens / 782e12 == pytest.approx(mfu, abs=0.006)
    untied = config.model_copy(update={"tie_word_embeddings": False})
    both = parameters + config.vocab_size * config.hidden_size
    assert step_flops(untied, both, [4096]) == step_flops(config, parameters, [4096])


def test_slips() -> None:
    with pytest.raises(UsageError, match="did you mean 'model.num_hidden_layers'"):
        bench.run(["model.num_hiden_layers=3"])
    with pytest.raises(UsageError, match="--steps 0: at least one"):
        bench.run([], steps=0)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    status, report = measured(tmp_path, only_ours=True)
    assert status == 0 and 0 < report["ours"]["mfu"] < 1
    assert report["ours"]["peak_gib"] == pytest.approx(report["ours"]["held_gib"] + report["ours"]["activation_gib"])
    status, offloaded = measured(tmp_path, "engine.activation_offloading=true", only_ours=True)
    assert status == 0 and offloaded["ours"]["loss"] == report["ours"]["loss"]
