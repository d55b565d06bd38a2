"""``dnsp export``: transformers loads the folder and computes the same, and ``init_from=hf:`` takes it back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from dnsp import checkpoint
from dnsp.cli import main
from dnsp.evaluate import load_run
from dnsp.parallel.plan import local_plan

LOGITS = 1e-5  # |ours - theirs| / |theirs|, fp32


@pytest.mark.timeout(200)
def test_an_exported_run_is_the_same_model(
    reference: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("fla", "causal_conv1d"):
        monkeypatch.setitem(sys.modules, name, None)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(workplace)
    assert main(["export", "reference", "exported"]) == 0
    model, _, found = load_run("reference")
    theirs = AutoModelForCausalLM.from_pretrained("exported")
    tokens = torch.randint(0, 257, (1, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = theirs(tokens).logits
        got = model.logits(model.hidden(tokens, local_plan([[0]], 100)))
    assert float((got - want).norm() / want.norm()) < LOGITS
    tokenizer, text = AutoTokenizer.from_pretrained("exported"), "delta\n\tgäte \u2603 <|x|>"
    assert tokenizer(text).input_ids == list(text.encode()) and tokenizer.eos_token_id == 256
    assert tokenizer.decode(list(text.encode())) == text

    assert main(["export", "reference", "exported"]) == 2
    assert "exists already" in capsys.readouterr().err
    settings = ("tiny.yaml", "run.dir=taken", "init_from=hf:exported", "train.steps=1", "train.lr=1e-30")
    assert main(["train", *settings, "train.weight_decay=0"]) == 0
    taken = checkpoint.latest(workplace / "taken")[0]
    assert taken is not None
    assert all(taken.weights()[name].equal(weight) for name, weight in found.weights().items())
    capsys.readouterr()
    assert main(["train", *settings, "run.dir=other", "model.hidden_size=64"]) == 2
    assert "hidden_size=32, the configuration has 64" in capsys.readouterr().err
