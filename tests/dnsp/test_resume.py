"""What a run goes on from, and what becomes of the rest: damaged, abandoned and missing checkpoints, shorter ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dnsp import checkpoint
from dnsp.cli import main
from dnsp.config import load_config
from dnsp.data.mix import open_data

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def branch(reference: Path, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the 12-step reference run, checkpoints at 8, 10 and 12, in a folder of its own with ``tiny.yaml``."""
    shutil.copy(workplace / "tiny.yaml", tmp_path)
    shutil.copytree(reference, tmp_path / "branch", ignore=shutil.ignore_patterns(".lock"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "branch"


def saved(run: Path) -> list[int]:
    return [checkpoint.read(path).step for path in checkpoint.checkpoints(run)]


def damage(run: Path, step: int) -> None:
    weights = run / "checkpoints" / f"step-{step:08d}" / "weights-00001-of-00002.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def test_a_damaged_checkpoint_is_replaced_by_the_step_done_again(branch: Path, capsys: Capture) -> None:
    damage(branch, 12)
    assert main(["train", "tiny.yaml", "run.dir=branch", "resume=auto"]) == 0
    said = capsys.readouterr().out
    assert "going on from step-00000010" in said and "is now aside-step-00000012" in said
    assert saved(branch) == [8, 10, 12]  # whole, all of them
    evaluations = [json.loads(line)["step"] for line in (branch / "evaluations.jsonl").read_text().splitlines()]
    assert evaluations == [4, 8, 12]  # once each


def test_another_course_from_an_earlier_checkpoint_is_what_is_left(branch: Path) -> None:
    old = dict(checkpoint.read(branch / "checkpoints" / "step-00000012").weights())
    earlier = "branch/checkpoints/step-00000010"
    assert main(["train", "tiny.yaml", "run.dir=branch", f"resume={earlier}", "train.lr=1e-5"]) == 0
    new = checkpoint.read(branch / "checkpoints" / "step-00000012").weights()
    assert any(not new[name].equal(old[name]) for name in old)
    aside = checkpoint.read(branch / "checkpoints" / "aside-step-00000012").weights()
    assert all(aside[name].equal(old[name]) for name in old)  # nothing is lost


def test_an_end_before_the_checkpoint_is_refused(branch: Path, capsys: Capture) -> None:
    assert main(["train", "tiny.yaml", "run.dir=branch", "resume=auto", "train.steps=6"]) == 2
    said = capsys.readouterr().err
    assert "step-00000012 is past train.steps=6" in said and "raise it" in said
    assert saved(branch) == [8, 10, 12]


def test_a_run_goes_on_without_the_one_it_began_from(branch: Path, dnsp: Callable[..., Any]) -> None:
    child = ("tiny.yaml", "run.dir=child", "init_from=run:branch")
    assert dnsp("train", *child, "train.steps=1", cwd=branch.parent).returncode == 0
    branch.rename(branch.with_name("gone"))
    assert main(["train", *child, "train.steps=2", "resume=auto"]) == 0
    assert saved(branch.with_name("child")) == [1, 2]


def test_a_run_that_begins_from_an_earlier_checkpoint_than_the_newest_says_so(branch: Path, capsys: Capture) -> None:
    damage(branch, 12)
    assert main(["train", "tiny.yaml", "run.dir=child", "init_from=run:branch", "train.steps=1"]) == 0
    said = capsys.readouterr().out
    assert said.count("step-00000012 is damaged: weights-00001-of-00002") == 1
    assert "does not match its checksum; beginning from step-00000010\n" in said


def test_eval_takes_the_length_the_run_was_at_and_no_token_twice(branch: Path, capsys: Capture) -> None:
    stages = "train.stages=[{sequence_length: 1024, tokens: 1024}]"
    assert main(["train", "tiny.yaml", "run.dir=staged", stages, "train.steps=null"]) == 0
    capsys.readouterr()
    assert main(["eval", "staged", "--json", "one.json"]) == 0
    assert "in sequences of 1,024" in capsys.readouterr().out
    assert main(["eval", "staged", "eval.sequences=100000", "--json", "all.json"]) == 0
    one, everything = (json.loads(Path(name).read_text())["tokens"] for name in ("one.json", "all.json"))
    config = load_config(Path("tiny.yaml"), [])
    (held_out,) = open_data(config.data, vocab_size=257, split="heldout").packers
    assert one < everything <= held_out.tokens


@pytest.mark.parametrize(
    ("setting", "variable", "words"),
    [
        ("generate.prompt=''", None, "generate.prompt is empty"),
        ("train.steps=2", "cuda", "DNSP_DELTA_RULE=cuda"),
        ("train.steps=2", "triton", "needs a GPU"),
    ],
)
def test_refused_before_anything_is_made(
    setting: str,
    variable: str | None,
    words: str,
    branch: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    tmp_path: Path,
) -> None:
    if variable is not None:
        monkeypatch.setenv("DNSP_DELTA_RULE", variable)
    assert main(["train", "tiny.yaml", "run.dir=new", "generate.tokens=5", setting]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
