"""``dnsp bench delta``: the gated delta rule, ours and the peers' that are installed, in one process by turns.

Three kinds of call: the forward pass without gradients, the forward pass of a training step (which keeps what the
backward pass needs), and forward and backward. Reported: medians, their ratios, peak memory above what was allocated
before the call, errors of the outputs and of every gradient, and what the time is of the device's ceilings, by the
least work that there is: :mod:`.delta_shapes` has the formulas. Beside what a shape asks for (given segments, several
documents) ours is measured without it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from dnsp.bench import common
from dnsp.bench.common import MIB, Ceilings, Runs
from dnsp.bench.delta_shapes import (
    CPU_SHAPES,
    RESULTS,
    SHAPES,
    Inputs,
    Shape,
    compute,
    make_inputs,
    measure_errors,
    parse_shape,
)
from dnsp.bench.peers import PACKAGES, Peer, find_peers
from dnsp.json_files import write_json
from dnsp.kernels.backend import kernels_for_program

PASSES = {"inference": "no grad", "forward": "forward", "training": "forward + backward"}

# Errors of outputs and of gradients; what is beyond them is wrong.
LIMITS = {"bf16": (5e-3, 1e-2), "fp16": (5e-3, 1e-2), "fp32": (1e-5, 1e-4)}
BESIDE_PEERS = 1.1  # times the better peer's error, at most

# What the kernels are to reach: a ratio of ours, at most.
NO_SLOWER, OF_FLA, DETERMINISTIC, DOCUMENTS, MEMORY = 1.0, 1 / 3, 1.15, 1.05, 1.0
SHOWN = 0.003  # of a pass: kernels below are in the file alone
OWN_SEGMENTS, ONE_DOCUMENT = "dnsp, own segments", "dnsp, one document"


@dataclass
class Side:
    """One way to compute it. ``checked``: whether the shape's truth is its own."""

    name: str
    call: Callable[[Inputs], Tensor]
    checked: bool = True
    runs: dict[str, Runs] = field(default_factory=lambda: {name: Runs() for name in PASSES})
    errors: dict[str, float] = field(default_factory=dict)
    peak: int | None = None

    def work(self, what: str, inputs: Inputs) -> Any:
        if what == "inference":
            with torch.no_grad():
                return self.call(inputs)
        o = self.call(inputs)
        return o if what == "forward" else torch.autograd.grad(o, inputs.leaves, inputs.do)

    def turn(self, what: str, inputs: Sequence[Inputs], n: int) -> Any:
        return self.work(what, inputs[n % len(inputs)])

    def results(self, inputs: Inputs) -> dict[str, Tensor]:
        """By :data:`RESULTS`, as far as it comes; what fails is noted where its time would be."""
        found: dict[str, Tensor] = {}
        try:
            o = self.call(inputs)
            found["o"] = o.detach()
            found |= zip(RESULTS[1:], torch.autograd.grad(o, inputs.leaves, inputs.do), strict=True)
        except Exception as error:  # a peer may fail in any way
            for what in ("training",) if found else PASSES:
                self.runs[what].failure = common.reason(error)
        return found


def _ours(shape: Shape) -> list[Side]:
    """As the shape says, and beside it without what it asks for."""
    sides = [Side("dnsp", partial(compute, shape))]
    if shape.segment_tokens is not None:
        sides.append(Side(OWN_SEGMENTS, partial(compute, replace(shape, segment_tokens=None))))
    if shape.documents > 1:
        sides.append(Side(ONE_DOCUMENT, partial(compute, replace(shape, documents=1)), checked=False))
    return sides


def _peer(peer: Peer, shape: Shape) -> Side:
    op = peer.op("chunk_gated_delta_rule")

    def call(x: Inputs) -> Tensor:
        assert op is not None
        return op(
            q=x.q, k=x.k, v=x.v, g=x.g, beta=x.beta, use_qk_l2norm_in_kernel=shape.l2norm, cu_seqlens=x.cu_seqlens
        )[0]  # fmt: skip

    return Side(peer.name, call)


def run(
    shapes: Sequence[str] = (),
    *,
    runs: int = 20,
    warmup: int = 3,
    peers: str = "all",
    deterministic: bool = False,
    errors: bool = True,
    cold: bool = False,
    profile: Path | None = None,
    json_path: Path | None = None,
) -> int:
    """Measure and print; returns the exit status, 1 where ours failed or computed wrong numbers.

    ``cold``: the first call of a fresh process instead, without and with what an earlier one left (:mod:`.cold`).

    Raises: UsageError for what cannot be measured.
    """
    device = common.find_device()
    common.check_runs(runs, warmup)
    asked = shapes or (SHAPES if device.type == "cuda" else CPU_SHAPES)
    wanted = [parse_shape(text, deterministic) for text in asked]
    found_peers = [] if cold else find_peers(peers, device)
    console = common.make_console()
    report: dict[str, Any] = common.describe(device, PACKAGES)
    if cold:
        from dnsp.bench.cold import first_calls

        report["first_calls"] = first_calls(wanted if shapes else wanted[:1], console)
        write_json(json_path, report)
        return int(any("failure" in call for calls in report["first_calls"] for call in calls["processes"]))
    ceilings = Ceilings.of(device)
    report |= ceilings.to_json()
    report["kernels"] = kernels_for_program() or ("triton" if device.type == "cuda" else "torch")
    report |= {"runs": runs, "warmup": warmup, "peers_missing": {p.name: p.missing for p in found_peers if p.missing}}
    report |= {"shapes": [], "goals": [], "wrong": []}
    common.say_what(report, console)
    profiles: dict[str, Any] = common.describe(device, PACKAGES) | {"shapes": []}
    present = [peer for peer in found_peers if not peer.missing]
    for n, shape in enumerate(wanted, 1):
        with console.status(f"{n} of {len(wanted)}: {shape}"):
            sides = [*_ours(shape), *(_peer(peer, shape) for peer in present)]
            inputs, said = _measure(shape, sides, runs, warmup, errors, device)
            if profile is not None:
                profiles["shapes"].append(_profile(shape, sides, inputs[0], device))
                write_json(profile, profiles)
            del inputs
        figures = _figures(shape, sides, ceilings) | said
        report["shapes"].append(figures)
        report["goals"] += goals(figures) if device.type == "cuda" else []
        report["wrong"] += wrong(figures)
        console.print(times_table(figures))
        if errors:
            console.print(errors_table(figures))
        for failure in _failures(figures):
            console.print(failure, markup=False)
        if profile is not None:
            for table in profile_tables(profiles["shapes"][-1]):
                console.print(table)
        write_json(json_path, report)
    if report["goals"]:
        console.print(common.goals_table(report["goals"]))
    for line in report["wrong"]:
        console.print(f"wrong: {line}", markup=False)
    return int(bool(report["wrong"]))


def _measure(
    shape: Shape, sides: list[Side], runs: int, warmup: int, errors: bool, device: torch.device
) -> tuple[list[Inputs], dict[str, Any]]:
    """Errors first, then times, then peak memory. Returns the inputs, as many sets as lie beyond the L2 cache, and how
    it was measured."""
    common.give_back_memory(device)  # to the process that proves kernels for a new shape
    inputs = [make_inputs(shape, device)]
    for seed in range(1, common.copies_beyond_cache(inputs[0].bytes, device)):
        more = make_inputs(shape, device, seed)
        inputs.append(replace(more, cu_seqlens=inputs[0].cu_seqlens))  # peers remember what they make of this tensor
    said: dict[str, Any] = {"input_sets": len(inputs), "truth": "not asked for"}
    found = [side.results(inputs[0]) for side in sides]
    if errors:
        checked = [n for n, side in enumerate(sides) if side.checked]
        every, said["truth"] = measure_errors(shape, inputs[0], [found[n] for n in checked], device)
        for n, errors_of in zip(checked, every, strict=True):
            sides[n].errors = errors_of
    del found
    common.give_back_memory(device)
    for what in PASSES:
        calls = [(side.runs[what], partial(side.turn, what, inputs)) for side in sides]
        common.take_turns(calls, runs, warmup, device)
    for side in sides:
        if not side.runs["training"].failure:
            side.peak = common.peak_bytes(partial(side.work, "training", inputs[0]), device)
    return inputs, said


def _figures(shape: Shape, sides: list[Side], ceilings: Ceilings) -> dict[str, Any]:
    work = {what: {"flops": shape.flops(what), "bytes": shape.bytes(what)} for what in PASSES}
    figures: dict[str, Any] = {"shape": asdict(shape), "name": str(shape), "work": work, "sides": []}
    ours = sides[0]
    for side in sides:
        row: dict[str, Any] = {"name": side.name, "passes": {}, "ours_over_this": {}}
        for what, record in side.runs.items():
            row["passes"][what] = record.to_json()
            if record.median is None or record.failure:
                continue
            row["passes"][what] |= ceilings.fractions(record.median, shape.bytes(what), shape.flops(what))
            mine = ours.runs[what]
            if side is not ours and mine.median is not None and not mine.failure:
                row["ours_over_this"][what] = mine.median / record.median
        row["errors"] = {name: e if math.isfinite(e) else str(e) for name, e in side.errors.items()}
        row["peak_mib"] = None if side.peak is None else side.peak / MIB
        if side is not ours and side.peak and ours.peak:
            row["ours_over_this"]["memory"] = ours.peak / side.peak
        if side is not ours and side.errors and ours.errors:
            ratios = [_over(ours.errors[name], e) for name, e in side.errors.items() if name in ours.errors]
            row["ours_over_this"]["worst_error"] = max(ratios)
        figures["sides"].append(row)
    return figures


def _over(ours: float, its: float) -> float:
    """A ratio of errors that JSON can hold."""
    if not math.isfinite(its):
        return 0.0
    return min(ours / its, 1e9) if its and math.isfinite(ours) else (0.0 if ours == 0 else 1e9)


def goals(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """What the kernels are to reach at a shape, as ratios of ours, and what they do."""
    sides = {row["name"]: row["ours_over_this"] for row in figures["sides"][1:]}
    peers = {name: row for name, row in sides.items() if name not in (OWN_SEGMENTS, ONE_DOCUMENT)}
    found: list[dict[str, Any]] = []

    def goal(what: str, value: float | None, limit: float) -> None:
        if value is not None:
            found.append(common.goal(figures, what, value, limit))

    for what in ("forward", "training"):
        against = [row[what] for row in peers.values() if what in row]
        goal(f"{PASSES[what]} / the fastest peer's", max(against, default=None), NO_SLOWER)
    if figures["shape"]["tokens"] == 32768 and figures["shape"]["value_heads"] == 32:
        goal("forward + backward / fla's", sides.get("fla", {}).get("training"), OF_FLA)
    goal("memory / flash-qla's", sides.get("flash-qla", {}).get("memory"), MEMORY)
    goal("worst error / the better peer's", _beside_peers(figures, list(peers)), BESIDE_PEERS)
    goal("given segments / own choice", sides.get(OWN_SEGMENTS, {}).get("training"), DETERMINISTIC)
    goal("documents / one document", sides.get(ONE_DOCUMENT, {}).get("training"), DOCUMENTS)
    return found


def _beside_peers(figures: dict[str, Any], peers: Sequence[str]) -> float | None:
    """The worst of a result's errors over the better peer's."""
    rows = {row["name"]: {name: float(e) for name, e in row["errors"].items()} for row in figures["sides"]}
    ratios = []
    for name, ours in rows["dnsp"].items():
        theirs = [rows[peer][name] for peer in peers if name in rows[peer]]
        if finite := [e for e in theirs if math.isfinite(e)]:
            ratios.append(_over(ours, min(finite)))
    return max(ratios, default=None)


def wrong(figures: dict[str, Any]) -> list[str]:
    """What of ours failed or is beyond its limit, in words."""
    outputs, gradients = LIMITS[figures["shape"]["dtype"]]
    found: list[str] = []
    for row in figures["sides"]:
        if not row["name"].startswith("dnsp"):
            continue
        at = f"{figures['name']}: {row['name']}"
        for name, error in row["errors"].items():
            limit = outputs if name == "o" else gradients
            if not float(error) <= limit:
                found.append(f"{at}: {name} is off by {float(error):.2e}, more than {limit:g}")
        for what, record in row["passes"].items():
            if "failure" in record:
                found.append(f"{at}: {PASSES[what]}: {record['failure']}")
    return found


def _failures(figures: dict[str, Any]) -> list[str]:
    """A line for each peer and reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in figures["sides"]:
        for what, record in row["passes"].items():
            if "failure" in record and not row["name"].startswith("dnsp"):
                reasons.setdefault((row["name"], record["failure"]), []).append(PASSES[what])
    return [f"{name}: {', '.join(passes)}: {why}" for (name, why), passes in reasons.items()]


def times_table(figures: dict[str, Any]) -> Table:
    columns = ["dnsp / it: no grad", "fwd", "fwd+bwd", "memory", "ms: no grad", "fwd", "fwd+bwd"]
    columns += ["of fwd+bwd: min", "spread", "alone", "copy", "matmul", "MiB"]
    table = common.make_table(figures["name"], *columns)
    for row in figures["sides"]:
        cells = [common.cell(row["ours_over_this"].get(what), ".3f") for what in (*PASSES, "memory")]
        cells += [common.cell(row["passes"][what].get("ms"), ".3f") for what in PASSES]
        both = row["passes"]["training"]
        cells += [common.cell(both.get("min_ms"), ".3f"), common.cell(both.get("spread"), ".1%")]
        cells += [common.cell(both.get("alone_ms"), ".3f")]
        cells += [common.cell(both.get("copy_fraction"), ".1%"), common.cell(both.get("matmul_fraction"), ".1%")]
        table.add_row(row["name"], *cells, common.cell(row["peak_mib"], ",.0f"))
    return table


def errors_table(figures: dict[str, Any]) -> Table:
    table = common.make_table(f"errors; truth: {figures['truth']}", "dnsp / it, worst", *RESULTS)
    for row in figures["sides"]:
        if row["errors"]:
            cells = (common.cell(row["errors"].get(name), ".2e") for name in RESULTS)
            table.add_row(row["name"], common.cell(row["ours_over_this"].get("worst_error"), ".2f"), *cells)
    return table


def _profile(shape: Shape, sides: list[Side], inputs: Inputs, device: torch.device) -> dict[str, Any]:
    """Kernels of the forward and of the backward pass, each by itself."""
    found: dict[str, Any] = {"name": str(shape), "shape": asdict(shape), "sides": {}}
    for side in sides:
        with contextlib.suppress(Exception):  # what fails has said so
            forward = common.kernel_times(partial(side.work, "forward", inputs), device)
            found["sides"][side.name] = {"forward": forward}
            o = side.call(inputs)

            def backward(o: Tensor = o) -> Any:
                return torch.autograd.grad(o, inputs.leaves, inputs.do, retain_graph=True)

            backward()  # a first call may compile
            found["sides"][side.name]["backward"] = common.kernel_times(backward, device)
            del o, backward
    return found


def profile_tables(found: dict[str, Any]) -> list[Table]:
    tables = []
    for name, passes in found["sides"].items():
        for what, kernels in passes.items():
            total = sum(kernel["us"] for kernel in kernels)
            table = common.make_table(f"{name}: {what}, {total:,.0f} us", "us", "share", "launches")
            for kernel in kernels:
                us, launches = kernel["us"], kernel["launches"]
                if us >= SHOWN * total:
                    table.add_row(escape(kernel["kernel"][:90]), f"{us:,.1f}", f"{us / total:.1%}", f"{launches:g}")
            tables.append(table)
    return tables
