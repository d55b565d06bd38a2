"""The model under DeepSpeed: gradients summed over all ranks, the optimizer, its state in and out.

Nothing else imports DeepSpeed, and its JSON is generated here from our configuration. Its scaling, measured with
sequence groups switched on by the mpu: gradients are summed over all ranks and divided by the number of data ranks, and
`backward` divides by the accumulation unless told not to. With the loss of a rank = its sum over local targets / the
step's targets, the reduced gradient is therefore the single process's once it is multiplied by the number of data
ranks, at ZeRO 0 and 1.
"""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch
from torch import Tensor

from dnsp.config import Config
from dnsp.model.decoder import Decoder, DecoderLayer
from dnsp.parallel.grid import Grid
from dnsp.parallel.plan import Plan

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
os.environ.setdefault("DS_LOG_LEVEL", "warning")

import deepspeed  # noqa: E402 - DeepSpeed looks for accelerators and compilers while it is imported
from deepspeed.utils import (  # noqa: E402
    logger,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    set_z3_leaf_modules,
)

MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine:
    """One rank's share of a model in training.

    Args:
        model: a Decoder with the weights to start from, the same on every rank.
        config: its ``engine`` and ``train`` sections are read.
        grid: of the ranks; the process group exists.
        accumulation: micro-batches of an optimizer step.
        optimizer_state: as :meth:`optimizer_state` returned it, to go on from.
    """

    def __init__(
        self,
        model: Decoder,
        config: Config,
        grid: Grid,
        accumulation: int,
        optimizer_state: dict[str, Tensor] | None = None,
    ) -> None:
        warnings.filterwarnings("ignore", message=".*(all_gather_into|reduce_scatter)_tensor", category=FutureWarning)
        logger.setLevel(logging.WARNING)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        if not torch.cuda.is_available():
            # DeepSpeed would compile a shared-memory all-reduce with the machine's C++ compiler; gloo does the same
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists; a single process has no launcher to set it
        settings = config.train
        self.model, self.grid, self.stage = model, grid, config.engine.zero_stage
        self.clip, self.accumulation = settings.clip, accumulation
        # what DeepSpeed divides the sum over all ranks by; measured, and asserted by dnsp/probe.py on every start
        self.divisor = grid.world if self.stage == 3 else grid.data_size
        # in the model: DeepSpeed turns off a CUDA autocast that is around its engine
        model.autocast = torch.bfloat16 if config.engine.dtype == "bf16" else None
        self.device = next(model.parameters()).device
        optimizer = torch.optim.AdamW(
            model.param_groups(settings.weight_decay),
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            fused=self.device.type == "cuda",
        )
        if self.stage == 3:  # one gather a layer; what a layer does inside needs no hook of DeepSpeed's
            set_z3_leaf_modules(model, [DecoderLayer])
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(config, accumulation),
            mpu=grid.mpu(),
            dist_init_required=False,
        )
        self.names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._make_moments()
        if optimizer_state is not None:
            self._load_optimizer(optimizer_state)

    def backward(self, tokens_BT: Tensor, targets_BT: Tensor, plan: Plan, step_targets: int) -> Tensor:
        """Add one micro-batch's share of the step's gradient; the last one of a step starts the reduction.

        Returns the loss summed over the local targets, fp32, detached.
        """
        loss_sum = self.deepspeed(tokens_BT, targets_BT, plan)
        self.deepspeed.backward(loss_sum * (self.divisor / step_targets), scale_wrt_gas=False)
        return loss_sum.detach()

    def advance(self) -> None:
        """Between micro-batches: lets DeepSpeed count them. Not after the last one; that is :meth:`step`'s."""
        self.deepspeed.step()

    def gradients(self) -> dict[str, Tensor]:
        """Every parameter's whole gradient after the reduction, on every rank; from the last backward to the step."""
        return {name: safe_get_full_grad(p).detach().float() for name, p in self.names.items()}

    def step(self, lr: float) -> float:
        """Clip by the global norm and update with this learning rate. Returns the norm before clipping.

        A norm that is not finite updates nothing.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.stage:
            self.deepspeed.step()
            return float(self.deepspeed.get_global_grad_norm())
        # every rank holds every reduced gradient, so that the norm needs no communication
        limit = self.clip if self.clip > 0 else float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self.names.values(), limit))
        if norm == norm and norm != float("inf"):
            self.deepspeed.step()
        return norm

    def optimizer_state(self) -> dict[str, Tensor]:
        """AdamW's moments as ``exp_avg.NAME`` and ``exp_avg_sq.NAME``, whole whatever the ZeRO stage, and ``step``.

        Every rank calls it; every rank gets it, on the CPU.
        """
        state: dict[str, Tensor] = {}
        for name, p in self.names.items():
            for moment in MOMENTS:
                whole = safe_get_full_optimizer_state(p, moment) if self.stage else self.optimizer.state[p][moment]
                state[f"{moment}.{name}"] = whole.detach().cpu().reshape(p.shape).clone()
        state["step"] = next(iter(self._base().state.values()))["step"].detach().cpu().clone()
        return state

    def _make_moments(self) -> None:
        # AdamW would make them in its first step; DeepSpeed then links the first group's shards alone to parameters
        base = self._base()
        held = [p for group in base.param_groups for p in group["params"]]
        if self.stage == 3:  # handed to AdamW one at a time
            held = self.optimizer.fp32_partitioned_groups_flat
        for p in held:
            step = torch.zeros((), device=p.device if base.defaults["fused"] else "cpu")  # where AdamW itself has it
            base.state[p] = {"step": step, **{moment: torch.zeros_like(p) for moment in MOMENTS}}
        if self.stage in (1, 2):
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _load_optimizer(self, saved: dict[str, Tensor]) -> None:
        for state in self._base().state.values():
            state["step"].copy_(saved["step"])
        for name, p in self.names.items():
            for moment in MOMENTS:
                whole = saved[f"{moment}.{name}"].to(self.device)
                if self.stage:
                    safe_set_full_optimizer_state(p, whole, moment)
                else:
                    self.optimizer.state[p][moment].copy_(whole)

    def _base(self) -> Any:
        return self.optimizer.optimizer if self.stage else self.optimizer


def deepspeed_config(config: Config, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's own configuration; ours is the only source."""
    settings = config.engine
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if settings.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.train.clip if settings.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's would be compiled on the spot; torch's fused AdamW is as fast
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device, twice a micro-batch
    }
