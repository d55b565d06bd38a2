"""DeepSpeed with the grid's mpu: its gradients and its clipping, against one process on the same data."""

from __future__ import annotations

import logging

import pytest
import torch

from dnsp.parallel.grid import make_grid
from tests.ranks import run_ranks

LIMITS = {"gradient": 1e-6, "clipped step": 1e-6}
TOKENS, CLIP, ACCUMULATION = 6, 0.1, 2  # tokens of a rank


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))


def engine_against_truth(sequence: int) -> dict[str, float]:
    """By stage, the largest relative error of the gradients, and of the parameters after a clipped step of descent."""
    import deepspeed
    from deepspeed.utils import logger, safe_get_full_grad

    logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would compile C++ on the spot
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    grid = make_grid(sequence, timeout=60)
    data = torch.randn(ACCUMULATION, grid.data_size, sequence * TOKENS, 8, generator=torch.Generator().manual_seed(1))
    truth = network()
    truth(data.flatten(0, 2)).square().mean().backward()
    wanted = {name: p.grad.clone() for name, p in truth.named_parameters() if p.grad is not None}
    torch.nn.utils.clip_grad_norm_(truth.parameters(), CLIP)
    torch.optim.SGD(truth.parameters(), lr=1.0).step()

    errors = {}
    for stage in (0, 1):
        model = network()
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": ACCUMULATION,
                "gradient_clipping": CLIP,
                "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True,
            },
            mpu=grid.mpu(),
            dist_init_required=False,
        )
        assert engine.train_batch_size() == ACCUMULATION * grid.data_size  # in sequences: their ranks do not count
        targets = data[..., 0].numel()  # of the whole step
        first = grid.sequence_rank * TOKENS
        for micro in range(ACCUMULATION):
            mine = data[micro, grid.data_rank, first : first + TOKENS]
            # The engine divides by data ranks and micro-batches; the loss is divided by the step's targets already.
            engine.backward(engine(mine).square().sum() / targets * grid.data_size * ACCUMULATION)
            if micro + 1 == ACCUMULATION:
                grads = {name: safe_get_full_grad(p).clone() for name, p in engine.module.named_parameters()}
            engine.step()
        pairs = {"gradient": [(grads[name], g) for name, g in wanted.items()]}
        pairs["clipped step"] = list(zip(engine.module.parameters(), truth.parameters(), strict=True))
        for what, tensors in pairs.items():
            errors[f"{what} at stage {stage}"] = max(float(((a - b).norm() / b.norm()).detach()) for a, b in tensors)
    return errors


@pytest.mark.slow
def test_gradients_and_clipping_are_those_of_one_process() -> None:
    for errors in run_ranks(engine_against_truth, 4, 2, timeout=110):
        for what, error in errors.items():
            assert error <= LIMITS[what.split(" at ")[0]], errors
