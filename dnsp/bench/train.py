"""``dnsp bench train``: a training step, ours and that of transformers' Qwen3.5 text model, of one shape in one run.

Both start from the same weights and see the same tokens, one document a row. A step is forward, backward and AdamW
(torch's fused one on a GPU), parameters, gradients and moments in the type that ``engine.dtype`` names, activation
checkpointing as the configuration says. transformers takes fla's kernels where fla is installed. Steps are taken by
turns; what is reported is the median.

Model FLOPs of a step are those of dnsp/flops.py, one document a row. MFU is that rate over what this device's bf16
matrix products reach, measured in the same run.

Activation memory is the peak of allocated memory in a step above parameters, gradients and optimizer state.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dnsp.bench import common
from dnsp.bench.common import GIB
from dnsp.choices import make_choices
from dnsp.config import Config, override_tree, parse_config
from dnsp.errors import UsageError
from dnsp.flops import matmul_ceiling, step_flops
from dnsp.json_files import write_json
from dnsp.loss import IGNORE
from dnsp.model import liger
from dnsp.model.decoder import Decoder
from dnsp.parallel.grid import Grid
from dnsp.parallel.layout import Layout
from dnsp.parallel.plan import make_plan

PACKAGES = ("dnsp", "torch", "triton", "liger-kernel", "transformers", "flash-linear-attention", "causal-conv1d")
LOSS_TOLERANCE = 1e-2  # |ours - peer's| / peer's, before the first update

# 1.1 billion parameters; every key may be overridden
SHAPE: dict[str, Any] = {
    "model": {
        "vocab_size": 32768,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 16,
        "pattern": ["gated_delta", "gated_delta", "gated_delta", "attention"],
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "rope_theta": 1.0e7,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    },
    "engine": {"dtype": "bf16", "activation_checkpointing": True},
    "data": {"sequence_length": 32768},
}


@dataclass
class Side:
    """A model in training. ``loss()``: of the batch, the mean over its targets."""

    name: str
    model: nn.Module
    loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer
    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)  # bytes of its own, the other side's left out
    first_loss: float = float("nan")
    failure: str = ""

    def step(self) -> Tensor:
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @property
    def parameter_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    @property
    def state_bytes(self) -> int:
        states = (value for state in self.optimizer.state.values() for value in state.values())
        return sum(value.numel() * value.element_size() for value in states if value.is_cuda)


def run(
    overrides: Sequence[str],
    *,
    tokens: int | None = None,
    steps: int = 5,
    warmup: int = 2,
    only_ours: bool = False,
    profile: Path | None = None,
    json_path: Path | None = None,
) -> int:
    """Measure and print; returns the exit status, 1 where the sides' losses do not agree or ours failed.

    Raises: UsageError for a configuration that cannot be measured.
    """
    more = [] if tokens is None else [f"data.sequence_length={tokens}"]
    config = parse_config(override_tree(SHAPE, [*overrides, *more]), "dnsp bench train")
    if steps < 1:
        raise UsageError(f"--steps {steps}: at least one step is measured")
    if warmup < 0:
        raise UsageError(f"--warmup {warmup}: give a number of steps, 0 or more")
    device, console = common.find_device(), common.make_console()
    sides = [_ours(config, device, console)]
    missing = "not asked for" if only_ours else _missing_peer(device)
    if missing:
        console.print(f"transformers: {missing}", markup=False)
    else:
        os.environ["FLA_FLASH_QLA"] = "0"  # where flash-qla is installed, fla's op would hand its calls to it
        sides.append(_peer(config, sides[0].model, device, console))
    _measure(sides, warmup, steps, device)
    if profile is not None and not sides[0].failure:
        profile.write_text(_profile(sides[0], device))
    report = _report(config, sides, missing, device)
    console.print(_table(report))
    for side in sides:
        if side.failure:
            console.print(f"{side.name}: {side.failure}", markup=False)
    write_json(json_path, report)
    return int(bool(sides[0].failure) or not report["losses_agree"])


def _ours(config: Config, device: torch.device, console: Console) -> Side:
    torch.manual_seed(config.train.seed)
    with device:
        model = Decoder(
            config.model,
            config.engine.activation_checkpointing,
            activation_offloading=config.engine.activation_offloading,
            mlp_tile=config.engine.mlp_tile or None,
        )
    model.to(_dtype(config))
    choices, why = make_choices(config)
    rows, length = config.train.micro_batch, config.data.sequence_length
    layout, grid = Layout("contiguous", 1, length), Grid(1, 0, 1)
    segment_tokens = choices.segment_tokens(config, layout)
    backend = choices.attention_backend
    plan = make_plan([[0]] * rows, layout, grid, segment_tokens, attention_backend=backend).to(device)
    tokens, targets = _batch(config, device)
    count = rows * (length - 1)
    kernels = f"; norms, SwiGLU, rotary positions, cross entropy: {liger.described()}" if device.type == "cuda" else ""
    why = f" ({why})" if why else ""
    console.print(f"ours: attention by {backend}{why}, delta rule in segments of {plan.segments.tokens}{kernels}")
    return Side("dnsp", model, lambda: model(tokens, targets, plan) / count, _optimizer(model, device))


def _missing_peer(device: torch.device) -> str:
    """Why there is no peer to compare with, in words; empty where there is one."""
    needed = ("transformers", "fla") if device.type == "cuda" else ("transformers",)
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    distribution = {"fla": "flash-linear-attention"}
    return ", ".join(f"{distribution.get(name, name)} is not installed" for name in absent)


def _peer(config: Config, ours: nn.Module, device: torch.device, console: Console) -> Side:
    from dnsp.model.hf import twin

    assert isinstance(ours, Decoder)
    model = twin(ours, config.data.sequence_length)
    model.train()
    if config.engine.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tokens, _ = _batch(config, device)
    fla, transformers = (common.package_version(name) for name in ("flash-linear-attention", "transformers"))
    kernels = f"fla {fla}" if device.type == "cuda" else "torch's operations"
    console.print(f"transformers {transformers}: delta rule by {kernels}", markup=False)

    def loss() -> Tensor:
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    return Side("transformers", model, loss, _optimizer(model, device))


def _batch(config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """The same random tokens for both sides; a token's target is the next one, the last has none."""
    shape = (config.train.micro_batch, config.data.sequence_length)
    tokens = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(1))
    targets = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORE)], dim=1)
    return tokens.to(device), targets.to(device)


def _optimizer(model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=device.type == "cuda")


def _dtype(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.engine.dtype == "bf16" else torch.float32


def _measure(sides: list[Side], warmup: int, steps: int, device: torch.device) -> None:
    """Steps of each to warm up, then the measured ones; by turns."""
    for n in range(warmup + steps):
        for side in sides:
            if side.failure:
                continue
            try:
                seconds, peak, loss = _timed(side, device)
            except torch.OutOfMemoryError as error:
                side.failure = f"out of memory: {str(error).splitlines()[0]}"
                side.optimizer.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                continue
            if n == 0:
                side.first_loss = loss
            if n >= warmup:
                side.seconds.append(seconds)
                side.peaks.append(peak)


def _timed(side: Side, device: torch.device) -> tuple[float, int, float]:
    """Seconds, the side's own peak bytes and the loss of one step."""
    others = 0
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated() - side.parameter_bytes - side.state_bytes
    began = time.perf_counter()
    loss = side.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() - others if device.type == "cuda" else 0
    return seconds, peak, float(loss)


def _report(config: Config, sides: list[Side], missing: str, device: torch.device) -> dict[str, Any]:
    rows, tokens = config.train.micro_batch, config.data.sequence_length
    parameters = sum(p.numel() for p in sides[0].model.parameters())
    flops = step_flops(config.model, parameters, [tokens] * rows)
    ceiling = matmul_ceiling(device) if device.type == "cuda" else None
    figures = [_figures(side, rows * tokens, flops, ceiling) for side in sides]
    report: dict[str, Any] = {
        **common.describe(device, PACKAGES),
        "parameters": parameters,
        "rows": rows,
        "tokens": tokens,
        "model_flops": flops,
        "matmul_ceiling_tflops": None if ceiling is None else ceiling / 1e12,
        "model": config.model.model_dump(mode="json"),
        "engine": config.engine.model_dump(mode="json"),
        "ours": figures[0],
        "peer": figures[1] if len(figures) > 1 else None,
        "peer_missing": missing or None,
        "losses_agree": True,
    }
    if len(sides) > 1 and not any(side.failure for side in sides):
        ours, peer = figures
        report["tokens_per_s_ratio"] = ours["tokens_per_s"] / peer["tokens_per_s"]
        if ceiling is not None:
            report["activation_ratio"] = ours["activation_gib"] / peer["activation_gib"]
        difference = abs(sides[0].first_loss - sides[1].first_loss) / sides[1].first_loss
        report["loss_difference"], report["losses_agree"] = difference, difference <= LOSS_TOLERANCE
    return report


def _figures(side: Side, tokens: int, flops: float, ceiling: float | None) -> dict[str, Any]:
    found: dict[str, Any] = {"name": side.name, "loss": side.first_loss}
    if side.failure:
        return found | {"failure": side.failure}
    seconds = median(side.seconds)
    found |= {"step_s": seconds, "steps_s": side.seconds, "tokens_per_s": tokens / seconds}
    if ceiling is not None:
        held = 2 * side.parameter_bytes + side.state_bytes  # gradients are as large as parameters
        found |= {
            "mfu": flops / seconds / ceiling,
            "peak_gib": max(side.peaks) / GIB,
            "held_gib": held / GIB,
            "activation_gib": (max(side.peaks) - held) / GIB,
        }
    return found


def _table(report: dict[str, Any]) -> Table:
    title = f"{report['parameters']:,} parameters, {report['rows']} x {report['tokens']:,} tokens, {report['device']}"
    columns = ("s a step", "tokens/s", "MFU", "peak GiB", "activations GiB", "loss")
    table = common.make_table(title, *columns)
    for figures in filter(None, (report["ours"], report["peer"])):
        wanted = (("step_s", ".3f"), ("tokens_per_s", ",.0f"), ("mfu", ".3f"), ("peak_gib", ".2f"),
                  ("activation_gib", ".2f"), ("loss", ".4f"))  # fmt: skip
        cells = (format(figures[name], form) if name in figures else "" for name, form in wanted)
        table.add_row(figures["name"], *cells)
    if "tokens_per_s_ratio" in report:
        memory = f"{report['activation_ratio']:.2f}" if "activation_ratio" in report else ""
        table.add_row("ratio", "", f"{report['tokens_per_s_ratio']:.2f}", "", "", memory, "")
    return table


def _profile(side: Side, device: torch.device) -> str:
    """One step's operations by the time that they take on the device."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        side.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return profile.key_averages().table(sort_by=by, row_limit=60, max_name_column_width=80)
