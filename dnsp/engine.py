"""The model under DeepSpeed: gradients summed over all ranks, the optimizer, its state in and out.

Nothing else imports DeepSpeed. Its scaling, measured with sequence groups switched on by the mpu: `backward` divides by
the accumulation unless told not to; gradients are summed over all ranks and divided by the number of data ranks at ZeRO
0, 1 and 2, of all ranks at ZeRO 3. With the loss of a rank = its sum over local targets / the step's targets, the
reduced gradient is the single process's once the loss is multiplied by that number. ``dnsp/probe.py`` asserts it.

Weights are fp32 at every stage, bf16 is the model's autocast: `A_log`, `dt_bias` and norms are never rounded.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from dnsp.checkpoint import MOMENTS, Checkpoint
from dnsp.config import Config
from dnsp.deepspeed_json import deepspeed_config
from dnsp.errors import UsageError
from dnsp.model.decoder import Decoder, DecoderLayer
from dnsp.parallel.grid import Grid
from dnsp.parallel.plan import Plan
from dnsp.parallel.waits import WAITS

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
os.environ.setdefault("DS_LOG_LEVEL", "warning")

import deepspeed  # noqa: E402 - DeepSpeed looks for accelerators and compilers while it is imported
from deepspeed.accelerator import get_accelerator  # noqa: E402
from deepspeed.runtime import compiler  # noqa: E402
from deepspeed.runtime.config import DeepSpeedConfigError  # noqa: E402
from deepspeed.utils import (  # noqa: E402
    logger,
    safe_get_full_fp32_param,
    safe_get_full_grad,
    set_z3_leaf_modules,
)

# From ZeRO 1 on DeepSpeed asks whether AdamW is its Muon, whose functions are for torch.compile: it would import all of
# Inductor for them, a second of every start.
with suppress(ImportError), patch.object(compiler, "compile", lambda: lambda fn: fn):
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401


@dataclass(frozen=True)
class Fragment:
    """Elements from ``start`` on of a flattened parameter and its moments: ``weights``, ``exp_avg``, ``exp_avg_sq``."""

    name: str
    start: int
    tensors: dict[str, Tensor]


class Engine:
    """One rank's share of a model in training.

    Args:
        model: a Decoder with the weights to start from, the same on every rank; for ZeRO 3 also a hollow one.
        config: its ``engine`` and ``train`` sections are read.
        grid: of the ranks; the process group exists.
        accumulation: micro-batches of an optimizer step.
        found: a checkpoint whose moments to go on from; the model has its weights already, if it is not hollow.
        weights: what a hollow model is filled with, where ``found`` is not; rank 0's count. None: they are drawn.
    """

    def __init__(
        self,
        model: Decoder,
        config: Config,
        grid: Grid,
        accumulation: int,
        found: Checkpoint | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        warnings.filterwarnings("ignore", message=".*(all_gather_into|reduce_scatter)_tensor", category=FutureWarning)
        logger.setLevel(logging.ERROR)
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        if not torch.cuda.is_available():
            # DeepSpeed would compile a shared-memory all-reduce with the machine's C++ compiler; gloo does the same.
            # What is not there yet is not asked for: it would try all its operators, some with that compiler.
            vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists; a single process has no launcher to set it
        settings = config.train
        self.model, self.grid, self.stage = model, grid, config.engine.zero_stage
        self.clip, self.accumulation = settings.clip, accumulation
        # what DeepSpeed divides the sum over all ranks by; measured, and asserted by dnsp/probe.py on every start
        self.divisor = grid.world if self.stage == 3 else grid.data_size
        self.on_loss: Callable[[Tensor], object] | None = None  # sees every micro-batch's loss before its backward
        # in the model: DeepSpeed turns off a CUDA autocast that is around its engine
        model.autocast = torch.bfloat16 if config.engine.dtype == "bf16" else None
        hollow = model.hollow
        on_gpu = torch.cuda.is_available() if hollow else next(model.parameters()).is_cuda
        options = deepspeed_config(config, accumulation, on_gpu)
        if on_gpu:
            number_devices(get_accelerator())
        try:
            if hollow:
                fill_in_shards(model, options, grid, None if found else weights)
            self.device = next(model.parameters()).device
            optimizer = torch.optim.AdamW(
                model.param_groups(settings.weight_decay),
                lr=settings.lr,
                betas=settings.betas,
                eps=settings.eps,
                fused=on_gpu,
            )
            if self.stage == 3:  # one gather a layer; what a layer does inside needs no hook of DeepSpeed's
                set_z3_leaf_modules(model, [DecoderLayer])
            self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=options,
                mpu=grid.mpu(),
                dist_init_required=False,
                args=SimpleNamespace(device_rank=self.device.index) if on_gpu else None,
            )
        except (AssertionError, ValueError, RuntimeError, DeepSpeedConfigError) as error:
            if not config.engine.deepspeed or out_of_memory(error):
                raise
            why = " ".join(str(error).split())[:300]
            raise UsageError(f"DeepSpeed refuses engine.deepspeed={config.engine.deepspeed}: {why}") from None
        if grid.world == 1 and not self.stage:  # it would copy all gradients together and apart again
            self.deepspeed.enable_backward_allreduce = False
        self.deepspeed.allreduce_gradients = WAITS.counting(self.deepspeed.allreduce_gradients)
        if self.stage == 3:  # where a layer waits for its weights
            coordinator = self.optimizer.parameter_offload.get_param_coordinator()
            coordinator.fetch_sub_module = WAITS.counting(coordinator.fetch_sub_module)
        self.names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._make_moments()
        if found is not None:
            self.load(found, weights=hollow)

    def backward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        plan: Plan,
        step_targets: float,
        asked_N: Tensor | None = None,
    ) -> Tensor:
        """Add one micro-batch's share of the step's gradient; the last one of a step starts the reduction.

        ``asked_N``: as :meth:`dnsp.model.decoder.Decoder.forward` takes it.

        Returns the loss summed over the local targets, fp32, detached.
        """
        loss_sum = self.deepspeed(tokens_BT, targets_BT, plan, asked_N=asked_N)
        if self.on_loss is not None:
            self.on_loss(loss_sum)
        self.deepspeed.backward(loss_sum * (self.divisor / step_targets), scale_wrt_gas=False)
        return loss_sum.detach()

    def accumulate(self, micro_batches: int) -> None:
        """From the next step on a step has so many; between steps."""
        if micro_batches == self.accumulation:
            return
        # what its set_train_batch_size would set, which divides by a world size that it does not have here
        self.deepspeed._config.gradient_accumulation_steps = micro_batches
        if self.stage:
            self.optimizer.gradient_accumulation_steps = micro_batches
        self.accumulation = micro_batches
        self.restart()

    def advance(self) -> None:
        """Between micro-batches: lets DeepSpeed count them. Not after the last one; that is :meth:`step`'s."""
        self.deepspeed.step()

    def gradients(self) -> dict[str, Tensor]:
        """Every parameter's whole gradient after the reduction, on every rank; from the last backward to the step."""
        return {name: self.gradient(name) for name in self.names}

    def gradient(self, name: str) -> Tensor:
        """One of :meth:`gradients`; every rank calls it."""
        return safe_get_full_grad(self.names[name]).detach().float()

    def restart(self) -> None:
        """Count the micro-batches of a step from the first again."""
        self.deepspeed._is_gradient_accumulation_boundary = None
        self.deepspeed.micro_steps = 0

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
        else:
            self.skip()
        return norm

    def skip(self) -> None:
        """In place of :meth:`step`: forget the step's gradients; weights and moments stay as they are."""
        if self.stage:
            # DeepSpeed's own way of passing over an overflow, which a norm that is not a number takes
            method, nan = "scaled_global_norm", torch.tensor(float("nan"))
            broken: Any = lambda *_, **__: nan  # noqa: E731
            if self.stage == 3:
                method, broken = "_get_norm_groups", lambda *_, **__: [nan]
            with patch.object(self.optimizer, method, broken):
                self.deepspeed.step()
            return
        for p in self.names.values():
            p.grad = None
        self.deepspeed.micro_steps += 1

    def fragments(self, whole: bool = False) -> list[Fragment]:
        """The ranges of parameters and moments that this rank keeps; together the ranks' are everything once.

        ``whole``: at stage 0, where every rank has all of it, all of it. The tensors are the optimizer's own.
        """
        if self.stage == 3:
            return [f for name, p in self.names.items() if (f := self._shard(name, p)) is not None]
        if self.stage:
            return [self._linked(name, p) for name, p in self.names.items() if getattr(p, "_hp_mapping", None)]
        total = sum(p.numel() for p in self.names.values())
        rank, world = self.grid.rank, self.grid.world
        low, high = (0, total) if whole else (total * rank // world, total * (rank + 1) // world)
        found, first = [], 0
        for name, p in self.names.items():
            start, stop = max(low - first, 0), min(high - first, p.numel())
            if start < stop:
                views = {"weights": p.data, **{moment: self.optimizer.state[p][moment] for moment in MOMENTS}}
                found.append(Fragment(name, start, {what: x.view(-1)[start:stop] for what, x in views.items()}))
            first += p.numel()
        return found

    def _linked(self, name: str, p: Any) -> Fragment:
        link = p._hp_mapping
        views = {"weights": link.hp_fragment, **{m: link.get_optim_state_fragment(m) for m in MOMENTS}}
        return Fragment(name, link.lp_fragment_address.start, {what: x.data for what, x in views.items()})

    def _shard(self, name: str, p: Any) -> Fragment | None:
        optimizer = self.optimizer
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(p)]
        start = size * self.grid.rank
        held = min(size, p.ds_numel - start)  # the last shards are padded
        if held <= 0:
            return None
        flat = optimizer.fp32_partitioned_groups_flat[group]
        views = {"weights": flat.data, **{moment: self._base().state[flat][moment] for moment in MOMENTS}}
        return Fragment(name, start, {what: x.narrow(0, offset, held) for what, x in views.items()})

    def shapes(self) -> dict[str, list[int]]:
        """Of the whole parameters."""
        return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in self.names.items()}

    def adam_step(self) -> Tensor:
        """Updates that AdamW has made, a scalar."""
        return next(iter(self._base().state.values()))["step"].detach().cpu().clone()

    @torch.no_grad()
    def load(self, found: Checkpoint, weights: bool = False) -> None:
        """Take the moments of a checkpoint, and its ``weights`` where the model does not have them yet."""
        for state in self._base().state.values():
            state["step"].copy_(found.adam_step())
        for fragment in self.fragments(whole=True):
            for what, view in fragment.tensors.items():
                if weights or what != "weights":
                    view.copy_(found.read(what, fragment.name, fragment.start, fragment.start + view.numel()))
        if weights and self.stage == 3:
            self.optimizer._partition_all_parameters()
            for group in range(len(self.optimizer.fp16_groups)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if persistent := self.optimizer.persistent_parameters:
                persistent[0].all_gather(persistent)
        elif weights:
            for name, tensor in found.weights().items():
                self.names[name].copy_(tensor)

    def memory(self) -> dict[str, int]:
        """Bytes of this rank's by what they are for: parameters, gradients, moments and master weights."""
        whole = sum(4 * math.prod(shape) for shape in self.shapes().values())
        mine = sum(4 * f.tensors["weights"].numel() for f in self.fragments())
        shared = mine if self.stage else whole  # of the optimizer
        return {
            "parameters": mine if self.stage == 3 else whole,
            "gradients": mine if self.stage >= 2 else whole,
            "moments and master weights": (3 if self.stage else 2) * shared,
        }

    def whole_weights(self) -> dict[str, Tensor]:
        """All parameters on rank 0, on the CPU; nothing on the others. Every rank calls it."""
        found = {}
        for name, p in self.names.items():
            whole = safe_get_full_fp32_param(p) if self.stage == 3 else p
            if self.grid.rank == 0:
                found[name] = whole.detach().cpu()
        return found

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

    def _base(self) -> Any:
        return self.optimizer.optimizer if self.stage else self.optimizer


def number_devices(accelerator: Any) -> None:
    """Ranks that share a GPU have another number on their node than their device has, and ZeRO 3 asks for a device by
    that number: the same one is meant that :func:`dnsp.watchdog.take_device` takes."""
    name = type(accelerator).device_name

    def device_name(number: int | str | None = None) -> str:
        return str(name(accelerator, None if number is None else int(number) % torch.cuda.device_count()))

    accelerator.device_name = device_name


def out_of_memory(error: BaseException) -> bool:
    """On a GPU, or on the host."""
    words = ("not enough memory", "can't allocate memory", "out of memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


@torch.no_grad()
def fill_in_shards(
    model: Decoder, options: dict[str, Any], grid: Grid, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Make a hollow model's weights for ZeRO 3: a rank holds one part of it at a time, and of each keeps its shard.

    Every rank calls it. They are those that other stages draw from the same seed, to the last bit, or ``weights``;
    what counts is rank 0's.
    """
    converted: Any = None
    for prefix, part in model.fill():
        if weights is not None:
            for name, p in part.named_parameters():
                p.copy_(weights[prefix + name])
        if converted is None:
            deepspeed.zero.Init(module=part, config_dict_or_path=options, dtype=torch.float32, mpu=grid.mpu())
            converted = next(part.parameters())
        else:  # as DeepSpeed itself goes on once it has begun
            converted.convert_to_zero_parameters(param_list=list(part.parameters()))
