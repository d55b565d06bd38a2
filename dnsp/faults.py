"""What a run does about a loss or gradient that is not finite, a loss that jumps, and memory that does not suffice."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from resource import RUSAGE_SELF, getrusage
from typing import Any

import torch
from torch import Tensor, nn

from dnsp import watchdog
from dnsp.config import Config, FaultsConfig
from dnsp.engine import Engine, out_of_memory
from dnsp.errors import Echo, RunError
from dnsp.memory import GIB, model_bytes
from dnsp.parallel.grid import Grid

Parts = dict[str, float]  # bytes by what they are for
Ways = Iterator[tuple[str, str]]  # a setting, and why


@dataclass(frozen=True)
class Agreed:
    """What all ranks know of a step before its update: the mean loss over its targets (NaN where a rank's is not
    finite), the ranks whose loss is not finite, and whether any rank was asked to stop."""

    loss: float
    broken: tuple[int, ...]
    stopping: bool


def agree_on_step(local_loss: Tensor, targets: int, stopping: bool, grid: Grid) -> Agreed:
    """One sum over the ranks, after the backward. ``local_loss``: summed over this rank's targets, fp64."""
    shared = torch.zeros(2 + grid.world, dtype=torch.float64, device=local_loss.device)
    finite = torch.isfinite(local_loss)
    shared[0] = torch.where(finite, local_loss, 0.0)
    shared[1] = float(stopping)
    shared[2 + grid.rank] = (~finite).double()
    total, asked, *flags = watchdog.total(shared, grid).tolist()
    watchdog.check_peers()
    broken = tuple(rank for rank, flag in enumerate(flags) if flag)
    return Agreed(math.nan if broken else total / targets, broken, asked > 0)


def both_see(first: bool, message: str) -> RunError:
    """A failure that every rank meets alike: rank 0 says it."""
    return RunError(message) if first else Echo(message)


class Skipped:
    """Counts the steps that were passed over because loss or gradient was not finite."""

    def __init__(self, settings: FaultsConfig) -> None:
        self.limit = settings.nonfinite_steps
        self.in_a_row = self.total = 0

    def bad(self) -> bool:
        """One more. True where the run must end."""
        self.in_a_row, self.total = self.in_a_row + 1, self.total + 1
        return self.in_a_row > self.limit


class Spikes:
    """Knows a loss that jumps: above ``spike_factor`` times the median of the last ``spike_window`` steps'."""

    def __init__(self, settings: FaultsConfig) -> None:
        self.settings = settings
        self.losses: deque[float] = deque(maxlen=settings.spike_window)
        self.rolled_back: dict[int, int] = {}  # by the step of the checkpoint

    def median(self) -> float | None:
        """Of the last steps; None while there are fewer than half a window."""
        enough = len(self.losses) >= max(1, self.settings.spike_window // 2)
        return statistics.median(self.losses) if enough else None

    def is_one(self, loss: float) -> bool:
        median = self.median()
        return bool(self.settings.spike_factor) and median is not None and loss > self.settings.spike_factor * median

    def may_roll_back(self, step: int) -> bool:
        """Once more to the checkpoint of this step; what was seen since is forgotten."""
        self.losses.clear()
        self.rolled_back[step] = self.rolled_back.get(step, 0) + 1
        return self.rolled_back[step] <= self.settings.rollbacks


def find_nonfinite(engine: Engine, backward: Callable[[int], object], sequences: Callable[[int], str]) -> str:
    """Where the first number that is not finite comes from, in words; every rank calls it, after a skipped step.

    The step is run once more with eyes on every layer's output and every parameter's gradient.

    Args:
        backward: runs a micro-batch of the step forward and backward.
        sequences: names the data of a micro-batch on this rank.
    """
    weights = [f.name for f in engine.fragments() if not bool(torch.isfinite(f.tensors["weights"]).all())]
    sights: list[tuple[int, int, str]] = []  # micro-batch, order in it, what
    micro = 0
    hooks: list[Any] = []

    def see(order: int, what: str, tensor: Tensor) -> None:
        if not bool(torch.isfinite(tensor).all()):
            sights.append((micro, order, f"{what}, micro-batch {micro} ({sequences(micro)})"))

    layers = list(engine.model.model.layers)
    for index, layer in enumerate(layers):
        what = f"the output of layer {index} ({engine.model.config.layers[index]})"
        hooks.append(layer.register_forward_hook(_seer(see, index, what)))
    for order, (name, p) in enumerate(reversed(engine.names.items())):
        hooks.append(p.register_hook(lambda g, o=order, n=name: see(len(layers) + o, f"the gradient of {n}", g)))
    try:
        for micro in range(engine.accumulation):  # noqa: B007 - see reads it
            backward(micro)
            if micro + 1 < engine.accumulation:
                engine.advance()
    finally:
        for hook in hooks:
            hook.remove()
    engine.skip()
    found = watchdog.from_all((weights[:1], min(sights, default=None)), engine.grid)
    for rank, (names, _) in enumerate(found):
        if names:
            return f"the weights of {names[0]} are not finite themselves (rank {rank})"
    seen = [(sight, rank) for rank, (_, sight) in enumerate(found) if sight is not None]
    if not seen:
        return "run once more it was finite: the device or a link may be at fault"
    (first_micro, order, what), rank = min(seen)
    also = [str(r) for (m, o, _), r in seen if (m, o) == (first_micro, order) and r != rank]
    return f"first in {what} on rank {rank}" + (f", and on {', '.join(also)}" if also else "")


def _seer(see: Callable[[int, str, Tensor], None], index: int, what: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        see(index, what, output.detach())

    return hook


@contextmanager
def explained_memory(engine: Engine, config: Config, tokens: int) -> Iterator[None]:
    """Out of memory in this block: says what was allocated by what, and three settings that would make it fit.

    Raises: RunError in place of torch's or the system's error.
    """

    def held() -> Parts:
        parts: Parts = {**engine.memory()}
        most = torch.cuda.max_memory_allocated(engine.device) if gpu else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
        parts["activations and the rest"] = max(0, most - sum(parts.values()))
        return parts

    gpu = engine.device.type == "cuda"
    ways = partial(_ways, engine.grid, config, tokens, gpu)
    with _explained(engine.grid.rank, held, "Allocated by", ways):
        yield


@contextmanager
def explained_start(model: nn.Module, config: Config, grid: Grid) -> Iterator[None]:
    """The same around what makes a rank's part of ``model`` and its optimizer: says what they need."""

    def needed() -> Parts:
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        return {what: of.device + of.host for what, of in model_bytes(parameters, config.engine, grid.world).items()}

    ways = partial(_ways_to_start, grid, config, torch.cuda.is_available())
    with _explained(grid.rank, needed, "Needed by", ways):
        yield


@contextmanager
def _explained(rank: int, held: Callable[[], Parts], verb: str, ways: Callable[[Parts], Ways]) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # a CUDA OutOfMemoryError is a RuntimeError
        if not out_of_memory(error):
            raise
        parts = held()
        said = ", ".join(f"{what} {size / GIB:.2f} GiB" for what, size in parts.items())
        first = " ".join(str(error).splitlines()[0].split())[:160] if str(error) else type(error).__name__
        best = "; ".join(f"{setting} ({why})" for setting, why in islice(ways(parts), 3))
        words = f"{first}. {verb} {said}. To make it fit: {best}"
        raise RunError(f"out of memory on rank {rank}: {words}") from None


def _ways(grid: Grid, config: Config, tokens: int, gpu: bool, held: Parts) -> Ways:
    """Settings not yet taken, those that save most for their price first, and what each would save."""
    settings = config.engine
    if not settings.activation_checkpointing:
        yield "engine.activation_checkpointing=true", "keeps two tensors a layer; a third more arithmetic"
    if config.train.micro_batch > 1:
        half, fewer = _saves(held["activations and the rest"] / 2), f"micro_batch={config.train.micro_batch // 2}"
        own = any(stage.micro_batch for stage in config.train.stages)
        yield f"{fewer} in the stage" if own else f"train.{fewer}", f"fewer sequences at once; {half}"
    yield from _ways_of_zero(grid, config, gpu, held)
    if settings.activation_checkpointing and not settings.activation_offloading and gpu:
        yield "engine.activation_offloading=true", "what checkpointing keeps waits on the host"
    if not settings.mlp_tile or settings.mlp_tile > 2048:
        yield "engine.mlp_tile=2048", "fewer tokens in a feed-forward at once"
    group = grid.sequence_size
    if grid.world % (2 * group) == 0:
        yield f"parallel.sequence={2 * group}", f"{tokens // group // 2:,} tokens a rank instead of {tokens // group:,}"
    yield f"data.sequence_length={tokens // 2}", "half the tokens"
    yield "more ranks", "each keeps less of the optimizer"


def _ways_to_start(grid: Grid, config: Config, gpu: bool, held: Parts) -> Ways:
    """Where there are no activations yet: what the model and its optimizer keep."""
    yield from _ways_of_zero(grid, config, gpu, held)
    if gpu and not config.engine.offload_parameters:
        stage = "" if config.engine.zero_stage == 3 else "engine.zero_stage=3 "
        yield f"{stage}engine.offload_parameters=true", "weights wait on the host between their uses"
    yield "more ranks", "with engine.zero_stage=3 each keeps less of everything"
    if config.model.num_hidden_layers > 1:
        yield f"model.num_hidden_layers={config.model.num_hidden_layers // 2}", "half the layers"
    yield f"model.hidden_size={config.model.hidden_size // 2}", "narrower layers"


def _ways_of_zero(grid: Grid, config: Config, gpu: bool, held: Parts) -> Ways:
    stage, moments = config.engine.zero_stage, held["moments and master weights"]
    if stage < 3 and grid.world > 1:
        sharded = {1: moments, 2: held["gradients"], 3: held["parameters"]}
        gain = sum(size for first, size in sharded.items() if first > stage) * (1 - 1 / grid.world)
        yield "engine.zero_stage=3", _saves(gain)
    if gpu and not config.engine.offload_optimizer:
        first = "" if stage else "engine.zero_stage=1 "
        yield f"{first}engine.offload_optimizer=true", f"{_saves(moments)}, updates on the host"


def _saves(size: float) -> str:
    return f"saves about {size / GIB:.2f} GiB a rank"
