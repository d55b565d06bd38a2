"""Before the first step: every parameter's gradient after the engine's reduction is the sum over the ranks, divided by
the step's targets. Asked of the engine that will train, on a sequence as short as the layout allows.

``dnsp verify`` proves that what the ranks add up is one process's gradient. What an option, a stage or a version of
DeepSpeed makes of the sum is found here, on every start. A gradient enters as its sketch, the sums over every 61st
element, so that no rank holds a second copy; 61 divides no width, and what sums to zero over the vocabulary stays.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from dnsp import watchdog
from dnsp.choices import Choices
from dnsp.config import Config
from dnsp.engine import Engine, out_of_memory
from dnsp.errors import UsageError
from dnsp.parallel.grid import Grid
from dnsp.parallel.layout import CHUNK, Layout
from dnsp.parallel.plan import Plan, make_plan

BUCKETS = 61
TOLERANCE = 5e-5  # |got - want| / |want| of a parameter's sketch
MICRO_BATCHES = 2  # at most: from two on accumulation is the same
ROW_TARGETS = 7.0  # stands for the step's targets; any number will do


@dataclass(frozen=True)
class Found:
    """``name`` is the first parameter that differs, or the one nearest to it; ``ratio``: got over wanted."""

    name: str
    error: float
    ratio: float
    seconds: float

    @property
    def ok(self) -> bool:
        return self.error <= TOLERANCE


def probe(
    engine: Engine,
    config: Config,
    choices: Choices = Choices(),  # noqa: B008 (frozen)
    accumulation: int = 1,
) -> Found:
    """Hold the live engine's gradients against the ranks' sum; every rank calls it, nothing of the engine changes.

    ``choices``: of the run; what its layers and ranks will do is done here. ``accumulation``: the most micro-batches of
    a step that are to come, where these are more than the engine's.

    Raises:
        UsageError: on every rank, with the first parameter that differs and by how much.
        PeerLost: a message did not arrive; what was computed without it says nothing of the reduction.
    """
    began = time.monotonic()
    plan = _plan(engine.grid, config, choices).to(engine.device)
    local = {name: torch.zeros(BUCKETS, dtype=torch.float64, device=engine.device) for name in engine.names}
    seed: list[Tensor] = []

    def add(name: str) -> None:
        def seen(grad: Tensor) -> None:
            local[name] += sketch(grad) / seed[-1].double()

        hooks.append(engine.names[name].register_hook(seen))

    hooks: list[torch.utils.hooks.RemovableHandle] = []
    for name in engine.names:
        add(name)
    count = min(max(engine.accumulation, accumulation), MICRO_BATCHES)
    # what the engine and DeepSpeed multiply a rank's loss by reaches the parameters' gradients: it is divided out again
    engine.on_loss = lambda loss: loss.register_hook(seed.append)
    try:
        for micro in range(count):
            engine.deepspeed.set_gradient_accumulation_boundary(micro + 1 == count)
            tokens, targets = _rows(engine, config, plan, micro)
            engine.backward(tokens, targets, plan, ROW_TARGETS)
            if micro + 1 < count:
                engine.advance()
    finally:
        engine.on_loss = None
        for hook in hooks:
            hook.remove()
    want = watchdog.total(torch.stack(list(local.values())), engine.grid).div_(ROW_TARGETS)
    try:
        got = torch.stack([sketch(engine.gradient(name)) for name in engine.names])
    except RuntimeError as error:
        if not config.engine.deepspeed or out_of_memory(error):
            raise
        why = str(error).splitlines()[0]
        raise UsageError(
            f"DeepSpeed's gradients cannot be read with engine.deepspeed={config.engine.deepspeed}: {why}; leave it out"
        ) from None
    engine.skip()
    engine.restart()
    got, want = got.cpu(), want.cpu()
    watchdog.check_peers()
    found = _judge(list(engine.names), got, want, time.monotonic() - began)
    worst = max(watchdog.from_all(found, engine.grid), key=lambda one: one.error)
    if not worst.ok:
        extra = config.engine.deepspeed
        cause = f"engine.deepspeed={extra} may be why: leave it out" if extra else "this DeepSpeed scales otherwise"
        raise UsageError(
            f"the gradient of {worst.name} after DeepSpeed's reduction is {worst.ratio:.6g} times one process's "
            f"(off by {worst.error:.1e}, allowed {TOLERANCE:g}; ZeRO {engine.stage}, {engine.grid.data_size} x "
            f"{engine.grid.sequence_size} ranks): {cause}, or take another engine.zero_stage"
        )
    return worst


def sketch(x: Tensor) -> Tensor:
    """Sums over every 61st element, fp64."""
    flat = x.detach().reshape(-1)
    whole = len(flat) // BUCKETS * BUCKETS
    sums = flat[:whole].view(-1, BUCKETS).sum(0, dtype=torch.float64)
    sums[: len(flat) - whole] += flat[whole:].double()
    return sums


def _judge(names: list[str], got_NB: Tensor, want_NB: Tensor, seconds: float) -> Found:
    """The first that is beyond the tolerance, or the worst of those that are not. What is finite on neither side, of a
    layer that diverges on any tokens, says nothing of the reduction: the first step names it."""
    unknown = ~got_NB.isfinite() & ~want_NB.isfinite()
    got_NB, want_NB = got_NB.masked_fill(unknown, 0), want_NB.masked_fill(unknown, 0)
    distance, size = (got_NB - want_NB).norm(dim=1), want_NB.norm(dim=1)
    errors = torch.where(distance == 0, 0.0, distance / size).nan_to_num(float("inf"), float("inf")).tolist()
    wrong = [i for i, error in enumerate(errors) if error > TOLERANCE]
    index = wrong[0] if wrong else errors.index(max(errors))
    ratio = float((got_NB[index] * want_NB[index]).sum() / (want_NB[index] * want_NB[index]).sum())
    return Found(names[index], errors[index], ratio, seconds)


def _plan(grid: Grid, config: Config, choices: Choices) -> Plan:
    """Two documents in the shortest sequence that the layout and the segments divide."""
    settings = config.parallel
    intervals = grid.sequence_size * (2 if settings.layout == "zigzag" else 1)
    length = intervals * (settings.segment_tokens or CHUNK)
    return make_plan(
        [[0, CHUNK // 2 + 5]] * config.train.micro_batch,
        Layout(settings.layout, grid.sequence_size, length),
        grid,
        settings.segment_tokens,
        transport=choices.transport,
        attention_transport=choices.attention_transport,
        attention_backend=choices.attention_backend,
    )


def _rows(engine: Engine, config: Config, plan: Plan, micro: int) -> tuple[Tensor, Tensor]:
    """This rank's tokens and targets: other ones on every data rank and in every micro-batch."""
    draw = torch.Generator().manual_seed(1 + engine.grid.data_rank + engine.grid.data_size * micro)
    shape = (config.train.micro_batch, plan.tokens)
    tokens, targets = (torch.randint(0, config.model.vocab_size, shape, generator=draw) for _ in range(2))
    return plan.local(tokens).to(engine.device), plan.local(targets).to(engine.device)
