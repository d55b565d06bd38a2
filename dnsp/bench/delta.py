"""``dnsp bench delta``: the gated delta rule, ours and the peers' that are installed, in one process by turns.

Three kinds of call: the forward pass without gradients, the forward pass of a training step (which keeps what the
backward pass needs), and forward and backward. Reported: medians, their ratios, peak memory above what was allocated
before the call, errors ``|found - truth| / |truth|`` of the outputs and of every gradient, and what the time is of the
device's ceilings, by the least work that there is. With C = 64, H key and HV value heads, T tokens in all:

    FLOPs of forward     T (HV (6 K V + 4 C V) + H 4 C K)
                         K S, Q S, K^T V'; A R, P V'; K K^T, Q K^T: whole squares; the inverse, under 1 %, is left out
    FLOPs of backward    twice that: a product each for the gradients of both factors; nothing computed anew counts
    bytes of forward     T (2 H K + 2 HV V) numbers and T 2 HV fp32 gates: q, k, v, g, beta in, o out
    bytes of backward    T (4 H K + 3 HV V) numbers and T 4 HV fp32 gates: q, k, v, do, g, beta in, their gradients out

Truth is the chunked form in torch operations in fp64 (1e-15 from the recurrence), on the same rounded inputs; heads
are independent of each other, and it takes as many at a time as fit the device.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from dnsp.bench import common
from dnsp.bench.common import MIB, Ceilings, Runs
from dnsp.bench.peers import PACKAGES, Peer, find_peers
from dnsp.choices import MULTIPROCESSORS, filling
from dnsp.errors import UsageError
from dnsp.kernels.delta_rule import Backend, chunk_gated_delta_rule
from dnsp.kernels.segments import CHUNK, check_segment_tokens
from dnsp.parallel.layout import Layout

KEYS = ("tokens", "heads", "K", "V", "batch", "dtype", "decay", "documents", "segment_tokens", "l2norm")
PASSES = {"inference": "no grad", "forward": "forward", "training": "forward + backward"}
RESULTS = ("o", "dq", "dk", "dv", "dg", "dbeta")

# What is measured where nothing is asked for.
SHAPES = (
    "tokens=32768",
    "tokens=32768,decay=-1e-4",
    "tokens=32768,segment_tokens=deterministic",
    "tokens=32768,documents=128",
    "tokens=32768,heads=16",
    "tokens=4096,batch=32",
    "tokens=131072",
    "tokens=131072,decay=-1e-4",
    "tokens=131072,decay=-20",
    "tokens=131072,heads=4/8",
)
CPU_SHAPES = ("tokens=512,heads=2/4,K=64,V=64", "tokens=512,heads=2/4,K=64,V=64,decay=-20,documents=5")

# Errors of outputs and of gradients; what is beyond them is wrong.
LIMITS = {"bf16": (5e-3, 1e-2), "fp16": (5e-3, 1e-2), "fp32": (1e-5, 1e-4)}
BESIDE_PEERS = 1.1  # times the better peer's error, at most

# What the kernels are to reach: a ratio of ours, at most.
NO_SLOWER, OF_FLA, DETERMINISTIC, DOCUMENTS, MEMORY = 1.0, 1 / 3, 1.15, 1.05, 1.0
SHOWN = 0.003  # of a pass: kernels below are in the file alone
OWN_SEGMENTS, ONE_DOCUMENT = "dnsp, own segments", "dnsp, one document"


@dataclass(frozen=True)
class Shape:
    """``decay``: ``logsigmoid``, for ``logsigmoid(N(0, 1)) / 16`` a token, or a constant. ``segment_tokens`` None: the
    op's own choice. ``l2norm``: q and k are normalised in the call, or before it."""

    tokens: int = 32768
    key_heads: int = 16
    value_heads: int = 32
    K: int = 128
    V: int = 128
    batch: int = 1
    dtype: str = "bf16"
    decay: str = "logsigmoid"
    documents: int = 1
    segment_tokens: int | None = None
    l2norm: bool = True

    def __str__(self) -> str:
        rows = f"{self.batch} x " if self.batch > 1 else ""
        parts = [f"{rows}{self.tokens:,} tokens, {self.key_heads}/{self.value_heads} heads, K={self.K}, V={self.V}"]
        parts += [self.dtype, f"decay {self.decay}"]
        parts += [f"{self.documents} documents"] * (self.documents > 1)
        parts += [] if self.segment_tokens is None else [f"segments of {self.segment_tokens:,}"]
        parts += ["q and k normalised before"] * (not self.l2norm)
        return ", ".join(parts)

    @property
    def all_tokens(self) -> int:
        return self.batch * self.tokens

    def flops(self, what: str) -> int:
        """Of ``forward`` (or ``inference``), or of both passes, ``training``."""
        of_values = self.value_heads * (6 * self.K * self.V + 4 * CHUNK * self.V)
        forward = self.all_tokens * (of_values + self.key_heads * 4 * CHUNK * self.K)
        return 3 * forward if what == "training" else forward

    def bytes(self, what: str) -> int:
        """The least that is read and written."""
        size = common.DTYPES[self.dtype].itemsize
        keys, values = self.key_heads * self.K, self.value_heads * self.V
        forward = size * (2 * keys + 2 * values) + 4 * 2 * self.value_heads
        backward = size * (4 * keys + 3 * values) + 4 * 4 * self.value_heads
        return self.all_tokens * (forward + (backward if what == "training" else 0))


def parse_shape(text: str, deterministic: bool = False) -> Shape:
    """``tokens=32768,heads=16/32,decay=-1e-4``; what is not named is as in :class:`Shape`.

    Raises: UsageError, for values that make no shape.
    """
    given = common.parse_settings(text, KEYS, "bench delta")
    values: dict[str, Any] = {
        key: common.whole_number(key, given[key]) for key in ("tokens", "K", "V", "batch", "documents") if key in given
    }
    if "heads" in given:
        values["key_heads"], values["value_heads"] = common.parse_heads(given["heads"])
    if "dtype" in given:
        common.parse_dtype(given["dtype"])
        values["dtype"] = given["dtype"]
    if "decay" in given:
        values["decay"] = _parse_decay(given["decay"])
    if "l2norm" in given:
        if given["l2norm"] not in ("yes", "no"):
            raise UsageError(f"l2norm={given['l2norm']}: must be yes (q, k normalised in the call) or no (before it)")
        values["l2norm"] = given["l2norm"] == "yes"
    shape = Shape(**values)
    if shape.documents > 1 and shape.batch > 1:
        raise UsageError(
            f"documents={shape.documents} with batch={shape.batch}: documents are packed into one row; give batch=1, "
            f"tokens={shape.all_tokens}"
        )
    if shape.documents > shape.tokens:
        raise UsageError(f"documents={shape.documents}: {shape.tokens} tokens hold no more than {shape.tokens} of them")
    asked = given.get("segment_tokens", "deterministic" if deterministic else "auto")
    if asked == "auto":
        return shape
    if asked == "deterministic":
        tokens = deterministic_segment_tokens(shape)
    else:
        tokens = common.whole_number("segment_tokens", asked)
        try:
            check_segment_tokens(tokens)
        except ValueError as error:
            raise UsageError(f"{error}, or auto, or deterministic") from None
    return Shape(**(values | {"segment_tokens": tokens}))


def _parse_decay(text: str) -> str:
    if text == "logsigmoid":
        return text
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not -math.inf < value <= 0:
        raise UsageError(
            f"decay={text}: must be logsigmoid, or the log decay of a token, a number of at most 0, as in decay=-1e-4"
        )
    return text


def deterministic_segment_tokens(shape: Shape) -> int:
    """What training takes where engine.deterministic asks for bits that do not depend on the device."""
    layout = Layout("contiguous", 1, shape.tokens)
    return filling(layout, shape.batch, shape.value_heads, shape.V, MULTIPROCESSORS)


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    do: Tensor
    cu_seqlens: Tensor | None

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.g, self.beta

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in (*self.leaves, self.do))

    def part(self, keys: slice, values: slice, dtype: torch.dtype) -> Inputs:
        """Some heads, as leaves of their own."""

        def leaf(x: Tensor, heads: slice) -> Tensor:
            return x.detach()[:, :, heads].to(dtype).requires_grad_()

        q, k = leaf(self.q, keys), leaf(self.k, keys)
        v, g, beta = leaf(self.v, values), leaf(self.g, values), leaf(self.beta, values)
        return Inputs(q, k, v, g, beta, self.do[:, :, values].to(dtype), self.cu_seqlens)


def make_inputs(shape: Shape, device: torch.device, seed: int = 0) -> Inputs:
    """q, k, v and the outputs' gradient from N(0, 1), beta the sigmoid of it; gates in fp32."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = common.DTYPES[shape.dtype]

    def normal(heads: int, *width: int) -> Tensor:
        return torch.randn(shape.batch, shape.tokens, heads, *width, generator=generator, device=device)

    q, k = normal(shape.key_heads, shape.K), normal(shape.key_heads, shape.K)
    if not shape.l2norm:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    v, do = normal(shape.value_heads, shape.V), normal(shape.value_heads, shape.V)
    gates = normal(shape.value_heads)
    g = F.logsigmoid(gates) / 16 if shape.decay == "logsigmoid" else torch.full_like(gates, float(shape.decay))
    beta = normal(shape.value_heads).sigmoid()
    cu_seqlens = None
    if shape.documents > 1:
        cuts = torch.randperm(shape.tokens - 1, generator=torch.Generator().manual_seed(seed))[: shape.documents - 1]
        cu_seqlens = torch.tensor([0, *sorted((cuts + 1).tolist()), shape.tokens], device=device)
    made = Inputs(q.to(dtype), k.to(dtype), v.to(dtype), g, beta, do.to(dtype), cu_seqlens)
    for leaf in made.leaves:
        leaf.requires_grad_()
    return made


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


def compute(shape: Shape, x: Inputs, backend: Backend | None = None) -> Tensor:
    """Our op's outputs."""
    cu_seqlens = x.cu_seqlens if shape.documents > 1 else None
    return chunk_gated_delta_rule(
        x.q, x.k, x.v, x.g, x.beta, use_qk_l2norm_in_kernel=shape.l2norm, cu_seqlens=cu_seqlens,
        segment_tokens=shape.segment_tokens, backend=backend,
    )[0]  # fmt: skip


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


def truth(shape: Shape, inputs: Inputs, at_once: int) -> Iterator[tuple[slice, slice, dict[str, Tensor]]]:
    """``(key heads, value heads, their results)`` in fp64, some key heads with their value heads at a time."""
    group = shape.value_heads // shape.key_heads
    for first in range(0, shape.key_heads, at_once):
        last = min(first + at_once, shape.key_heads)
        keys, values = slice(first, last), slice(first * group, last * group)
        part = inputs.part(keys, values, torch.float64)
        o = compute(replace(shape, segment_tokens=None), part, backend="torch")
        grads = torch.autograd.grad(o, part.leaves, part.do)
        yield keys, values, dict(zip(RESULTS, (o.detach(), *grads), strict=True))


def heads_at_once(shape: Shape, device: torch.device) -> int:
    """Key heads whose truth fits the device: of its free memory half, by what a token of a value head takes, about."""
    if device.type != "cuda":
        return shape.key_heads
    torch.cuda.empty_cache()
    numbers = 7 * (shape.K + shape.V) + 12 * CHUNK + 3 * shape.K * shape.V // CHUNK
    one = 8 * numbers * (shape.all_tokens + CHUNK) * shape.value_heads // shape.key_heads
    return max(1, min(shape.key_heads, torch.cuda.mem_get_info(device)[0] // 2 // one))


def measure_errors(
    shape: Shape, inputs: Inputs, found: Sequence[dict[str, Tensor]], device: torch.device
) -> tuple[list[dict[str, float]], str]:
    """``|found - truth| / |truth|`` of each result of each side, and how the truth was come by."""
    at_once = heads_at_once(shape, device)
    while True:
        try:
            return _errors(shape, inputs, found, at_once), f"fp64, {at_once} of {shape.key_heads} key heads at a time"
        except torch.OutOfMemoryError as error:
            if at_once == 1:
                return [{} for _ in found], f"no truth: {common.reason(error)}"
        at_once = at_once // 2
        gc.collect()
        torch.cuda.empty_cache()


def _errors(
    shape: Shape, inputs: Inputs, found: Sequence[dict[str, Tensor]], at_once: int
) -> list[dict[str, float]]:
    zero = torch.zeros((), dtype=torch.float64, device=inputs.v.device)
    wrong = [dict.fromkeys(results, zero) for results in found]
    size = dict.fromkeys(RESULTS, zero)
    for keys, values, exact in truth(shape, inputs, at_once):
        for name, b in exact.items():
            part = keys if name in ("dq", "dk") else values
            size[name] = size[name] + b.square().sum()
            for sums, results in zip(wrong, found, strict=True):
                if name in results:
                    sums[name] = sums[name] + (results[name][:, :, part].double() - b).square().sum()
    return [{name: _ratio(float(total), float(size[name])) for name, total in sums.items()} for sums in wrong]


def _ratio(wrong: float, size: float) -> float:
    if size == 0:  # a truth of zero is to be found as zero
        return 0.0 if wrong == 0 else math.inf
    return math.sqrt(wrong / size)


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
    found_peers = find_peers(peers, device)
    console = common.make_console()
    report: dict[str, Any] = common.describe(device, PACKAGES)
    if cold:
        from dnsp.bench.cold import first_calls

        report["first_calls"] = first_calls(wanted if shapes else wanted[:1], console)
        common.write_json(json_path, report)
        return int(any("failure" in call for calls in report["first_calls"] for call in calls["processes"]))
    ceilings = Ceilings.of(device)
    report |= ceilings.to_json()
    report |= {"runs": runs, "warmup": warmup, "peers_missing": {p.name: p.missing for p in found_peers if p.missing}}
    report |= {"shapes": [], "goals": [], "wrong": []}
    common.say_what(report, console)
    profiles: dict[str, Any] = common.describe(device, PACKAGES) | {"shapes": []}
    present = [peer for peer in found_peers if not peer.missing]
    for n, shape in enumerate(wanted, 1):
        with console.status(f"{n} of {len(wanted)}: {shape}"):
            sides = [*_ours(shape), *(_peer(peer, shape) for peer in present)]
            inputs = _measure(shape, sides, runs, warmup, errors, device, report)
            if profile is not None:
                profiles["shapes"].append(_profile(shape, sides, inputs[0], device))
                common.write_json(profile, profiles)
            del inputs
        figures = report["shapes"][-1] = _figures(shape, sides, ceilings, report["shapes"][-1])
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
        common.write_json(json_path, report)
    if report["goals"]:
        console.print(common.goals_table(report["goals"]))
    for line in report["wrong"]:
        console.print(f"wrong: {line}", markup=False)
    return int(bool(report["wrong"]))


def _measure(
    shape: Shape, sides: list[Side], runs: int, warmup: int, errors: bool, device: torch.device, report: dict[str, Any]
) -> list[Inputs]:
    """Errors first, then times, then peak memory; returns the inputs, as many sets as lie beyond the L2 cache."""
    inputs = [make_inputs(shape, device)]
    inputs += [
        make_inputs(shape, device, seed) for seed in range(1, common.copies_beyond_cache(inputs[0].bytes, device))
    ]
    said: dict[str, Any] = {"input_sets": len(inputs), "truth": "not asked for"}
    found = [side.results(inputs[0]) for side in sides]
    if errors:
        checked = [n for n, side in enumerate(sides) if side.checked]
        every, said["truth"] = measure_errors(shape, inputs[0], [found[n] for n in checked], device)
        for n, errors_of in zip(checked, every, strict=True):
            sides[n].errors = errors_of
    del found
    gc.collect()
    for what in PASSES:
        calls = [(side.runs[what], partial(side.turn, what, inputs)) for side in sides]
        common.take_turns(calls, runs, warmup, device)
    for side in sides:
        if not side.runs["training"].failure:
            side.peak = common.peak_bytes(partial(side.work, "training", inputs[0]), device)
    report["shapes"].append(said)
    return inputs


def _figures(shape: Shape, sides: list[Side], ceilings: Ceilings, said: dict[str, Any]) -> dict[str, Any]:
    work = {what: {"flops": shape.flops(what), "bytes": shape.bytes(what)} for what in PASSES}
    figures: dict[str, Any] = {"shape": asdict(shape), "name": str(shape), "work": work, **said, "sides": []}
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
    ratios = [f"dnsp / it: {label}" for label in ("no grad", "fwd", "fwd+bwd", "memory")]
    columns = [*ratios, "ms: no grad", "fwd", "fwd+bwd"]
    columns += ["of fwd+bwd: spread", "alone", "copy", "matmul", "MiB"]
    table = common.make_table(figures["name"], *columns)
    for row in figures["sides"]:
        cells = [common.cell(row["ours_over_this"].get(what), ".3f") for what in (*PASSES, "memory")]
        cells += [common.cell(row["passes"][what].get("ms"), ".3f") for what in PASSES]
        both = row["passes"]["training"]
        cells += [common.cell(both.get("spread"), ".1%"), common.cell(both.get("alone_ms"), ".3f")]
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
                    table.add_row(kernel["kernel"][:90], f"{us:,.1f}", f"{us / total:.1%}", f"{launches:g}")
            tables.append(table)
    return tables
