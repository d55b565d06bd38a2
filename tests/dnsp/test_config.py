"""Configuration: every slip is answered with the value, the rule and the nearest valid name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dnsp.begin import check_configuration, check_data
from dnsp.config import Config, load_config, parse_config
from dnsp.data.tokenizer import load_tokenizer
from dnsp.errors import UsageError
from dnsp.parallel.errors import PlanError
from dnsp.schedule import check_ranks, learning_rate, said_behind, spans
from tests.ranks import run_ranks

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

# override, what the refusal must say
SLIPS = [
    ("train.stpes=3", "unknown key 'train.stpes'; did you mean 'train.steps'?"),
    ("trian.steps=3", "unknown key 'trian'; did you mean 'train'?"),
    ("steps=3", "unknown key 'steps'; did you mean 'train.steps'?"),
    ("sequence_length=4", "did you mean 'data.sequence_length'?"),
    ("tokens=4", "did you mean 'generate.tokens'?"),
    ("data.sequence_lenght=64", "did you mean 'data.sequence_length'?"),
    ("data.sources=[{path: a, wieght: 2}]", "did you mean 'data.sources.weight'?"),
    ("train.steps=abc", "train.steps='abc': must be a valid integer"),
    ("train.steps=1.5", "train.steps=1.5"),
    ("train.steps=true", "train.steps=True"),
    ("train.steps=0", "train.steps=0: must be greater than 0"),
    ("train.lr=-1", "train.lr=-1: must be greater than 0"),
    ("train.lr=.inf", "train.lr=inf: must be a finite number"),
    ("train.weight_decay=.nan", "train.weight_decay=nan: must be a finite number"),
    ("train.betas=[2, 3]", "train.betas.0=2: must be less than 1"),
    ("train.betas=[0.9, .nan]", "train.betas.1=nan: must be a finite number"),
    ("train.betas=[0.9]", "train.betas"),
    ("train.betas=0.9", "train.betas=0.9: must be a list, for example train.betas=[0.9, 0.95]"),
    ("train.stages.0.tokens=5", "train.stages={'0': {'tokens': 5}}: must be a list, for example train.stages='[{"),
    ("data.sources={path: x}", "must be a list, for example data.sources='[{path: python-stdlib}]'"),
    ("model.pattern=attention", "model.pattern='attention': must be a list"),
    ("train.lr={a: 1}", "train.lr={'a': 1}: must be a valid number"),
    ("parallel.layout=zigzagg", "must be 'contiguous' or 'zigzag'; did you mean 'zigzag'?"),
    ("engine.zero_stage=7", "engine.zero_stage=7: must be 0"),
    ("model=3", "model=3: expected a mapping of keys"),
    ("train.steps.x=1", "'steps' is a single value"),
    ("train.stages=[{tokens: 3}]", "train.stages.0.sequence_length: this key is required"),
    ("train.steps", "'train.steps' is not an override; write key=value"),
    ("model.pattern=[atention]", "did you mean 'attention'?"),
    ("model.num_attention_heads=3", "num_attention_heads"),
    ("train.steps=[", "not valid YAML"),
]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "some.yaml"
    path.write_text("train: {steps: 10}\ndata: {sequence_length: 512}\n")
    return path


@pytest.mark.parametrize(("override", "said"), SLIPS)
def test_slips_are_named(config_file: Path, override: str, said: str) -> None:
    with pytest.raises(UsageError) as refusal:
        load_config(config_file, [override])
    text = str(refusal.value)
    assert said in text
    assert len(text.splitlines()) == 1
    assert len(text) < 300


@pytest.mark.parametrize(
    ("content", "said"),
    [("train: [", "not valid YAML"), ("- 1", "holds a list"), (None, "No such file"), ("tarin: {}", "'train'")],
)
def test_bad_files(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "bad.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=said):
        load_config(path)


def test_overrides_reach_lists_sections_and_floats(config_file: Path) -> None:
    sources = ["data.sources=[{path: a}, {path: b}]", "data.sources.1.weight=3e-1"]
    config = load_config(config_file, [*sources, "eval.every=5", "run.dir=x=y"])
    assert [source.weight for source in config.data.sources] == [1.0, 0.3]
    assert (config.eval.every, config.train.steps, config.run.dir) == (5, 10, "x=y")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configurations_that_come_along_load(path: Path) -> None:
    config = load_config(path)
    assert spans(config)


def test_there_are_five_of_them() -> None:
    found = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert found >= {"quickstart", "1b_32k", "1b_128k", "8b_1m", "extend_128k"}
    assert load_config(CONFIGS / "quickstart.yaml").data.sequence_length >= 8192


def test_a_dumped_configuration_is_itself() -> None:
    config = Config()
    assert Config.model_validate(config.model_dump(mode="json")) == config


def test_stages_become_steps(config_file: Path) -> None:
    second = "{sequence_length: 400, tokens: 1700, rope_theta: 5e5}"
    stages = [f"train.stages=[{{sequence_length: 100, tokens: 1000}}, {second}]", "train.global_batch=2"]
    whole = spans(load_config(config_file, [*stages, "train.steps=null"]))
    assert [(s.start, s.stop, s.sequence_length) for s in whole] == [(0, 5, 100), (5, 8, 400)]
    assert [s.rope_theta for s in whole] == [10_000.0, 5e5]
    assert {(s.micro_batch, s.global_batch, s.setting) for s in whole} == {(1, 2, "train")}
    batches = f"train.stages=[{{sequence_length: 100, tokens: 1000, global_batch: 4, micro_batch: 2}}, {second}]"
    short, long = spans(load_config(config_file, [batches, "train.global_batch=1", "train.steps=null"]))
    assert (short.stop, short.tokens, short.setting) == (3, 400, "train.stages[0]")
    assert (long.stop, long.tokens, long.setting) == (3 + 5, 400, "train")
    assert said_behind([short, long], 5) == "3 of 4 x 100 tokens and 2 of 1 x 400 tokens"
    assert said_behind(whole, 3) == "3 of 2 x 100 tokens"
    own = short.of(load_config(config_file, [batches])).train
    assert (own.micro_batch, own.global_batch) == (2, 4)
    assert [s.stop for s in spans(load_config(config_file, [*stages, "train.steps=20"]))] == [5, 20]
    assert [s.stop for s in spans(load_config(config_file, [*stages, "train.steps=4"]))] == [4]
    assert [s.stop for s in spans(load_config(config_file, stages[:1]))] == [10]  # the file's, not the stages'
    assert [s.stop for s in spans(load_config(config_file, ["train.steps=null"]))] == [100]
    assert Config().train.steps is None


def test_the_default_model_holds_the_default_tokenizer() -> None:
    assert Config().model.vocab_size == load_tokenizer(Config().data.tokenizer).vocab_size


def test_learning_rates(config_file: Path) -> None:
    cosine = load_config(config_file, ["train.lr=1", "train.warmup_steps=4", "train.min_lr_ratio=0.1"]).train
    rates = [learning_rate(step, 20, cosine) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0 and rates[12] == pytest.approx(0.55) and 0.1 < rates[-1] < 0.12
    assert all(a >= b for a, b in zip(rates[4:], rates[5:], strict=False))
    wsd = load_config(config_file, ["train.lr=1", "train.warmup_steps=4", "train.schedule=wsd"]).train
    rates = [learning_rate(step, 20, wsd) for step in range(20)]
    assert rates[3:17] == [1.0] * 14 and rates[-1] == pytest.approx(0.1 + 0.9 * 0.25)


def of_data(tokenizer: str, *weights: float) -> dict[str, Any]:
    return {"tokenizer": tokenizer, "data": {"sources": [{"contents": "a text", "weight": w} for w in weights]}}


MINE = {"config": {"model": {"vocab_size": 257}}, "identity": of_data("bytes", 1.0, 1.0)}
OTHERS = [  # what the last of three ranks has, and what all are told
    ({"config": {"model": {"vocab_size": 258}}}, "the run: model.vocab_size is 257 on rank 0 and 258 on rank 2"),
    ({"config": {"parallel": {"sequence": 3}}}, "the run: parallel.sequence is None on rank 0 and 3 on rank 2"),
    ({"config": {"checkpoint": {"every": 2}}}, "the run: checkpoint.every is 0 on rank 0 and 2 on rank 2"),
    ({"config": {"run": {"dir": "here", "timeout": 31}}}, "the run: run.timeout is 25.0 on rank 0 and 31.0 on rank 2"),
    ({"config": {"run": {"dir": "here"}, "data": {"sources": [{"path": "here"}]}}}, None),
    (
        {"identity": of_data("bytes", 1.0, 2.0)},
        "the data: the weight of data.sources[1] is 1.0 on rank 0 and 2.0 on rank 2",
    ),
    ({"identity": of_data("words", 1.0, 1.0)}, "the data: the tokenizer is bytes on rank 0 and words on rank 2"),
    ({}, None),
]


def told_apart() -> list[str | None]:
    told = list[str | None]()
    for other, _ in OTHERS:
        mine = other if dist.get_rank() == 2 else {}
        try:
            check_configuration(parse_config(MINE["config"] | mine.get("config", {}), "the test"))
            check_data(mine.get("identity", MINE["identity"]))
            told.append(None)
        except PlanError as refused:
            told.append(str(refused))
    return told


def test_hosts_with_other_configurations_are_refused_on_every_rank() -> None:
    said = "the ranks disagree about {}; give every rank of a group the same"
    for told in run_ranks(told_apart, 3, timeout=60):
        assert told == [words and said.format(words) for _, words in OTHERS]


def test_a_stage_whose_batch_does_not_go_up_is_named(config_file: Path) -> None:
    stages = "train.stages=[{sequence_length: 256, tokens: 9}, {sequence_length: 512, tokens: 9, global_batch: 6}]"
    config = load_config(config_file, [stages, "train.micro_batch=2", "train.global_batch=8", "parallel.sequence=1"])
    check_ranks(config, 1)
    with pytest.raises(UsageError, match=r"train.stages\[1\].global_batch=6 is not .*: use a multiple of 8"):
        check_ranks(config, 4)
