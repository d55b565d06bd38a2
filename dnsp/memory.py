"""What a rank keeps of the model, by ZeRO stage and offloading: for ``dnsp doctor``, and when memory runs out."""

from __future__ import annotations

from dataclasses import dataclass

from dnsp.config import EngineConfig
from dnsp.deepspeed_json import BUCKET

GIB = 2**30
FP32 = 4  # bytes of everything that the engine keeps
LIVE = 10**9  # parameters that DeepSpeed leaves gathered under ZeRO 3, where engine.deepspeed does not say otherwise


@dataclass(frozen=True)
class Held:
    """Bytes of a rank on its device and in the host's memory."""

    device: float
    host: float = 0.0


def model_bytes(parameters: int, engine: EngineConfig, ranks: int) -> dict[str, Held]:
    """What a rank keeps of the model by ZeRO stage and offloading; what comes with the tokens is not in it."""
    whole, stage = float(FP32 * parameters), engine.zero_stage
    shard = whole / ranks
    weights = shard if stage == 3 else whole
    gradients = shard if stage >= 2 else whole
    optimizer = 3 * shard if stage else 2 * whole  # with a stage, weights of its own beside the two moments
    held = {
        "parameters": Held(0, weights) if engine.offload_parameters else Held(weights),
        # they go where the update is made, a shard at a time
        "gradients": Held(0, gradients) if engine.offload_optimizer and stage >= 2 else Held(gradients),
        "moments and master weights": Held(0, optimizer) if engine.offload_optimizer else Held(optimizer),
    }
    if stage and ranks > 1:
        held["buckets"] = Held(2 * FP32 * min(BUCKET, parameters))  # one is filled while the other is reduced
    if stage == 3 and ranks > 1:
        live = engine.deepspeed.get("zero_optimization", {}).get("stage3_max_live_parameters", LIVE)
        held["gathered layers"] = Held(FP32 * min(float(live), parameters))
    return held
