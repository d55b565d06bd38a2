"""``dnsp verify``: the same numbers on any number of ranks, shown on the user's own configuration.

One process computes the truth in fp32: the loss of one micro-batch, every parameter's gradient by plain autograd, and a
recording of what entered the delta rule. Each world size is then started once, and for every layout and transport

    its loss and every parameter's gradient, on every rank after the engine's reduction, are held against the truth;
    the recording is replayed, and outputs and input gradients must be those of one process bit for bit.

Long because what is recorded, replayed and compared is read together.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch
from torch import Tensor

from dnsp import watchdog
from dnsp.config import Config, load_config, parse_config
from dnsp.data.batch import Batch, batch
from dnsp.data.mix import Step, open_data
from dnsp.errors import UsageError
from dnsp.launch.environment import Environment, find_environment
from dnsp.launch.local import cores, start_ranks
from dnsp.model.decoder import Decoder
from dnsp.parallel.grid import Grid, make_grid
from dnsp.parallel.layout import CHUNK, KINDS, Layout
from dnsp.parallel.plan import SCAN_TRANSPORTS, Plan, make_plan
from dnsp.parallel.transport import Transport
from dnsp.recording import Call, recording, replay
from dnsp.verdict import BF16_FACTOR, BF16_WRONG, GRADIENT_TOLERANCE, LOSS_TOLERANCE, Case, conclude

if TYPE_CHECKING:
    from dnsp.engine import Engine

ONE = Grid(1, 0, 1)

REQUEST, TRUTH = "request.json", "truth.pt"
Gradients = dict[str, Tensor]  # by the parameter's name, fp32, on the CPU


@dataclass(frozen=True)
class Request:
    """What to check; every rank reads it from the working folder. ``rows``: sequences of the step."""

    config: Config
    ranks: tuple[int, ...]
    layouts: tuple[str, ...]
    transports: tuple[str, ...]
    stages: tuple[int, ...]
    sequences: tuple[int, ...]  # sizes of a sequence group; empty: the configuration's
    segment_tokens: int
    rows: int

    @property
    def dtype(self) -> str:
        return self.config.engine.dtype

    @property
    def tokens(self) -> int:
        return self.config.data.sequence_length

    def sizes(self, world: int) -> list[int]:
        """Of the sequence groups in a world."""
        return group_sizes(self.config, self.sequences, world)

    def save(self, folder: Path) -> None:
        tree = {**dataclasses.asdict(self), "config": self.config.model_dump(mode="json")}
        (folder / REQUEST).write_text(json.dumps(tree))

    @staticmethod
    def load(folder: Path) -> Request:
        tree = json.loads((folder / REQUEST).read_text())
        lists = {name: tuple(tree[name]) for name in ("ranks", "layouts", "transports", "stages", "sequences")}
        return Request(**{**tree, **lists, "config": parse_config(tree["config"], REQUEST)})


@dataclass
class Truth:
    """What one process found."""

    loss: float
    gradients: Gradients
    bf16_errors: dict[str, float]  # one bf16 process's error against them; empty for fp32
    calls: list[Call]  # of the first micro-batch, in the request's dtype
    doc_starts: list[list[int]]  # of its rows


# What the user's process does.


def run(
    config_path: Path,
    overrides: Sequence[str],
    ranks: Sequence[int],
    layouts: Sequence[str] = KINDS,
    transports: Sequence[str] = ("p2p", "gather"),
    dtype: str = "fp32",
    json_path: Path | None = None,
    stages: Sequence[int] = (),
    sequences: Sequence[int] = (),
) -> int:
    """Check a configuration at several world sizes; print the table. Returns the exit status, 1 if any case fails.

    Under a launcher this is one of its ranks, and its world is the one that is checked.

    Raises:
        UsageError: a layout, transport, type or number of ranks that the configuration cannot be run with.
    """
    environment = find_environment()
    config = load_config(config_path, overrides)
    request = make_request(config, ranks, layouts, transports, dtype, stages, sequences)
    if environment.launcher != "none":
        if request.ranks != (environment.world_size,):
            raise UsageError(
                f"--ranks {','.join(map(str, ranks))} inside a launcher ({environment.launcher}) of "
                f"{environment.world_size} ranks; give --ranks {environment.world_size}, or start without a launcher"
            )
        watchdog.take_device(environment)  # every rank finds the truth, on a GPU of its own
        cases = check_world(request, environment, find_truth(request))
        return conclude(request, cases, json_path) if environment.rank == 0 else int(not all(c.ok for c in cases))
    # at every world size the same: matrix products of another number of threads may differ in their bits
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // max(request.ranks)))
    with tempfile.TemporaryDirectory(prefix="dnsp-verify-") as name, patch.dict(os.environ, OMP_NUM_THREADS=threads):
        folder = Path(name)
        request.save(folder)
        cases = []
        for world in sorted({1, *request.ranks}):  # the process alone finds the truth
            with watchdog.room_for(world):
                status = start_ranks(["verify-ranks", str(folder)], world)
            if status:
                return status
            found = [Case(**case) for case in json.loads((folder / f"{world}.json").read_text())]
            cases += found
            if found and len(request.ranks) > 1:  # the next world may take long, or fail
                count = sum(case.ok for case in found)
                print(f"{world} rank{'s' * (world > 1)}: {count} of {len(found)} hold", flush=True)
    return conclude(request, cases, json_path)


def make_request(
    config: Config,
    ranks: Sequence[int],
    layouts: Sequence[str],
    transports: Sequence[str],
    dtype: str,
    stages: Sequence[int] = (),
    sequences: Sequence[int] = (),
) -> Request:
    """The request, refused here where it cannot be carried out. No ``stages``: the configuration's."""
    for what, given, known in (
        ("--layouts", layouts, KINDS),
        ("--transports", transports, SCAN_TRANSPORTS),
        ("--dtype", [dtype], tuple(LOSS_TOLERANCE)),
        ("--zero", stages, (0, 1, 2, 3)),
    ):
        for value in given:
            if value not in known:
                raise UsageError(f"{what} {value}: it is not one of {', '.join(map(str, known))}")
    tokens = config.data.sequence_length
    grids = [(world, size) for world in ranks for size in group_sizes(config, sequences, world)]
    cuts = [Layout(kind, size, tokens).interval_tokens for kind in layouts for _, size in grids]
    segment_tokens = config.parallel.segment_tokens or max(math.gcd(*cuts) // CHUNK, 1) * CHUNK
    return Request(
        config=config.model_copy(update={"engine": config.engine.model_copy(update={"dtype": dtype})}),
        ranks=tuple(ranks),
        layouts=tuple(layouts),
        transports=tuple(transports),
        stages=tuple(stages) or (config.engine.zero_stage,),
        sequences=tuple(sequences),
        segment_tokens=segment_tokens,
        rows=config.train.micro_batch * math.lcm(*(world // size for world, size in grids)),
    )


def group_sizes(config: Config, sequences: Sequence[int], world: int) -> list[int]:
    """The sizes among ``sequences`` that a world can be cut into; without any the configuration's.

    Raises:
        UsageError: none of them divides the world.
    """
    if not sequences:
        return [sequence_size(config, world)]
    sizes = [size for size in dict.fromkeys(sequences) if world % size == 0]
    if not sizes:
        raise UsageError(
            f"--ranks {world}: none of --sequence {','.join(map(str, sequences))} divides it; add 1, which always does"
        )
    return sizes


def sequence_size(config: Config, world: int) -> int:
    """Ranks of a sequence group in this world: ``parallel.sequence``, or all of a world that is no larger."""
    size = min(config.parallel.sequence or world, world)
    if world % size:
        raise UsageError(f"--ranks {world}: parallel.sequence={size} does not divide it; take a multiple of {size}")
    return size


# What a rank does.


def rank_main(folder: Path) -> None:
    """One rank of a world that :func:`run` started; rank 0 leaves the world's cases in the folder."""
    request, environment = Request.load(folder), find_environment()
    if environment.world_size == 1:
        torch.save(find_truth(request), folder / TRUTH)
    cases = []
    if environment.world_size in request.ranks:
        cases = check_world(request, environment, torch.load(folder / TRUTH, weights_only=False, mmap=True))
    if environment.rank == 0:
        (folder / f"{environment.world_size}.json").write_text(json.dumps([dataclasses.asdict(case) for case in cases]))


def find_truth(request: Request) -> Truth:
    """One process, no engine, no process group: losses, gradients, and the delta rule's inputs on their way."""
    config, step = request.config, _step(request)
    model = make_model(config, recompute=False)
    loss, gradients, calls = _one_process(request, model, step, "fp32")
    errors: dict[str, float] = {}
    if request.dtype == "bf16":
        _, ours, calls = _one_process(request, model, step, "bf16")
        errors = {name: relative_error(ours[name], want) for name, want in gradients.items()}
    doc_starts = [sequence.doc_starts for sequence in step.sequences[: config.train.micro_batch]]
    plan = _plan(request, ONE, doc_starts, "contiguous", "p2p")
    for call in calls:
        call.replayed = replay(call, plan)
    return Truth(loss, gradients, errors, calls, doc_starts)


def _one_process(request: Request, model: Decoder, step: Step, dtype: str) -> tuple[float, Gradients, list[Call]]:
    """Loss, gradients and the calls of the first micro-batch, by plain autograd."""
    rows, where = request.config.train.micro_batch, device()
    model.zero_grad(set_to_none=True)
    loss = 0.0
    recorded: list[Call] = []
    for micro in range(request.rows // rows):
        part, plan = _micro_batch(request, ONE, step, micro, "contiguous", "p2p")
        with recording() as calls:
            with torch.autocast(where.type, torch.bfloat16, enabled=dtype == "bf16"):
                loss_sum = model(part.tokens_BT.to(where), part.targets_BT.to(where), plan)
            (loss_sum / step.targets).backward()
        loss += float(loss_sum.detach()) / step.targets
        recorded = recorded or calls
    return loss, {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}, recorded


def check_world(request: Request, environment: Environment, truth: Truth) -> list[Case]:
    """Every layout and transport at this world size. Every rank calls it, and gets the verdict over all of them."""
    from dnsp.engine import Engine  # DeepSpeed: not in the process that only asks, nor where the truth is found

    config = request.config
    watchdog.take_device(environment)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores() // environment.local_world_size))
    watchdog.join(environment)
    step, cases = _step(request), []
    for size in request.sizes(environment.world_size):
        watchdog.from_all(None)  # a group is made within run.timeout, and ranks may come to it at different times
        grid = make_grid(size, config.run.timeout)
        why_not = watchdog.peer_refusal(grid)
        if why_not and "peer" in request.transports:
            raise UsageError(f"--transports peer: {why_not}; take p2p or gather")
        everyone = Transport(grid.everyone, range(grid.world), grid.rank)
        accumulation = request.rows // (config.train.micro_batch * grid.data_size)
        ways = list(itertools.product(request.layouts, request.transports))
        differing = [_differing(request, grid, truth, *way) for way in ways]  # the stage has no part in it
        for stage in request.stages:
            settings = _at_stage(config, stage)
            engine = Engine(make_model(config, config.engine.activation_checkpointing), settings, grid, accumulation)
            for (layout, transport), count in zip(ways, differing, strict=True):
                mine = _check_case(request, grid, engine, step, truth, layout, transport, count)
                watchdog.check_peers()
                all_ranks = everyone.all_gather(mine, "the verdict")
                cases.append(_judge(request, truth, grid, stage, layout, transport, all_ranks))
    watchdog.leave()
    return cases


def _at_stage(config: Config, stage: int) -> Config:
    """The configuration at another ZeRO stage; what it has no use for is off."""
    engine = config.engine
    host = {
        "offload_optimizer": engine.offload_optimizer and stage > 0,
        "offload_parameters": engine.offload_parameters and stage == 3,
    }
    return config.model_copy(update={"engine": engine.model_copy(update={"zero_stage": stage, **host})})


def _differing(request: Request, grid: Grid, truth: Truth, layout: str, transport: str) -> int:
    """Outputs and input gradients of the replayed delta rule that have other bits than one process's."""
    plan = _plan(request, grid, truth.doc_starts, layout, transport)
    count = 0
    for call in truth.calls:
        ours = replay(call, plan)
        count += sum(not torch.equal(ours[name], plan.local(want)) for name, want in call.replayed.items())
    return count


def _check_case(
    request: Request,
    grid: Grid,
    engine: Engine,
    step: Step,
    truth: Truth,
    layout: str,
    transport: str,
    differing: int,
) -> Tensor:
    """This rank's figures as one vector, fp64: loss, differing replays, and every parameter's error in order."""
    loss = torch.zeros((), dtype=torch.float64)
    for micro in range(engine.accumulation):
        part, plan = _micro_batch(request, grid, step, micro, layout, transport)
        tokens, targets, asked = part.to(engine.device)
        loss += engine.backward(tokens, targets, plan, step.targets, asked).double().cpu() / step.targets
        if micro + 1 < engine.accumulation:
            engine.advance()
    errors = [relative_error(engine.gradient(name).cpu(), want) for name, want in truth.gradients.items()]
    engine.skip()
    return torch.tensor([float(loss), differing, *errors], dtype=torch.float64)


def _judge(
    request: Request, truth: Truth, grid: Grid, stage: int, layout: str, transport: str, ranks_PN: Tensor
) -> Case:
    """The verdict over all ranks' figures: losses add up, of everything else the worst counts."""
    loss, differing = float(ranks_PN[:, 0].sum()), int(ranks_PN[:, 1].max())
    errors = dict(zip(truth.gradients, ranks_PN[:, 2:].amax(0).tolist(), strict=True))
    worst = max(errors, key=lambda name: errors[name])
    loss_error = abs(loss - truth.loss) / abs(truth.loss)
    good = errors[worst] <= GRADIENT_TOLERANCE if request.dtype == "fp32" else _as_near_in_bf16(truth, errors)
    good = good and loss_error <= LOSS_TOLERANCE[request.dtype] and differing == 0
    place = (grid.world, grid.sequence_size, stage, layout, transport)
    return Case(*place, loss, loss_error, worst, errors[worst], differing == 0, good)


def _as_near_in_bf16(truth: Truth, errors: dict[str, float]) -> bool:
    """Whether these errors are those of one bf16 process but for BF16_FACTOR: of the whole gradient, and of its tensors
    in the geometric mean. (Of a tensor of two numbers the ratio of two rounding errors says nothing.)"""
    one, norm = truth.bf16_errors, {name: float(want.norm()) for name, want in truth.gradients.items()}
    whole = math.hypot(*(errors[n] * norm[n] for n in norm)) / math.hypot(*(one[n] * norm[n] for n in norm))
    ratios = [errors[n] / one[n] for n in norm if errors[n] > 0 and one[n] > 0]
    typical = math.exp(sum(map(math.log, ratios)) / len(ratios))
    wrong = [n for n in norm if errors[n] > max(BF16_WRONG, 4 * one[n])]
    return whole <= BF16_FACTOR and typical <= BF16_FACTOR and not wrong


def relative_error(got: Tensor, want: Tensor) -> float:
    """``|got - want| / |want|``, in fp64; where the truth is zero only zero is right, and a NaN never is."""
    difference, size = (got.double() - want.double()).norm(), want.double().norm()
    if difference == 0:
        return 0.0
    ratio = float(difference / size)
    return ratio if math.isfinite(ratio) else math.inf


def make_model(config: Config, recompute: bool) -> Decoder:
    """The weights that training would start from."""
    torch.manual_seed(config.train.seed)
    return Decoder(config.model, recompute).to(device())


def device() -> torch.device:
    """This process's."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _step(request: Request) -> Step:
    data = open_data(request.config.data, vocab_size=request.config.model.vocab_size)
    data.check_length(request.tokens)
    return data.step(data.start, request.tokens, request.rows)


def _micro_batch(request: Request, grid: Grid, step: Step, micro: int, layout: str, by: str) -> tuple[Batch, Plan]:
    rows = batch(
        step,
        micro,
        micro_batch=request.config.train.micro_batch,
        data_rank=grid.data_rank,
        data_size=grid.data_size,
        intervals=Layout(layout, grid.sequence_size, request.tokens).intervals(grid.sequence_rank),
        vocab_size=request.config.model.vocab_size,
    )
    return rows, _plan(request, grid, rows.doc_starts, layout, by)


def _plan(request: Request, grid: Grid, doc_starts: list[list[int]], layout: str, transport: str) -> Plan:
    chosen: str = request.config.parallel.attention_transport
    if chosen == "auto":
        chosen = "ring" if transport == "p2p" or (transport == "peer" and grid.near is not None) else transport
    return make_plan(
        doc_starts,
        Layout(layout, grid.sequence_size, request.tokens),
        grid,
        request.segment_tokens,
        transport=transport,
        attention_transport=chosen,
        attention_backend=request.config.parallel.attention_backend,
    ).to(device())
