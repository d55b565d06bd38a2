"""``dnsp bench decode``: one token for B sequences, eagerly and as a CUDA graph, beside fla's kernels.

    delta step    the delta rule alone, q and k normalised in it; fla's recurrent op, with both of its layouts of states
    layer step    all of a gated delta layer between its projections and its output norm: convolution, gates, delta
                  rule; fla's kernels as its own layer calls them, a convolution each for q, k and v

A decoder's states come from memory: steps take turns over so many states that none is found in the L2 cache. A graph
holds one such round, a step after another; *one state* is a graph whose steps all update the same one, which then may
lie in the cache. Times are those of a step: of a round, over its steps. Eager steps are timed with the host's work,
from an idle device on; graphs by what the device takes.

Memory is the peak of what a step allocates, above what was allocated before it: a step in place needs its outputs
alone. Errors are those of a step against torch operations in fp64. :mod:`.decode_shapes` has the formulas of the bytes.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from dnsp.bench import common
from dnsp.bench.common import MIB, Ceilings, Runs
from dnsp.bench.decode_shapes import CPU_SHAPES, SHAPES, Inputs, Shape, make_inputs, parse_shape
from dnsp.bench.peers import PACKAGES, Peer, find_peers
from dnsp.json_files import write_json
from dnsp.kernels.backend import Backend
from dnsp.kernels.decode import delta_step, gated_delta_step

WAYS = {"eager": "eager", "graph": "graph", "cached": "graph, one state"}
NO_GRAPHS = "CUDA graphs need a GPU"
STEPS = 8  # of a round, at least
LIMITS = {"bf16": (5e-3, 1e-5), "fp16": (5e-3, 1e-5), "fp32": (1e-5, 1e-5)}  # of outputs, of states
LAYER_STATE = {"bf16": 1e-2, "fp16": 5e-3, "fp32": 1e-5}  # the layer's q, k, v are rounded behind the convolution
COPY_AT_64, NO_SLOWER = 0.7, 1.0  # what is to be reached: of the copy ceiling at B = 64; of fla's time at B = 1


@dataclass
class Memories:
    """``steps`` sets of a state and a tail."""

    states: list[Tensor]
    tails: list[Any]

    @staticmethod
    def make(shape: Shape, steps: int, device: torch.device) -> Memories:
        generator = torch.Generator(device).manual_seed(1)
        size = shape.batch, shape.value_heads, shape.K, shape.V
        tail = shape.batch, shape.W - 1, shape.channels
        states = [torch.randn(size, generator=generator, device=device) for _ in range(steps)]
        dtype = common.DTYPES[shape.dtype]
        tails = [torch.randn(tail, generator=generator, device=device).to(dtype) for _ in range(steps)]
        return Memories(states, tails)

    def of(self, side: Side) -> Memories:
        """As a side keeps them, and its own."""
        states = [state.mT.contiguous() if side.v_first else state.clone() for state in self.states]
        return Memories(states, [side.keep_tail(tail) for tail in self.tails])


Step = Callable[[Inputs, Tensor, Any], tuple[Tensor, Tensor]]  # inputs, state, tail; outputs and the new state


@dataclass
class Side:
    """``what``: the step that it is. ``v_first``: its states are ``[V, K]``. ``keep_tail``: its copy of a tail."""

    name: str
    what: str
    step: Step
    v_first: bool = False
    keep_tail: Callable[[Tensor], Any] = torch.clone
    runs: dict[str, Runs] = field(default_factory=lambda: {name: Runs() for name in WAYS})
    errors: dict[str, float] = field(default_factory=dict)
    peak: int | None = None

    def round(self, x: Inputs, memories: Memories, only: int | None = None) -> list[Any]:
        """A step of each state, or as many of the one. What is returned keeps every new state, as a cache does."""
        kept: list[Any] = []
        for n in range(len(memories.states)):
            at = n if only is None else only
            if only is not None:
                kept.clear()
            kept.append(self.step(x, memories.states[at], memories.tails[at]))
        return kept


def _delta(x: Inputs, state: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    return delta_step(x.q, x.k, x.v, x.g, x.beta, state, l2norm=True, backend=_backend(state)), state


def _layer(x: Inputs, state: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    weight, A_log, dt_bias = x.parameters
    o = gated_delta_step(
        x.mixed, x.a, x.b, tail, state, weight_DW=weight, A_log_H=A_log, dt_bias_H=dt_bias, backend=_backend(state)
    )
    return o, state


def _backend(state: Tensor) -> Backend | None:
    return "torch" if state.dtype == torch.float64 else None  # the truth


TRUTH = {"delta": _delta, "layer": _layer}


def _fla(peer: Peer, v_first: bool) -> Side:
    op = peer.op("fused_recurrent_gated_delta_rule")

    def step(x: Inputs, state: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        assert op is not None
        token = (y.unsqueeze(1) for y in (x.q, x.k, x.v, x.g))
        with torch.no_grad():
            o, new = op(*token, beta=x.beta.unsqueeze(1), initial_state=state, output_final_state=True,
                        use_qk_l2norm_in_kernel=True, state_v_first=v_first)  # fmt: skip
        return o.squeeze(1), new

    return Side(f"{peer.name}, states [V, K]" if v_first else peer.name, "delta", step, v_first)


def _fla_layer(peer: Peer, shape: Shape) -> Side:
    recurrent = peer.op("fused_recurrent_gated_delta_rule")
    try:
        convolve = importlib.import_module("fla.modules.causal_conv1d").causal_conv1d_update
    except Exception as error:  # it has moved before
        raise_this = error

        def convolve(**arguments: Any) -> Any:
            raise raise_this

    keys = shape.key_heads * shape.K
    parts = slice(0, keys), slice(keys, 2 * keys), slice(2 * keys, shape.channels)

    def step(x: Inputs, state: Tensor, caches: list[Tensor]) -> tuple[Tensor, Tensor]:
        assert recurrent is not None
        filters, A_log, dt_bias = x.parameters
        with torch.no_grad():
            q, k, v = (
                convolve(x=x.mixed[:, part], cache=cache, weight=filters[part], bias=None, activation="silu")[0]
                for part, cache in zip(parts, caches, strict=True)
            )
            q, k = (y.view(shape.batch, 1, shape.key_heads, shape.K) for y in (q, k))
            o, new = recurrent(
                q, k, v.view(shape.batch, 1, shape.value_heads, shape.V), x.a.unsqueeze(1), beta=x.b.unsqueeze(1),
                initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True, state_v_first=True,
                use_gate_in_kernel=True, A_log=A_log, dt_bias=dt_bias, use_beta_sigmoid_in_kernel=True,
            )  # fmt: skip
        return o.squeeze(1), new

    def keep_tail(tail_BWD: Tensor) -> list[Tensor]:
        whole = torch.nn.functional.pad(tail_BWD.mT, (1, 0))  # [B, D, W], the oldest of which is never read
        return [whole[:, part].contiguous() for part in parts]

    return Side(f"{peer.name}, layer step", "layer", step, True, keep_tail)


def run(
    shapes: Sequence[str] = (),
    *,
    runs: int = 20,
    warmup: int = 3,
    peers: str = "all",
    json_path: Path | None = None,
) -> int:
    """Measure and print; returns the exit status, 1 where ours failed or computed wrong numbers.

    Raises: UsageError for what cannot be measured.
    """
    device = common.find_device()
    common.check_runs(runs, warmup)
    wanted = [parse_shape(text) for text in shapes or (SHAPES if device.type == "cuda" else CPU_SHAPES)]
    found_peers = find_peers(peers, device, among=("fla",))
    console = common.make_console()
    ceilings = Ceilings.of(device)
    report: dict[str, Any] = common.describe(device, PACKAGES) | ceilings.to_json()
    report |= {"runs": runs, "warmup": warmup, "peers_missing": {p.name: p.missing for p in found_peers if p.missing}}
    report |= {"shapes": [], "goals": [], "wrong": []}
    common.say_what(report, console)
    for n, shape in enumerate(wanted, 1):
        sides = [Side("dnsp, delta step", "delta", _delta), Side("dnsp, layer step", "layer", _layer)]
        for peer in found_peers:
            if not peer.missing:
                sides += [_fla(peer, False), _fla(peer, True), _fla_layer(peer, shape)]
        with console.status(f"{n} of {len(wanted)}: {shape}"):
            steps = common.copies_beyond_cache(shape.state_bytes, device, STEPS)
            _measure(shape, sides, steps, runs, warmup, device)
        figures = _figures(shape, sides, steps, ceilings)
        report["shapes"].append(figures)
        report["goals"] += goals(figures)
        report["wrong"] += wrong(figures)
        console.print(table(figures))
        for row in figures["sides"]:
            for way, record in row["ways"].items():
                if record.get("failure", NO_GRAPHS) != NO_GRAPHS and not row["name"].startswith("dnsp"):
                    console.print(f"{row['name']}: {WAYS[way]}: {record['failure']}", markup=False)
        write_json(json_path, report)
    if report["goals"]:
        console.print(common.goals_table(report["goals"]))
    for line in report["wrong"]:
        console.print(f"wrong: {line}", markup=False)
    return int(bool(report["wrong"]))


def _measure(shape: Shape, sides: list[Side], steps: int, runs: int, warmup: int, device: torch.device) -> None:
    common.give_back_memory(device)
    x = make_inputs(shape, device)
    first = Memories.make(shape, 1, device)
    for side in sides:
        _check(side, x, first)
    of_sides = {}
    for side in sides:
        own = of_sides[side.name] = Memories.make(shape, steps, device).of(side)
        if side.errors:
            side.peak = common.peak_bytes(partial(side.step, x, own.states[0], own.tails[0]), device)
    for way in WAYS:
        calls: list[tuple[Runs, Callable[[int], Any]]] = []
        for side in sides:
            if not side.runs[way].failure:
                calls.append((side.runs[way], _call(side, way, x, of_sides[side.name], device)))
        common.take_turns(calls, runs, warmup, device, ahead=way != "eager")
        for record, _ in calls:
            record.seconds = [s / steps for s in record.seconds]
            record.alone = [s / steps for s in record.alone]


def _call(side: Side, way: str, x: Inputs, memories: Memories, device: torch.device) -> Callable[[int], Any]:
    if way == "eager":
        return lambda n: side.round(x, memories)
    if device.type != "cuda":
        side.runs[way].failure = NO_GRAPHS
        return lambda n: None
    graph, kept = torch.cuda.CUDAGraph(), []
    try:
        with torch.cuda.graph(graph):
            kept += side.round(x, memories, 0 if way == "cached" else None)
    except Exception as error:  # a peer may wait for the device
        side.runs[way].failure = common.reason(error)

    def replay(n: int) -> Any:
        graph.replay()
        return kept  # what the graph writes to lives as long as it does

    return replay


def _check(side: Side, x: Inputs, memories: Memories) -> None:
    """The errors of one step; what fails has no times."""
    exact_state, tail = memories.states[0].double(), memories.tails[0].double()
    exact, exact_state = TRUTH[side.what](x.double(), exact_state, tail)
    own = memories.of(side)
    try:
        o, new = side.step(x, own.states[0], own.tails[0])
        new = new.mT if side.v_first else new
        side.errors = {"o": _error(o, exact), "state": _error(new, exact_state)}
    except Exception as error:
        for record in side.runs.values():
            record.failure = common.reason(error)


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def _figures(shape: Shape, sides: list[Side], steps: int, ceilings: Ceilings) -> dict[str, Any]:
    work = {what: shape.bytes(what) for what in TRUTH}
    figures: dict[str, Any] = {"shape": asdict(shape), "name": str(shape), "states": steps, "bytes": work, "sides": []}
    for side in sides:
        row: dict[str, Any] = {"name": side.name, "step": side.what, "ways": {}, "ours_over_this": {}}
        for way, record in side.runs.items():
            row["ways"][way] = record.to_json()
            if record.median is None or record.failure:
                continue
            row["ways"][way] |= ceilings.fractions(record.median, shape.bytes(side.what))
            ours = next(other for other in sides if other.what == side.what)
            mine = ours.runs[way]
            if side is not ours and mine.median is not None and not mine.failure:
                row["ours_over_this"][way] = mine.median / record.median
        row["errors"] = {name: e if math.isfinite(e) else str(e) for name, e in side.errors.items()}
        row["peak_mib"] = None if side.peak is None else side.peak / MIB
        figures["sides"].append(row)
    return figures


def goals(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """What the step is to reach: no longer than fla's at one sequence, near the copy ceiling at 64."""
    rows, batch = figures["sides"], figures["shape"]["batch"]
    found = []
    for what, way in itertools.product(TRUTH, ("eager", "graph")):
        against = [row["ours_over_this"][way] for row in rows if row["step"] == what and way in row["ours_over_this"]]
        if against and batch == 1:
            found.append(common.goal(figures, f"{what} step, {WAYS[way]} / fla's", max(against), NO_SLOWER))
    for row in rows[:2]:
        reached = row["ways"]["graph"].get("copy_fraction")
        if batch == 64 and reached is not None:
            what = f"{row['name']}, graph: 70 % of the copy ceiling / reached"
            found.append(common.goal(figures, what, COPY_AT_64 / reached, 1.0))
    return found


def wrong(figures: dict[str, Any]) -> list[str]:
    """What of ours failed or is beyond its limit, in words."""
    found, dtype = [], figures["shape"]["dtype"]
    for row in figures["sides"][:2]:
        at = f"{figures['name']}: {row['name']}"
        limits = dict(zip(("o", "state"), LIMITS[dtype], strict=True))
        if row["step"] == "layer":
            limits["state"] = LAYER_STATE[dtype]
        for name, error in row["errors"].items():
            if not float(error) <= limits[name]:
                found.append(f"{at}: {name} is off by {float(error):.2e}, more than {limits[name]:g}")
        for way, record in row["ways"].items():
            if record.get("failure", NO_GRAPHS) != NO_GRAPHS:
                found.append(f"{at}: {WAYS[way]}: {record['failure']}")
    return found


def table(figures: dict[str, Any]) -> Table:
    ratios = [f"dnsp / it: {way}" for way in ("eager", "graph")]
    columns = [*ratios, *(f"us: {label}" for label in WAYS.values()), "spread", "copy", "one state"]
    columns += ["MiB", "o", "state"]
    rows = common.make_table(f"{figures['name']}, over {figures['states']} states", *columns)
    for row in figures["sides"]:
        ways = row["ways"]
        timed = ways["graph"] if "ms" in ways["graph"] else ways["eager"]
        cells = [common.cell(row["ours_over_this"].get(way), ".3f") for way in ("eager", "graph")]
        cells += [common.cell(1e3 * ways[way]["ms"] if "ms" in ways[way] else None, ",.2f") for way in WAYS]
        cells += [common.cell(timed.get("spread"), ".1%"), common.cell(timed.get("copy_fraction"), ".1%")]
        cells += [common.cell(ways["cached"].get("copy_fraction"), ".1%"), common.cell(row["peak_mib"], ",.1f")]
        rows.add_row(row["name"], *cells, *(common.cell(row["errors"].get(name), ".1e") for name in ("o", "state")))
    return rows
