"""``dnsp verify`` passes what is right, and every way that is known to be silently wrong fails it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from torch import Tensor

from dnsp import verify
from dnsp.cli import main
from dnsp.config import load_config
from dnsp.kernels.scan import Coming
from dnsp.launch.environment import Environment
from tests.ranks import run_ranks

# All four kinds of layers, short convolutions, packed documents, grouped heads; small enough for seconds.
TINY = {
    "model": {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "pattern": ["gated_delta", "deltanet", "linear_attention", "attention"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 8,
        "deltanet": {"num_heads": 2, "forget_gate": True, "conv_size": 3},
    },
    "data": {"sequence_length": 1024},
}
CASE_KEYS = {
    *("ranks", "sequence", "zero", "layout", "transport", "loss", "loss_rel_err", "worst_param", "worst_grad_rel_err"),
    *("delta_bitwise_equal", "ok"),
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    return file


def verified(config: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    report = config.with_suffix(".json")
    with patch.dict(os.environ, OMP_NUM_THREADS="1"):
        status = main(["verify", str(config), *arguments, "--json", str(report)])
    return status, json.loads(report.read_text())


@pytest.mark.slow
def test_two_ranks_equal_one_process(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = verified(config, "--ranks", "1,2")
    cases = report["cases"]
    assert status == 0 and report["ok"]
    asked = {(r, kind, t) for r in (1, 2) for kind in ("contiguous", "zigzag") for t in ("p2p", "gather")}
    assert [(c["ranks"], c["layout"], c["transport"]) for c in cases] == sorted(asked, key=_order)
    for case in cases:
        assert set(case) == CASE_KEYS
        assert case["ok"] and case["delta_bitwise_equal"]
        assert case["worst_grad_rel_err"] <= 5e-5 and case["loss_rel_err"] <= 5e-6
    assert any(c["worst_grad_rel_err"] > 0 for c in cases if c["ranks"] == 2)  # something was compared
    assert "zigzag" in capsys.readouterr().out


def _order(case: tuple[int, str, str]) -> tuple[int, str, bool]:
    return case[0], case[1], case[2] != "p2p"


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], ["engine.zero_stage=1", "engine.activation_checkpointing=true"]])
def test_four_ranks_equal_one_process(config: Path, extra: list[str]) -> None:
    status, report = verified(config, "--ranks", "4", *extra)
    assert status == 0 and len(report["cases"]) == 4


@pytest.mark.slow
def test_data_parallel_groups_and_accumulation_equal_one_process(config: Path) -> None:
    """One rank, a sequence group of two, and two of them: two sequences a step, in two micro-batches or in one."""
    only = ("--layouts", "zigzag", "--transports", "p2p")
    status, report = verified(config, "parallel.sequence=2", "--ranks", "1,2,4", *only)
    assert status == 0 and [c["ranks"] for c in report["cases"]] == [1, 2, 4]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_stage_in_groups_of_every_size_equals_one_process(config: Path) -> None:
    """Each world is started once. Weights are in shards too, which DeepSpeed leaves whole below 100,000 elements."""
    small = ("model.pattern=[gated_delta, attention]", "model.num_hidden_layers=2", "data.sequence_length=512")
    sharded = "engine.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"
    every = ("--ranks", "2,4", "--zero", "0,1,2,3", "--sequence", "1,2,4", "--transports", "p2p")
    status, report = verified(config, *every, *small, sharded)
    sizes = {2: (1, 2), 4: (1, 2, 4)}
    asked = [
        (ranks, size, stage, layout)
        for ranks in (2, 4)
        for size in sizes[ranks]
        for stage in range(4)
        for layout in ("contiguous", "zigzag")
    ]
    assert status == 0
    assert [(c["ranks"], c["sequence"], c["zero"], c["layout"]) for c in report["cases"]] == asked
    assert max(c["worst_grad_rel_err"] for c in report["cases"]) <= 5e-5


@pytest.mark.slow
def test_bf16_is_no_worse_than_one_process_in_bf16(config: Path) -> None:
    status, report = verified(config, "--ranks", "2", "--dtype", "bf16")
    assert status == 0 and report["dtype"] == "bf16"
    assert all(1e-4 < c["worst_grad_rel_err"] < 0.1 and c["delta_bitwise_equal"] for c in report["cases"])


# What is broken on purpose. Each is a mistake that trains without a word.


@contextmanager
def state_restarted_at_each_shard() -> Iterator[None]:
    from dnsp.parallel.scan import ParallelScan

    original = ParallelScan.forward

    def forward(self: ParallelScan, *args: Any) -> Coming:
        incoming, final = original(self, *args)()
        incoming = incoming.clone()
        incoming[:: self.per_interval] = 0
        return lambda: (incoming, final)

    with patch.object(ParallelScan, "forward", forward):
        yield


@contextmanager
def state_gradient_not_sent_back() -> Iterator[None]:
    from dnsp.parallel.scan import ParallelScan

    original = ParallelScan.reverse

    def reverse(self: ParallelScan, *args: Any) -> Coming:
        outgoing, initial = original(self, *args)()
        outgoing = outgoing.clone()
        outgoing[self.per_interval - 1 :: self.per_interval] = 0
        return lambda: (outgoing, initial)

    with patch.object(ParallelScan, "reverse", reverse):
        yield


@contextmanager
def halo_missing() -> Iterator[None]:
    from dnsp.parallel import halo

    original = halo._shift

    def shift(parts: list[torch.Tensor], plan: Any, step: int) -> torch.Tensor:
        arrived = original(parts, plan, step)
        return torch.zeros_like(arrived) if step == 1 else arrived

    with patch.object(halo, "_shift", shift):
        yield


@contextmanager
def positions_counted_from_the_shard() -> Iterator[None]:
    original = verify.make_plan

    def make_plan(*args: Any, **options: Any) -> Any:
        plan = original(*args, **options)
        local = torch.arange(plan.local_tokens, dtype=torch.int32).expand_as(plan.position_BT)
        return dataclasses.replace(plan, position_BT=local)

    with patch.object(verify, "make_plan", make_plan):
        yield


@contextmanager
def loss_averaged_over_local_targets() -> Iterator[None]:
    from dnsp.engine import Engine

    original = Engine.backward

    def backward(self: Engine, tokens: Tensor, targets: Tensor, plan: Any, _: int, asked: Any = None) -> Tensor:
        local = int((targets != -100).sum()) * self.grid.sequence_size
        return original(self, tokens, targets, plan, local, asked)

    with patch.object(Engine, "backward", backward):
        yield


MISTAKES: dict[str, Any] = {
    "none": nullcontext,
    "state restarted at each shard": state_restarted_at_each_shard,
    "state's gradient not sent back": state_gradient_not_sent_back,
    "halo missing": halo_missing,
    "positions counted from the shard": positions_counted_from_the_shard,
    "loss averaged over local targets": loss_averaged_over_local_targets,
}


def rank_with_mistakes(folder: str) -> dict[str, list[dict[str, Any]]]:
    """Every mistake in turn, in one start; the process group is the helper's."""
    request = verify.Request.load(Path(folder))
    truth = torch.load(Path(folder) / verify.TRUTH, weights_only=False)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = Environment("local", rank, world, rank, world, "127.0.0.1", 0)
    verdicts = {}
    with patch.object(verify.watchdog, "join"), patch.object(verify.watchdog, "leave"):
        for name, mistake in MISTAKES.items():
            broken: AbstractContextManager[None] = mistake()
            with broken:
                verdicts[name] = [dataclasses.asdict(case) for case in verify.check_world(request, place, truth)]
    return verdicts


def test_what_is_silently_wrong_fails(config: Path, tmp_path: Path) -> None:
    request = verify.make_request(load_config(config), [2], ["contiguous", "zigzag"], ["p2p"], "fp32")
    request.save(tmp_path)
    torch.save(verify.find_truth(request), tmp_path / verify.TRUTH)
    first, second = run_ranks(rank_with_mistakes, 2, str(tmp_path))
    assert first == second  # all ranks come to the same verdict
    failed = {name: [case for case in cases if not case["ok"]] for name, cases in first.items()}
    assert not failed.pop("none")
    assert {name: len(cases) for name, cases in failed.items()} == {name: 2 for name in failed}
    assert not any(case["delta_bitwise_equal"] for case in failed["state restarted at each shard"])
    assert not any(case["delta_bitwise_equal"] for case in failed["state's gradient not sent back"])
    assert all(case["delta_bitwise_equal"] for case in failed["halo missing"])


@pytest.mark.parametrize("wrong", [False, True])
def test_the_verdict_is_a_table_a_file_and_a_status(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: bool
) -> None:
    request = verify.make_request(load_config(config), [2], ["zigzag"], ["p2p", "gather"], "fp32")
    good = verify.Case(2, 2, 0, "zigzag", "p2p", 5.5, 1e-8, "model.norm.weight", 1e-6, True, True)
    other = dataclasses.replace(good, transport="gather", delta_bitwise_equal=not wrong, ok=not wrong)
    other = dataclasses.replace(other, worst_grad_rel_err=math.inf) if wrong else other
    assert verify.conclude(request, [good, other], tmp_path / "verdict.json") == int(wrong)
    report = json.loads((tmp_path / "verdict.json").read_text(), parse_constant=pytest.fail)
    assert (report["cases"][1]["worst_grad_rel_err"] is None) == wrong
    assert report["ok"] is not wrong and [case["ok"] for case in report["cases"]] == [True, not wrong]
    assert all(set(case) == CASE_KEYS for case in report["cases"])
    shown = capsys.readouterr().out
    assert ("1 of 2 hold" if wrong else "2 of 2 hold") in shown
    assert "5.50000" in shown and ("differs" in shown) == wrong and ("FAIL" in shown) == wrong


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", "3"], "1024"),  # 1,024 tokens do not divide
        (["--ranks", "two"], "'two'"),
        (["--layouts", "zigzig"], "contiguous, zigzag"),
        (["--dtype", "fp8"], "fp32, bf16"),
        (["--zero", "4"], "0, 1, 2, 3"),
        (["--ranks", "2", "--sequence", "3"], "none of --sequence 3 divides it"),
        (["--ranks", "3", "parallel.sequence=2"], "parallel.sequence=2"),
    ],
)
def test_what_cannot_be_checked_is_refused_at_once(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["verify", str(config), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) <= 2


def test_bf16_is_judged_over_the_whole_gradient_and_over_tensors() -> None:
    gradients = {"large": torch.full((10,), 3.0), "middle": torch.ones(5), "two": torch.full((2,), 1e-6)}
    truth = verify.Truth(1.0, gradients, {"large": 0.01, "middle": 0.01, "two": 0.02}, [], [])

    def near(large: float, middle: float, two: float) -> bool:
        return verify._as_near_in_bf16(truth, {"large": large, "middle": middle, "two": two})

    assert near(0.01, 0.01, 0.02)
    assert near(0.011, 0.009, 0.03)  # two numbers more or less
    assert not near(0.013, 0.01, 0.02)  # the whole
    assert not near(0.011, 0.015, 0.03)  # most tensors, though the large one keeps the whole near
    assert not near(0.01, 0.01, 0.9)  # a small one, wrong
    assert not near(0.01, float("inf"), 0.02)


def test_relative_error() -> None:
    zero, one = torch.zeros(3), torch.ones(3)
    assert verify.relative_error(zero, zero) == 0
    assert verify.relative_error(one, zero) == float("inf")  # where the truth is zero only zero is right
    assert verify.relative_error(one * float("nan"), one) == float("inf")
    assert verify.relative_error(one * 1.5, one) == pytest.approx(0.5)
