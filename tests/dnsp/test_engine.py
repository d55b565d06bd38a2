"""The engine's gradients are one process's at every stage and grid, and the optimizer's state comes back whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks

# relative errors against one process at stage 0; moments absolute
TOLERANCE = {"gradient": 2e-5, "norm": 1e-5, "loss": 1e-6, "moments": 1e-6}
ROWS, TOKENS, VOCABULARY = 2, 512, 32

# ZeRO stage, ranks, of them in a sequence group, micro-batches
CASES = [(0, 2, 2, 2), (1, 1, 1, 2), (1, 2, 2, 2), (0, 2, 1, 1), (1, 2, 1, 1), (1, 4, 2, 1)]


def one_step(stage: int, sequence: int, accumulation: int) -> dict[str, Any]:
    """On every rank: one step's loss, gradients, norm and moments, and whether the moments survive a new engine."""
    from dnsp.config import parse_config
    from dnsp.engine import Engine
    from dnsp.model.decoder import Decoder
    from dnsp.parallel.grid import make_grid
    from dnsp.parallel.layout import Layout
    from dnsp.parallel.plan import make_plan

    config = parse_config(
        {
            "model": {
                "vocab_size": VOCABULARY,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "pattern": ["gated_delta", "attention"],
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 16,
                "linear_num_key_heads": 1,
                "linear_num_value_heads": 2,
                "linear_key_head_dim": 16,
                "linear_value_head_dim": 16,
            },
            "engine": {"zero_stage": stage},
            "train": {"global_batch": ROWS, "clip": 0.5},
        },
        "the test",
    )
    grid = make_grid(sequence)
    layout = Layout("zigzag", sequence, TOKENS)
    torch.manual_seed(0)
    model = Decoder(config.model)
    engine = Engine(model, config, grid, accumulation)
    draw = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(0, VOCABULARY, (ROWS, TOKENS), generator=draw)
    targets_BT = torch.randint(0, VOCABULARY, (ROWS, TOKENS), generator=draw)
    loss = torch.zeros((), dtype=torch.float64)
    for micro in range(accumulation):
        row = micro * grid.data_size + grid.data_rank
        plan = make_plan([[0, 100]], layout, grid, 64)
        local = plan.local(tokens_BT[row : row + 1]), plan.local(targets_BT[row : row + 1])
        loss += engine.backward(*local, plan, ROWS * TOKENS)
        if micro + 1 < accumulation:
            engine.advance()
    gradients = engine.gradients()
    norm = engine.step(1e-2)
    moments = engine.optimizer_state()
    dist.all_reduce(loss)

    again = Decoder(config.model)
    again.load_state_dict(model.state_dict())
    kept = Engine(again, config, grid, accumulation, moments).optimizer_state()
    survived = all(torch.equal(moments[name], kept[name]) for name in moments)
    return {"loss": loss, "gradients": gradients, "norm": norm, "moments": moments, "survived": survived}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_step_is_the_single_process_step(tmp_path: Path) -> None:
    (truth,) = run_ranks(one_step, 1, 0, 1, ROWS)
    for stage, world, sequence, accumulation in CASES:
        for rank, found in enumerate(run_ranks(one_step, world, stage, sequence, accumulation)):
            case = (stage, world, sequence, accumulation, rank)
            for name, want in truth["gradients"].items():
                error = (found["gradients"][name] - want).norm() / want.norm()
                assert error < TOLERANCE["gradient"], (case, name, float(error))
            assert abs(found["norm"] / truth["norm"] - 1) < TOLERANCE["norm"], case
            assert abs(found["loss"] / truth["loss"] - 1) < TOLERANCE["loss"], case
            for name, want in truth["moments"].items():
                assert (found["moments"][name] - want).abs().max() < TOLERANCE["moments"], (case, name)
            assert found["survived"], case
