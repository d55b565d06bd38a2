"""The whole model over real ranks: the summed loss and every gradient are one process's, for every layer kind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dnsp.config import DeltaNetConfig, ModelConfig
from dnsp.model.decoder import MIXERS, Decoder
from dnsp.parallel.grid import make_grid
from dnsp.parallel.layout import Layout
from dnsp.parallel.plan import local_plan, make_plan

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ranks import run_ranks  # noqa: E402

TOLERANCE = {"loss": 1e-6, "gradient": 2e-5}
TOKENS, STARTS = 512, [[0, 3, 60, 129, 300], [0]]
CONFIG = ModelConfig(
    vocab_size=41,
    hidden_size=32,
    intermediate_size=48,
    pattern=list(MIXERS),
    head_dim=16,
    linear_key_head_dim=8,
    linear_value_head_dim=12,
    initializer_range=0.1,
    deltanet=DeltaNetConfig(num_heads=2, qk_norm="rms", forget_gate=True, decay_every=50, conv_size=3),
)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    tokens = torch.randint(CONFIG.vocab_size, (len(STARTS), TOKENS))
    targets = tokens.roll(-1, 1)
    for row, starts in enumerate(STARTS):
        targets[row, [start - 1 for start in starts]] = -100
    return tokens, targets


def loss_and_gradients(plan, checkpointing: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = Decoder(CONFIG, activation_checkpointing=checkpointing)
    tokens, targets = batch()
    loss = model(plan.local(tokens), plan.local(targets), plan)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}


def on_a_rank(cases: list[tuple[str, bool]]) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    grid, results = make_grid(None, timeout=60), []
    for kind, checkpointing in cases:
        plan = make_plan(STARTS, Layout(kind, grid.sequence_size, TOKENS), grid, 64)
        loss, gradients = loss_and_gradients(plan, checkpointing)
        for value in (loss, *gradients.values()):
            dist.all_reduce(value)
        results.append((loss, gradients))
    return results


@pytest.mark.parametrize("ranks", [2])
def test_loss_and_gradients_are_one_processes(ranks: int) -> None:
    loss, gradients = loss_and_gradients(local_plan(STARTS, TOKENS, 64), False)
    cases = [("zigzag", False), ("zigzag", True), ("contiguous", True)]
    for result in run_ranks(on_a_rank, ranks, cases, timeout=90):
        for case, (rank_loss, rank_gradients) in zip(cases, result, strict=True):
            assert abs(rank_loss / loss - 1).item() < TOLERANCE["loss"], case
            for name, truth in gradients.items():
                error = (rank_gradients[name] - truth).norm() / truth.norm()
                assert error.item() < TOLERANCE["gradient"], (case, name)
