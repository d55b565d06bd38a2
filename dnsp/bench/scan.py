"""``dnsp bench scan``: the delta rule over P ranks, forward and backward, against one process and the local shard.

    one process   all tokens, by one rank alone, at the fastest of some segment lengths
    ranks         P ranks, for each layout and transport. On one GPU together: time over one process's is the extra work
                  of being parallel, waiting hides; at the fastest of some segment lengths, from that which fills a
                  rank's share of the GPU to that which fills all of it. (By gather the first alone: it sends every
                  segment's summary, through the host there, and would double a long run.) On a GPU each: efficiency =
                  local shard / ranks
    local shard   T / P tokens by one rank alone: the ideal of a GPU each. Beside it, a GPU each: every rank's at once,
                  what is lost there is the machine's; and every rank's replay at once, the chain's launches without
                  its waiting
    replay        each rank's work alone on the GPU, and from these times and the hop the *makespan* that P GPUs would
                  have, at the best of some segment lengths (see replay.py), over a local shard measured as replays are:
                  single steps, by the device's clock
    CUDA graph    on GPUs one process, the local shard and the ranks by peer once more, a step in one launch: a host
                  that comes late does not show. Held against the local shard, or one process, as a graph
    hop           a flag seen by the waiting kernel minus the flag's raising, by the device's timer; of several GPUs,
                  whose timers differ, half of the way there and back
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count, product, takewhile
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from dnsp.bench import account
from dnsp.bench.account import Account
from dnsp.bench.common import CLOCK, device_seconds
from dnsp.bench.delta_shapes import parse_decay
from dnsp.bench.graphs import as_graphs
from dnsp.bench.ranks import Ranks, check, measure, middle, new_table, publish
from dnsp.bench.replay import (
    AHEAD,
    Replay,
    Stamps,
    Step,
    Work,
    hops_and_back,
    hops_there,
    make_step,
    makespan,
)  # fmt: skip
from dnsp.bench.scan_peers import missing, peers
from dnsp.errors import UsageError
from dnsp.kernels.segments import Heads
from dnsp.parallel.grid import Grid
from dnsp.parallel.layout import CHUNK, KINDS, Layout
from dnsp.parallel.plan import SCAN_TRANSPORTS, filling_segment_tokens, local_plan, make_plan
from dnsp.parallel.probe import refusal

HOPS = 30  # forward scans whose stamps are read
REPEAT = 10  # steps of a turn: what ranks begin apart, and their first launches, count once
HOP_US = 10.0  # where a hop cannot be measured
ONE, LOCAL, AT_ONCE = "one process", "local shard", "local shards at once"
UNWAITED = "nobody waits"  # a layout's replays, all ranks at once
GRAPH = ", as a CUDA graph"


def run(
    tokens: int = 131_072,
    ranks: Sequence[int] = (2, 4, 8),
    layouts: Sequence[str] = KINDS,
    transports: Sequence[str] = ("peer", "p2p", "gather"),
    *,
    heads: int = 16,
    value_heads: int = 32,
    width: int = 128,
    decay: str = "logsigmoid",
    segment_tokens: int | None = None,
    steps: int = 5,
    json_path: Path | None = None,
) -> int:
    """Measure and print; returns the exit status. ``tokens``: in all; ``decay``: as of ``bench delta``;
    ``segment_tokens``: of the ranks' segments, None for those that are the fastest here.

    Raises: UsageError for what cannot be measured.
    """
    check(tokens, ranks, layouts, transports, SCAN_TRANSPORTS)
    if value_heads % heads:
        raise UsageError(f"--value-heads {value_heads} is no multiple of --heads {heads}")
    for world, kind in product(ranks, layouts):  # whether the segments fit
        make_plan([[0]], Layout(kind, world, tokens), Grid(world, 0, world), segment_tokens)
    shape = {"tokens": tokens, "heads": heads, "value_heads": value_heads, "width": width, "decay": parse_decay(decay)}
    request = {
        **shape, "layouts": list(layouts), "transports": list(transports), "segment_tokens": segment_tokens,
        "steps": steps,
    }  # fmt: skip
    worlds = measure("scan", request, ranks)
    publish(worlds, lambda found: [table(found, shape), accounts(found)], shape, json_path)
    return 0


def table(world: dict[str, Any], shape: dict[str, Any]) -> Table:
    """One world's figures for people."""
    alone = world["sharing"] == 1
    title = (
        f"{world['ranks']} ranks, {shape['tokens']:,} tokens in all, {shape['heads']}/{shape['value_heads']} heads of "
        f"{shape['width']}, bf16, decay {shape['decay']}, forward + backward; {world['where']}"
    )
    share = "efficiency" if alone else "over one"
    rows = new_table(title, "segment", "ms", share, "makespan", "in segments of", "over local", "hop, us")
    local = world[LOCAL]["ms"]
    cool, ideal = world[LOCAL].get("alone_ms", local), LOCAL if alone else ONE

    def add(name: str, figures: dict[str, Any], *more: str) -> None:
        """A row, and that of the same as a CUDA graph, over the ideal as one."""
        for kind, words in (("", ""), ("graph_", GRAPH)):
            ms, over = figures.get(f"{kind}ms"), world[ideal].get(f"{kind}ms")
            if ms is None:
                continue
            of_ideal = "" if over is None or name in {ONE, LOCAL} - {ideal} else _share(over, ms, alone)
            segment = figures.get(f"{kind}segment_tokens", figures["segment_tokens"])
            rows.add_row(name + words, f"{segment:,}", f"{ms:.3f}", of_ideal, *("" if words else cell for cell in more))

    for name in (ONE, LOCAL, *(n for n in world if n == AT_ONCE or n.endswith(UNWAITED))):
        add(name, world[name])
    for way in world["ways"]:
        makespan, hop = way.get("makespan_ms"), way.get("hop_us")
        add(
            f"{way['layout']}, {way['transport']}",
            way,
            "" if makespan is None else f"{makespan:.3f}",
            "" if makespan is None else f"{way['makespan_segment_tokens']:,}",
            "" if makespan is None else f"{makespan / cool:.3f}",
            "" if hop is None else f"{hop:.1f}",
        )
    for peer in world.get("peers", ()):
        rows.add_row(peer["name"], "", f"{peer['ms']:.3f}", f"{local / peer['ms']:.1%}" if alone else "")
    return rows


def _share(ideal: float, ms: float, alone: bool) -> str:
    """Efficiency with a GPU each, elsewhere the time over one process's."""
    return f"{ideal / ms:.1%}" if alone else f"{ms / ideal:.3f}"


def accounts(world: dict[str, Any]) -> Table:
    """Where the time of its steps goes."""
    found = {name: [Account(**rank) for rank in ranks] for name, ranks in world["accounts"].items()}
    replayed = {
        f"{way['layout']}, {way['transport']}": max(Work(**work).alone for work in works["work_ms"])
        for way in world["ways"]
        if (works := way.get("replays", {}).get(str(way["segment_tokens"])))
    }
    return account.table("where a step's time goes, from the least to the most of the ranks", found, replayed)


# What a rank does.


def rank_main(request: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """One world's figures."""
    grid, device, tokens, steps = ranks.grid, ranks.device, request["tokens"], request["steps"]
    notes: list[str] = []
    why_not = refusal(ranks.comm)
    transports = [t for t in request["transports"] if not (t == "peer" and why_not)]
    if why_not and "peer" in request["transports"]:
        notes.append(f"not by peer: {why_not}")

    alone: dict[str, dict[str, Any]] = {}  # rank 0 by itself, at several segment lengths
    for name, length in ((ONE, tokens), (LOCAL, tokens // grid.world)):
        timed: dict[int, Step] = {}
        if ranks.first:
            for segment in _segments(length, request, ranks.multiprocessors):
                like = next(iter(timed.values()), None)
                timed[segment] = make_step(local_plan([[0]], length, segment), request, device, like)
        sizes = ranks.comm.from_all(list(timed))[0]
        times = ranks.turns({str(n): timed.get(n) for n in sizes}, steps, REPEAT)
        best = int(min(times, key=lambda n: middle(times[n])))
        alone[name] = {"segment_tokens": best}
        if name == LOCAL and device.type == "cuda":
            cool = [1e3 * device_seconds(timed[best], AHEAD / CLOCK) for _ in range(steps + 2)][2:] if timed else None
            alone[name]["alone_ms"] = middle(ranks.comm.from_all(cool)[0])
        timed.clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    works: dict[str, Any] = {}
    tried: dict[tuple[str, str], dict[int, Step]] = {}  # by layout and transport, at several segment lengths
    some = Layout(request["layouts"][0], grid.world, tokens)
    step = make_step(make_plan([[0]], some, grid), request, device)
    replays: dict[str, dict[int, list[Work]]] = {}

    def by_itself(name: str, length: int) -> Step:
        return make_step(local_plan([[0]], length, alone[name]["segment_tokens"]), request, device)

    works[ONE] = by_itself(ONE, tokens) if ranks.first else None
    works[LOCAL] = by_itself(LOCAL, tokens // grid.world) if ranks.first else None
    if ranks.sharing == 1:
        works[AT_ONCE] = works[LOCAL] or by_itself(LOCAL, tokens // grid.world)
    for kind in request["layouts"]:
        layout = Layout(kind, grid.world, tokens)
        lengths = _lengths(layout, request, ranks)
        if "peer" in transports:
            replays[kind] = _replays(layout, request, ranks, step)
            if ranks.sharing == 1:
                lengths = [segment := _shortest(layout, replays[kind], HOP_US)[1]]
                works[f"{kind}, {UNWAITED}"] = _replay(layout, segment, request, ranks, step)[0]
                alone[f"{kind}, {UNWAITED}"] = {"segment_tokens": segment}
        for transport in transports:
            tried[kind, transport] = {}
            for segment in lengths[:1] if transport == "gather" else lengths:
                plan = make_plan([[0]], layout, grid, segment, transport=transport)
                tried[kind, transport][segment] = step = make_step(plan, request, device, step)
    why_no_fla = missing(ranks)
    others: dict[str, Any] = {}
    if why_no_fla:
        notes.append(f"not beside fla: {why_no_fla}")
    else:
        measured, absent = peers(request, ranks, step.inputs, step.do)
        others, failures = ranks.willing(measured)
        notes += [f"not beside {name}: {words}" for name, words in (failures | absent).items()]
        works |= others
    at_lengths = {_at(*way, n): step for way, by in tried.items() for n, step in by.items()}
    graphs: dict[str, Any] = {}
    if device.type == "cuda":
        by_peer = {_at(kind, by, n): step for (kind, by), of in tried.items() if by == "peer" for n, step in of.items()}
        captured = {name: works[name] for name in (ONE, LOCAL, AT_ONCE) if name in works} | by_peer
        graphs, failures = as_graphs(captured, ranks)
        notes += [f"not as a CUDA graph: {name}: {words}" for name, words in failures.items()]
    times = ranks.turns(works | at_lengths | {name + GRAPH: graph for name, graph in graphs.items()}, steps, REPEAT)
    if graphs:
        graphs.clear()
        torch.cuda.empty_cache()
    ways = [_way(*way, list(by), times) for way, by in tried.items()]
    for way in ways:
        kind, transport = way["layout"], way["transport"]
        works[f"{kind}, {transport}"] = tried[kind, transport][way["segment_tokens"]]
    if AT_ONCE in works:
        alone[AT_ONCE] = {"segment_tokens": alone[LOCAL]["segment_tokens"]}
    told = {
        name: [found._asdict() for found in account.account(work, ranks, REPEAT)]
        for name, work in works.items()
        if name not in others
    }
    for name, figures in alone.items():
        figures["ms"] = middle(times[name])
        if name + GRAPH in times:
            figures["graph_ms"] = middle(times[name + GRAPH])
    for way in ways:
        if way["transport"] == "peer":
            hops = _hops(works[f"{way['layout']}, peer"], ranks)
            way["hop_us"] = middle(hops) if hops else None
            hop_us = next((w["hop_us"] for w in ways if w.get("hop_us")), HOP_US)
            layout, found = Layout(way["layout"], grid.world, tokens), replays[way["layout"]]
            way["makespan_ms"], way["makespan_segment_tokens"] = _shortest(layout, found, hop_us)
            way["replays"] = {
                segment: {"makespan_ms": makespan(layout, own, hop_us / 1e3), "work_ms": [vars(work) for work in own]}
                for segment, own in found.items()
            }
    beside = [{"name": name, "ms": middle(times[name])} for name in others]
    return {**ranks.about, "ways": ways, "notes": notes, "peers": beside, "accounts": told, **alone}


def _at(kind: str, transport: str, segment: int) -> str:
    return f"{kind}, {transport}, segments of {segment:,}"


def _way(kind: str, transport: str, segments: Sequence[int], times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """What a way's turns say of it, at the segment length that was the fastest; as a CUDA graph that may be another."""
    eager = {n: middle(times[_at(kind, transport, n)]) for n in segments}
    ms, best = min((ms, n) for n, ms in eager.items())
    way = {
        "layout": kind, "transport": transport, "segment_tokens": best, "ms": ms, "ms_by_segment_tokens": eager,
    }  # fmt: skip
    graphs = [(middle(times[name]), n) for n in segments if (name := _at(kind, transport, n) + GRAPH) in times]
    if graphs:
        way["graph_ms"], way["graph_segment_tokens"] = min(graphs)
    return way


def _segments(length: int, request: dict[str, Any], multiprocessors: int) -> list[int]:
    """Segment lengths to try on one process: the one that fills the GPU, half of it, and twice."""
    layout = Layout("contiguous", 1, length)
    filling = _filling(layout, request, multiprocessors)
    tried: set[int] = {filling, filling // 2 // CHUNK * CHUNK, 2 * filling}
    return sorted(n for n in tried if CHUNK <= n <= -(-length // CHUNK) * CHUNK)


def _lengths(layout: Layout, request: dict[str, Any], ranks: Ranks) -> list[int]:
    """Segment lengths of the ranks: the one that fills a rank's share of a GPU, the one that fills the GPU, and those
    in between, twice as long each."""
    if request["segment_tokens"]:
        return [request["segment_tokens"]]
    gpu = ranks.multiprocessors
    share, whole = _filling(layout, request, gpu // ranks.sharing), _filling(layout, request, gpu)
    shorter = takewhile(lambda n: n < share, (whole << n for n in count()))
    return [share, *(n for n in shorter if layout.interval_tokens % n == 0)]


def _filling(layout: Layout, request: dict[str, Any], multiprocessors: int) -> int:
    D = request["width"]
    heads = Heads(1, request["heads"], request["value_heads"], D, D, torch.bfloat16)
    return filling_segment_tokens(layout, heads, max(1, multiprocessors))


def _hops(step: Step, ranks: Ranks) -> list[float]:
    """Microseconds from a flag's raising to its sight; contiguous alone, where a rank waits and raises once a pass."""
    if step.plan.layout.kind != "contiguous":
        return []
    from dnsp.parallel import symmetric

    clock = symmetric.memory(step.plan.comm, ranks.device).clock
    last = ranks.grid.world - 1
    one_gpu = torch.cuda.device_count() == 1

    def stamps() -> list[Stamps]:
        torch.cuda.synchronize()
        return ranks.comm.from_all(Stamps.of(clock.stamps))

    found: list[float] = []
    for _ in range(HOPS):
        ranks.wait()
        if ranks.first and not one_gpu:
            torch.cuda._sleep(AHEAD)  # the others wait when this one raises
        o, _ = step.forward()
        there = stamps()
        if one_gpu:
            found += hops_there(there)
            continue
        if ranks.grid.rank == last:
            torch.cuda._sleep(AHEAD)
        torch.autograd.grad(o, list(step.inputs.values()), step.do)
        found += hops_and_back(there, stamps())
    return found


def _replays(layout: Layout, request: dict[str, Any], ranks: Ranks, like: Step) -> dict[int, list[Work]]:
    """Every rank's work at several segment lengths: a GPU's worth of segments, and fewer, which make the chain of folds
    shorter. Ranks one after another."""
    filling = request["segment_tokens"] or _filling(layout, request, ranks.multiprocessors)
    tried = [filling] if request["segment_tokens"] else [n * filling for n in (1, 2, 4)]
    found = {}
    for segment in (n for n in tried if layout.interval_tokens % n == 0):
        step, replay = _replay(layout, segment, request, ranks, like)
        mine: Work | None = None
        for rank in range(ranks.grid.world):
            ranks.wait()
            if rank == ranks.grid.rank:
                mine = Work.of(step, replay, request["steps"])
        ranks.wait()
        found[segment] = ranks.comm.from_all(mine)
    return found


def _replay(layout: Layout, segment: int, request: dict[str, Any], ranks: Ranks, like: Step) -> tuple[Step, Replay]:
    """This rank's step, its messages in its inbox."""
    plan = make_plan([[0]], layout, ranks.grid, segment, transport="peer")
    step = make_step(plan, request, ranks.device, like)
    step.scan = replay = Replay(plan, (1, request["value_heads"], request["width"], request["width"]), ranks.device)
    return step, replay


def _shortest(layout: Layout, replays: dict[int, list[Work]], hop_us: float) -> tuple[float, int]:
    """The makespan, ms, and the segment length that has it."""
    return min((makespan(layout, works, hop_us / 1e3), segment) for segment, works in replays.items())
