"""DeepSpeed's own configuration, made from ours: the only source. ``engine.deepspeed`` adds what ours does not name.

DeepSpeed is not imported here, so that a contradiction is refused where the configuration is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dnsp.config import Config

BUCKET = 50_000_000  # elements that are reduced at once


def deepspeed_config(config: Config, accumulation: int, on_gpu: bool) -> dict[str, Any]:
    """The JSON for ``accumulation`` micro-batches a step."""
    settings = config.engine
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.zero_stage:
        # a bucket is reduced beside the rest of the backward; stage 0 cannot, and a CPU has no streams to do it on
        zero |= {"overlap_comm": on_gpu, "reduce_bucket_size": BUCKET}
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if settings.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    generated = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.train.clip if settings.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's would be compiled on the spot; torch's is fused too
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device, twice a micro-batch
    }
    return _merged(generated, settings.deepspeed)


def contradiction(config: Config) -> str | None:
    """What in ``engine.deepspeed`` another setting decides, in words; None where nothing does."""
    engine, train = config.engine, config.train
    decided: dict[str, tuple[str, Any]] = {  # DeepSpeed's option: the setting that decides it, and its value
        "train_micro_batch_size_per_gpu": ("train.micro_batch", train.micro_batch),
        "train_batch_size": ("train.global_batch", train.global_batch),
        "gradient_accumulation_steps": ("train.global_batch", train.global_batch),  # and the ranks decide it
        "gradient_clipping": ("train.clip", train.clip),
        "zero_optimization.stage": ("engine.zero_stage", engine.zero_stage),
        "zero_optimization.offload_optimizer": ("engine.offload_optimizer", engine.offload_optimizer),
        "zero_optimization.offload_param": ("engine.offload_parameters", engine.offload_parameters),
        "zero_optimization.cpu_offload": ("engine.offload_optimizer", engine.offload_optimizer),  # older names
        "zero_optimization.cpu_offload_param": ("engine.offload_parameters", engine.offload_parameters),
        "bf16": ("engine.dtype", engine.dtype),
        "bfloat16": ("engine.dtype", engine.dtype),
        "fp16": ("engine.dtype", engine.dtype),
        "torch_autocast": ("engine.dtype", engine.dtype),
        "optimizer": ("train.lr", train.lr),
        "scheduler": ("train.schedule", train.schedule),
    }
    zero = engine.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        return f"engine.deepspeed.zero_optimization={zero!r} must be keys and values, as {{overlap_comm: false}}"
    given = {**engine.deepspeed, **{f"zero_optimization.{key}": value for key, value in zero.items()}}
    if any(stage.micro_batch or stage.global_batch for stage in train.stages):
        for option in ("train_micro_batch_size_per_gpu", "train_batch_size"):
            decided[option] = ("train.stages", "batches of their own")
    for option, value in given.items():
        if option in decided and (value != decided[option][1] or option == "gradient_accumulation_steps"):
            setting, ours = decided[option]
            return (
                f"engine.deepspeed.{option}={value!r} contradicts {setting}={ours!r}, which decides it; "
                f"leave it out and set {setting}"
            )
    return None


def _merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        both = isinstance(value, dict) and isinstance(ours.get(key), dict)
        merged[key] = _merged(ours[key], value) if both else value
    return merged
