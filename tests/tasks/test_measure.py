"""What trained models are asked: a perfect memory scores 100, and figures are those of a computation by hand."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dnsp import watchdog
from dnsp.config import Config, parse_config
from dnsp.data.batch import batch
from dnsp.data.mix import open_data
from dnsp.data.prepare import prepare
from dnsp.generate import Step, generate
from dnsp.model.decoder import Decoder
from dnsp.parallel.plan import local_plan
from dnsp.tasks.chunks import chunk
from dnsp.tasks.measure import measure
from dnsp.tasks.pitfalls import write
from dnsp.tasks.speed import ROUNDS, WARM_UP, _model, alone, decode, memory, speed
from dnsp.tasks.suite import model_tree

ERROR = 1e-5  # of a loss and of a hidden state, relative
BF16 = 2e-2  # of a hidden state in bf16
SIZES: dict[str, tuple[dict[str, Any], int]] = {
    "kv": ({"vocab": 64, "pairs": [4, 16]}, 80),
    "mqar": ({"vocab": 64, "pairs": [4, 16]}, 128),
    "copy": ({"vocab": 64}, 64),
}


class Memory(nn.Module):
    """A perfect memory of what a task asks, with a decoder's outside. ``wrong``: one id beside every answer."""

    def __init__(self, task: str, wrong: bool = False) -> None:
        super().__init__()
        self.task, self.wrong = task, wrong
        self.lm_head = nn.Linear(64, 64, bias=False)
        with torch.no_grad():
            self.lm_head.weight.copy_(40 * torch.eye(64))

    def answer(self, row: list[int], at: int) -> int:
        if self.task == "copy":
            return row[at - row.index(63)] if 63 in row[: at + 1] else 0
        first = row.index(row[at])  # a key stands first where its value follows
        return row[first + 1] if first + 1 <= at else 0

    def hidden(self, tokens_BT: Tensor, plan: Any) -> Tensor:
        answers = [[self.answer(row, at) for at in range(len(row))] for row in tokens_BT.tolist()]
        ids = (torch.tensor(answers) + self.wrong) % 64
        return nn.functional.one_hot(ids, 64).float()

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)


def settings(sources: list[dict[str, Any]], length: int, vocab: int = 64) -> Config:
    data = {"sources": sources, "sequence_length": length}
    return parse_config({"data": data, "model": {"vocab_size": vocab}}, "test")


@pytest.mark.parametrize("task", SIZES)
def test_a_perfect_memory_scores_100(task: str) -> None:
    options, length = SIZES[task]
    test = {"sources": [{"path": f"task:{task}", "options": options}], "length": length, "sequences": 70, "skip": 5}
    config = settings(test["sources"], length)
    right = measure(Memory(task), config, test)  # type: ignore[arg-type]
    assert right["accuracy"] == 100.0 and right["loss"] < 1e-6
    wrong = measure(Memory(task, wrong=True), config, test)  # type: ignore[arg-type]
    assert wrong["accuracy"] == 0.0 and wrong["loss"] == pytest.approx(40, rel=1e-3)
    assert right["targets"] == wrong["targets"] and (task != "copy" or right["targets"] == 70 * 32)


def test_figures_are_those_of_a_computation_by_hand(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the delta rule writes what it got wrong. " * 60)
    (tmp_path / "b.txt").write_text("another document of its own. " * 60)
    prepare(str(tmp_path), tmp_path / "data", "bytes")
    sources = [{"path": str(tmp_path / "data")}]
    config = settings(sources, 256, 257)
    torch.manual_seed(0)
    model = Decoder(parse_config({"model": model_tree("hybrid", 32, 257)}, "test").model)
    got = measure(model, config, {"sources": sources, "length": 256, "sequences": 3, "skip": 1})
    data = open_data(config.data, vocab_size=257, split="heldout")
    losses: list[float] = []
    right: list[bool] = []
    far: list[float] = []
    cursor = data.step(data.start, 256, 1).cursor
    for _ in range(3):
        step = data.step(cursor, 256, 1)
        cursor = step.cursor
        rows = batch(step, 0, micro_batch=1, data_rank=0, data_size=1, intervals=[(0, 256)], vocab_size=257)
        plan = local_plan(rows.doc_starts, 256)
        with torch.no_grad():
            chances = model.logits(model.hidden(rows.tokens_BT, plan)).double().softmax(-1)[0]
        for at, target in enumerate(rows.targets_BT[0].tolist()):
            if target >= 0:
                losses.append(-math.log(float(chances[at, target])))
                right.append(int(chances[at].argmax()) == target)
                if 128 <= int(plan.position_BT[0, at]) < 256:
                    far.append(losses[-1])
    assert got["targets"] == len(losses)
    assert got["loss"] == pytest.approx(sum(losses) / len(losses), rel=ERROR)
    assert got["accuracy"] == pytest.approx(100 * sum(right) / len(right), abs=1e-9)
    assert got["by_position"]["128-255"] == pytest.approx(sum(far) / len(far), rel=ERROR)


@pytest.mark.parametrize("name", ["attention", "deltanet", "gated_delta", "hybrid"])
def test_what_is_timed_is_generation(name: str) -> None:
    """The tokens that a timed decode makes are those of greedy generation behind the same context."""
    asked = {"model": model_tree(name, 32, 64), "context": 70, "tokens": 5, "name": name}
    _, decoder, device = _model(asked)
    prompt = torch.randint(64, (1, 70), generator=torch.Generator().manual_seed(1)).to(device)
    hidden, states = decoder.prefill(prompt, local_plan([[0]], 70).to(device))
    bytes_of = memory(decoder, states)
    figures = decode(decoder, states, hidden[:, -1], 70, 5)
    # of the last round: the states were taken back to the context each time
    assert figures["said"] == list(generate(decoder, prompt[0].tolist(), len(figures["said"]), temperature=0))
    assert figures["tokens_per_s"] == pytest.approx(1 / figures["step_s"])
    assert figures["first_tokens_per_s"] == figures["by_round"][0] and len(figures["by_round"]) >= 1 + ROUNDS
    size = next(decoder.parameters()).element_size()
    attention_layers, states_of = decoder.config.layers.count("attention"), 0
    states_of += decoder.config.layers.count("deltanet") * 32 * 32 * 4
    states_of += decoder.config.layers.count("gated_delta") * (2 * 32 * 16 * 4 + 3 * 96 * size)
    assert bytes_of["cache_bytes"] == attention_layers * 2 * 70 * 32 * size
    assert bytes_of["state_bytes"] == states_of
    assert alone(asked)["prefill_tokens_per_s"] > 0


def test_the_pace_that_counts_is_the_settled_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that takes 20 ms a step in its first 30 steps, and 2 ms from then on; its driver tells of both."""
    _, decoder, device = _model({"model": model_tree("deltanet", 32, 64), "context": 9})
    prompt = torch.randint(64, (1, 9)).to(device)
    hidden, states = decoder.prefill(prompt, local_plan([[0]], 9).to(device))
    steps = 0

    class Device(Step):
        def __call__(self, token: int) -> torch.Tensor:
            nonlocal steps
            steps += 1
            time.sleep(0.02 if steps <= 30 else 0.002)
            return super().__call__(token)

    class Driver:
        def __init__(self, device: torch.device) -> None:
            pass

        def start(self) -> Driver:
            return self

        def sample(self) -> dict[str, float]:
            return {"sm_clock_mhz": 1200.0 if steps <= 30 else 1980.0, "throttle": 0x4 if steps <= 30 else 0x1}

        def stop(self) -> None:
            pass

    monkeypatch.setattr("dnsp.tasks.speed.Step", Device)
    monkeypatch.setattr("dnsp.tasks.speed.Sampler", Driver)
    monkeypatch.setattr("dnsp.tasks.speed.ROUNDS", 2)
    monkeypatch.setattr("dnsp.tasks.speed.SETTLE", 0.0)
    figures = decode(decoder, states, hidden[:, -1], 9, 30 - WARM_UP)
    assert figures["first_tokens_per_s"] < 50 < 100 < figures["tokens_per_s"]
    assert (figures["first_sm_clock_mhz"], figures["sm_clock_mhz"]) == (1200.0, 1980.0)
    assert (figures["first_throttle"], figures["throttle"]) == ("power cap", "")
    assert steps == 3 * 30 and int(states[0].position_B) == 9 + 30


def test_ranks_hand_over_what_one_device_goes_on_from() -> None:
    """Two ranks, which share a GPU where there is one, and decode as one device does that had the context to itself."""
    figures = speed(model_tree("hybrid", 64, 64), context=256, tokens=4, name="hybrid", ranks=2)
    on_gpu = torch.cuda.is_available()
    assert figures["ranks"] == 2 and figures["sharing"] == (-(-2 // torch.cuda.device_count()) if on_gpu else 1)
    assert figures["error"] < (BF16 if on_gpu else ERROR) and figures["cache_bytes"] == 2 * 256 * 64 * (4 - 2 * on_gpu)
    assert on_gpu or figures["same_tokens"] == 1.0


@pytest.mark.parametrize(("gpus", "sharing"), [(1, 2), (2, 1)])
def test_a_prefill_over_ranks_is_measured_on_one_gpu_too(
    monkeypatch: pytest.MonkeyPatch, gpus: int, sharing: int
) -> None:
    began: list[str] = []

    @contextmanager
    def shared_gpu() -> Iterator[dict[str, str]]:
        began.append("sharing")
        yield {}

    def start_ranks(arguments: list[str], ranks: int) -> int:
        began.append(f"{ranks} ranks")
        Path(arguments[-1], "figures.json").write_text(json.dumps({"tokens_per_s": 7.0}))
        return 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(watchdog, "shared_gpu", shared_gpu)
    monkeypatch.setattr("dnsp.tasks.speed.start_ranks", start_ranks)
    figures = speed(model_tree("hybrid", 64, 64), context=256, tokens=4, name="hybrid", ranks=2)
    assert figures["tokens_per_s"] == 7.0 and figures["sharing"] == sharing
    assert began == ["sharing", "2 ranks"][2 - sharing :]


def test_chunk_lengths_do_not_leak_out() -> None:
    from dnsp.kernels import chunk_torch

    before = chunk_torch.CHUNK
    errors = [chunk(tokens=130, heads=1, width=16, chunk=n) for n in (32, 128)]
    assert all(figures["output_error"] < 1e-5 and figures["gradient_error"] < 1e-5 for figures in errors)
    assert chunk_torch.CHUNK == before == 64


def test_the_memory_of_the_pitfalls_is_the_delta_rule() -> None:
    from dnsp.kernels.reference import recurrence

    k, v = torch.randn(2, 40, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    beta = torch.full((1, 40, 1), 0.1, dtype=torch.float64)
    k_BTHK, v_BTHV = k[None, :, None], v[None, :, None]
    _, state = recurrence(k_BTHK, k_BTHK, v_BTHV, None, beta, scale=1.0)
    assert torch.allclose(write(k, v, 0.1), state[0, 0], rtol=1e-12, atol=1e-12)
