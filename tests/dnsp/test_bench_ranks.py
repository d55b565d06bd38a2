"""``dnsp bench scan`` and ``bench attention``: real ranks, every row there, and the makespan's arithmetic.

Long because what replaces a peer, a GPU and a clock is made here by hand.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from dnsp.bench import attention, graphs, scan, scan_peers
from dnsp.bench.account import Account, account
from dnsp.bench.ranks import Ranks, new_table, publish
from dnsp.bench.replay import Stamps, Work, hops_and_back, hops_there, makespan
from dnsp.bench.scan import _shortest, _way, accounts, table
from dnsp.cli import main
from dnsp.errors import UsageError
from dnsp.parallel.errors import PeerLost
from dnsp.parallel.grid import Grid, make_grid
from dnsp.parallel.layout import Layout
from dnsp.parallel.plan import local_plan, make_plan
from dnsp.parallel.transport import Transport
from dnsp.parallel.waits import WAITS
from tests.ranks import run_ranks

SMALL = {
    "scan": ["--tokens", "1024", "--heads", "1", "--value-heads", "2", "--width", "16"],
    "stack": [
        *("--tokens", "1024", "--layouts", "contiguous,zigzag", "model.hidden_size=32", "model.intermediate_size=64"),
        *("model.num_attention_heads=2", "model.num_key_value_heads=1", "model.head_dim=16", "engine.dtype=fp32"),
        *("model.linear_num_key_heads=1", "model.linear_num_value_heads=2", "model.linear_key_head_dim=16"),
        *("model.linear_value_head_dim=16", "model.vocab_size=64"),
    ],
    "attention": ["--tokens", "1024", "--heads", "2", "--key-heads", "1", "--widths", "16", "--document", "300"],
}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("what", SMALL)
def test_figures_of_every_way(what: str, tmp_path: Path) -> None:
    report = tmp_path / "figures.json"
    assert main(["bench", what, *SMALL[what], "--ranks", "2", "--steps", "1", "--json", str(report)]) == 0
    (world,) = json.loads(report.read_text())["worlds"]
    assert world["ranks"] == 2
    if what == "scan":
        ways = {(way["layout"], way["transport"]) for way in world["ways"]}
        assert {(kind, by) for kind in ("contiguous", "zigzag") for by in ("p2p", "gather")} <= ways
        assert all(way["ms"] > 0 for way in [*world["ways"], world["one process"], world["local shard"]])
        assert set(world["accounts"]) >= {"one process", "local shard", *(", ".join(way) for way in ways)}
        for name, ranks in world["accounts"].items():
            assert len(ranks) == (1 if name in ("one process", "local shard") else 2), name
            assert all(0 <= sum(rank["waits"]) < rank["step"] for rank in ranks), (name, ranks)
        if torch.cuda.is_available():
            by_peer = [way for way in world["ways"] if way["transport"] == "peer"]
            captured = [world["one process"], world["local shard"], *by_peer]
            assert all(figures.get("graph_ms") for figures in captured), world["notes"]
        if not any(by == "peer" for _, by in ways):
            assert world["notes"][0] == "not by peer: rank 0: it needs a GPU on every rank"
    elif what == "stack":
        assert [way["name"].split(",")[0] for way in world["ways"]] == ["one process", "contiguous", "zigzag"]
        assert all(way["ms"] > 0 for way in world["ways"])
    else:
        (figures,) = world["widths"]
        names = [way["name"] for way in figures["ways"]]
        assert names[0] == "one process" and names[-1] == "heads exchanged"
        assert {f"{kind}, {by}" for kind in ("contiguous", "zigzag") for by in ("ring", "gather")} <= set(names)
        assert "heads exchanged: each key head goes to 2 ranks" in world["notes"]
        assert all(way["both_ms"] > way["forward_ms"] * 0.5 > 0 for way in figures["ways"])


def heads_exchanged(heads: int, key_heads: int) -> list[tuple[float, ...]]:
    """How far a rank's outputs and gradients by an exchange of heads are from those of the ring, for one document and
    for several."""
    grid, found = make_grid(timeout=60), []
    for starts in ([[0]], [[0, 50, 300]]):
        request = {"heads": heads, "key_heads": key_heads}
        ring = attention.make_step(
            make_plan(starts, Layout("contiguous", grid.world, 512), grid), request, 16, torch.device("cpu")
        )
        exchanged = attention.ExchangedStep(local_plan(starts, 512), ring.inputs, ring.do, grid.transport())
        pairs = []
        for step in (ring, exchanged):
            o = step.output()
            pairs.append([o, *torch.autograd.grad(o, step.inputs, step.do)])
        found.append(tuple(float((a - b).norm() / a.norm()) for a, b in zip(*pairs, strict=True)))
    return found


@pytest.mark.parametrize(("size", "heads", "key_heads"), [(2, 4, 2), (2, 8, 4), (4, 8, 2), (4, 4, 1)])
def test_heads_exchanged_compute_the_same(size: int, heads: int, key_heads: int) -> None:
    """As many key heads as ranks, more, and fewer, which are sent to several."""
    for found in run_ranks(heads_exchanged, size, heads, key_heads):
        assert all(max(errors) < 1e-6 for errors in found), found


def test_why_heads_are_not_exchanged() -> None:
    ranks = Ranks(Grid(4, 0, 4), Transport(), torch.device("cpu"))
    assert attention._not_exchanged({"heads": 16, "key_heads": 2}, ranks) == ""
    assert "6 heads do not divide by 4" in attention._not_exchanged({"heads": 6, "key_heads": 2}, ranks)
    assert "6 key heads do not divide by 4" in attention._not_exchanged({"heads": 12, "key_heads": 6}, ranks)
    with patch.object(Ranks, "sharing", 4):
        shared = Ranks(Grid(4, 0, 4), Transport(), torch.device("cuda", 0))
        assert "a GPU for every rank" in attention._not_exchanged({"heads": 16, "key_heads": 2}, shared)


@pytest.mark.parametrize("sharing", [1, 2])
def test_attention_is_held_against_its_ideal(sharing: int) -> None:
    """With a GPU each that is a part of one process's time, in a row of its own."""
    times = {"one process": (4.0, 12.0), "zigzag, peer": (2.5, 8.0)}
    ways = [{"name": name, "forward_ms": there, "both_ms": both} for name, (there, both) in times.items()]
    world = {"ranks": 2, "sharing": sharing, "where": "somewhere"}
    figures = {"width": 128, "backend": "cudnn", "ways": ways}
    rows = attention.table(world, figures, {"tokens": 65536, "heads": 16, "key_heads": 2})
    cells = list(zip(*(column.cells for column in rows.columns), strict=True))
    if sharing == 1:
        assert cells == [
            ("one process", "4.000", "12.000", ""),
            ("1/2 of it, the ideal", "2.000", "6.000", "100.0%"),
            ("zigzag, peer", "2.500", "8.000", "75.0%"),
        ]
    else:
        assert cells == [("one process", "4.000", "12.000", "1.000"), ("zigzag, peer", "2.500", "8.000", "0.667")]


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_ranks_on_a_gpu_are_replayed_captured_and_their_hops_timed(tmp_path: Path) -> None:
    report = tmp_path / "figures.json"
    sizes = ["--tokens", "8192", "--heads", "2", "--value-heads", "4", "--ranks", "2", "--steps", "1"]
    assert main(["bench", "scan", *sizes, "--transports", "peer", "--json", str(report)]) == 0
    (world,) = json.loads(report.read_text())["worlds"]
    assert not any(words in note for note in world["notes"] for words in ("not by peer", "CUDA graph")), world["notes"]
    assert {way["layout"]: way["transport"] for way in world["ways"]} == dict.fromkeys(("contiguous", "zigzag"), "peer")
    for way in world["ways"]:
        assert way["graph_ms"] > 0 and way["makespan_ms"] > 0 and way["replays"]
        works = [work for replayed in way["replays"].values() for work in replayed["work_ms"]]
        assert all(min(work["relay_forward"]) > 0 and min(work["relay_reverse"]) > 0 for work in works)
    assert next(way["hop_us"] for way in world["ways"] if way["layout"] == "contiguous") > 0


REQUEST = {
    **{"tokens": 4096, "heads": 1, "value_heads": 4, "width": 16, "decay": "-1e-4", "segment_tokens": None, "steps": 1},
    **{"layouts": ["contiguous"], "transports": ["p2p", "gather"]},
}


def on_half_a_gpu() -> tuple[dict[str, Any], list[int]]:
    """Two ranks as if they shared a GPU of two multiprocessors."""
    grid = make_grid(timeout=60)
    with patch.object(Ranks, "multiprocessors", 2), patch("dnsp.bench.ranks.WARM", 0), patch.object(scan, "REPEAT", 2):
        ranks = Ranks(grid, grid.transport(), torch.device("cpu"))
        given = scan._lengths(Layout("contiguous", 2, 4096), {**REQUEST, "segment_tokens": 512}, ranks)
        with patch.object(Ranks, "multiprocessors", 8), patch.object(Ranks, "sharing", 8, create=True):
            between = scan._lengths(Layout("contiguous", 2, 16384), REQUEST, ranks)
        return scan.rank_main(REQUEST, ranks), given, between


@pytest.mark.slow
def test_ranks_that_share_a_gpu_are_timed_at_several_segment_lengths() -> None:
    """Of 2,048 tokens each: one segment fills a rank's half of it, two fill it. By gather the first alone."""
    (world, given, between), (other, *_) = run_ranks(on_half_a_gpu, 2, timeout=100)
    assert world["ways"] == other["ways"] and given == [512]
    assert between == [8192, 1024, 2048, 4096]  # from a segment a rank to one for each of 8 multiprocessors
    p2p, gather = world["ways"]
    assert set(p2p["ms_by_segment_tokens"]) == {2048, 1024} and set(gather["ms_by_segment_tokens"]) == {2048}
    for way in world["ways"]:
        ms = way["ms_by_segment_tokens"]
        assert way["ms"] == ms[way["segment_tokens"]] == min(ms.values()) > 0
    assert set(world["accounts"]) == {"one process", "local shard", "contiguous, p2p", "contiguous, gather"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["scan", "--ranks", "1"], "--ranks 1: one process is measured beside"),
        (["scan", "--transports", "pigeon"], "--transports pigeon: it is not one of"),
        (["attention", "--layouts", "round"], "--layouts round: it is not one of"),
        (["attention", "--heads", "3"], "--heads 3 is no multiple of --key-heads 2"),
        (["scan", "--segment-tokens", "100"], "segment_tokens=100: segments are whole chunks of 64 tokens"),
        (["scan", "--decay", "0.1"], "decay=0.1: must be logsigmoid, or the log decay of a token, a number of at most"),
        (["scan", "--value-heads", "24"], "--value-heads 24 is no multiple of --heads 16"),
        (["scan", "--tokens", "1000", "--ranks", "2"], "sequence length 1000 does not split"),
    ],
)
def test_refusals(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_what_was_measured_stays_when_a_later_world_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def worlds() -> Iterator[dict[str, Any]]:
        yield {"ranks": 2, "notes": ["a note"]}
        raise UsageError("4 ranks could not be measured")

    file = tmp_path / "figures.json"
    with pytest.raises(UsageError, match="4 ranks"):
        publish(worlds(), lambda found: [new_table(f"{found['ranks']} ranks", "ms")], {"tokens": 64}, file)
    shown, report = capsys.readouterr().out, json.loads(file.read_text())
    assert "2 ranks" in shown and "a note" in shown
    assert report["tokens"] == 64 and report["worlds"] == [{"ranks": 2, "notes": ["a note"]}]


def test_the_table_has_every_figure() -> None:
    """What a world of a GPU reports, in the columns of its table."""
    way = {
        "layout": "zigzag", "transport": "peer", "segment_tokens": 1024, "ms": 3.3, "makespan_ms": 1.05,
        "makespan_segment_tokens": 2048, "hop_us": 7.4,
    }  # fmt: skip
    world = {
        "ranks": 8, "sharing": 8, "where": "8 on one GPU", "one process": {"ms": 3.0, "segment_tokens": 4096},
        "local shard": {"ms": 1.0, "segment_tokens": 512}, "ways": [way], "peers": [],
    }  # fmt: skip
    rows = table(world, {"tokens": 131072, "heads": 16, "value_heads": 32, "width": 128, "decay": "-1e-4"})
    cells = [list(column.cells)[-1] for column in rows.columns]
    assert cells == ["zigzag, peer", "1,024", "3.300", "1.100", "1.050", "2,048", "1.050", "7.4"]


def world_of(sharing: int, **figures: dict[str, Any]) -> dict[str, Any]:
    way = {"layout": "zigzag", "transport": "peer", "segment_tokens": 1024, "ms": 3.2, "hop_us": 7.4}
    return {
        "ranks": 8, "sharing": sharing, "where": "somewhere", "one process": {"ms": 4.0, "segment_tokens": 4096},
        "local shard": {"ms": 2.4, "segment_tokens": 512}, "local shards at once": {"ms": 3.0, "segment_tokens": 512},
        "ways": [way | figures.get("way", {})],
    } | {name: {"segment_tokens": 512, **more} for name, more in figures.items() if name != "way"}  # fmt: skip


def test_cuda_graphs_have_rows_of_their_own() -> None:
    """Over what is a graph too, at their own segment length; none where there is none."""
    shape = {"tokens": 131072, "heads": 16, "value_heads": 32, "width": 128, "decay": "-1e-4"}
    captured = {
        "one process": {"ms": 4.0, "graph_ms": 3.0}, "local shard": {"ms": 2.4, "graph_ms": 2.0},
        "local shards at once": {"ms": 3.0, "graph_ms": 2.5}, "way": {"graph_ms": 3.3, "graph_segment_tokens": 2048},
    }  # fmt: skip

    def rows(sharing: int, **figures: dict[str, Any]) -> list[list[str]]:
        columns = table(world_of(sharing, **figures), shape).columns
        return [[cell for cell in row if cell] for row in zip(*(column.cells for column in columns), strict=True)]

    assert rows(1, **captured) == [
        ["one process", "512", "4.000"],
        ["one process, as a CUDA graph", "512", "3.000"],
        ["local shard", "512", "2.400", "100.0%"],
        ["local shard, as a CUDA graph", "512", "2.000", "100.0%"],
        ["local shards at once", "512", "3.000", "80.0%"],
        ["local shards at once, as a CUDA graph", "512", "2.500", "80.0%"],
        ["zigzag, peer", "1,024", "3.200", "75.0%", "7.4"],
        ["zigzag, peer, as a CUDA graph", "2,048", "3.300", "60.6%"],
    ]
    shared = {row[0]: row[1:] for row in rows(8, **captured)}
    assert shared["one process, as a CUDA graph"] == ["512", "3.000", "1.000"]
    assert shared["local shard, as a CUDA graph"] == ["512", "2.000"]
    assert shared["zigzag, peer, as a CUDA graph"] == ["2,048", "3.300", "1.100"]
    assert not any("graph" in row[0] for row in rows(1))
    alone = {row[0]: row[1:] for row in rows(1, way=captured["way"])}  # the local shard could not be captured
    assert alone["zigzag, peer, as a CUDA graph"] == ["2,048", "3.300"]


def test_a_way_is_told_at_its_fastest_segment_length() -> None:
    """As a CUDA graph it may be another, where there is one."""
    eager = {"zigzag, peer, segments of 1,024": [5.0, 3.0, 4.0], "zigzag, peer, segments of 512": [4.5]}
    graphs = {f"{name}, as a CUDA graph": [ms] for name, ms in zip(eager, (3.5, 3.0), strict=True)}
    way = {
        "layout": "zigzag", "transport": "peer", "segment_tokens": 1024, "ms": 4.0,
        "ms_by_segment_tokens": {1024: 4.0, 512: 4.5},
    }  # fmt: skip
    assert _way("zigzag", "peer", [1024, 512], eager) == way
    assert _way("zigzag", "peer", [1024, 512], eager | graphs) == way | {"graph_ms": 3.0, "graph_segment_tokens": 512}


def test_what_cannot_be_captured_is_left_out_with_its_reason() -> None:
    """Each step runs before it is captured; a rank that only waits has none. torch's graphs are stood in for: where a
    step fails, the end of its capture has words of its own."""
    ran: list[str] = []

    class FakeGraph:
        def replay(self) -> None:
            ran.append("replay")

    @contextmanager
    def capture(graph: FakeGraph, **options: Any) -> Iterator[None]:
        assert options == {"pool": 7, "stream": None, "capture_error_mode": "thread_local"}
        ran.append("capture")
        try:
            yield
        finally:
            if ran[-1] == "fails":
                raise RuntimeError("operation failed due to a previous error during capture")

    def fails() -> None:
        ran.append("fails")
        if ran[-2] == "capture":
            raise RuntimeError("it is read by the host\nand more")

    alone = Ranks(Grid(1, 0, 1), Transport(), torch.device("cpu"))
    with (
        patch("torch.cuda.Stream", lambda device: None), patch("torch.cuda.graph_pool_handle", lambda: 7),
        patch("torch.cuda.CUDAGraph", FakeGraph), patch("torch.cuda.graph", capture),
        patch.object(Ranks, "turn", lambda self, work, repeat: work and work()),
    ):  # fmt: skip
        steps = {"works": partial(ran.append, "works"), "waits": None, "fails": fails}
        found, failures = graphs.as_graphs(steps, alone)
    assert ran == ["works", "fails", "capture", "works", "capture", "fails"]
    assert failures == {"fails": "RuntimeError: it is read by the host"}
    assert list(found) == ["works", "waits"] and found["waits"] is None
    replay = found["works"]
    assert replay is not None and replay() is steps["works"] and ran[-1] == "replay"


def test_a_peer_that_cannot_be_measured_is_told_and_the_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """An fla that knows one layout, then one without context parallelism, then one that cannot be imported."""

    def context(bounds: torch.Tensor, group: Any, cu_seqlens_cpu: torch.Tensor, layout: str) -> str:
        if layout == "zigzag":
            raise TypeError("no layout zigzag")
        return layout

    def op(q: torch.Tensor, *others: torch.Tensor, **options: Any) -> tuple[torch.Tensor, None]:
        return q + sum(other.sum() for other in others), None

    delta, cp = SimpleNamespace(chunk_gated_delta_rule=op), SimpleNamespace(build_cp_context=context)
    ranks = Ranks(Grid(1, 0, 1), Transport(), torch.device("cpu"))
    monkeypatch.setattr(ranks.comm, "group", object())
    monkeypatch.setattr(ranks, "grid", SimpleNamespace(world=4))
    inputs = {name: torch.ones(1, 8, 6, requires_grad=True) for name in ("q", "k", "v", "g", "beta")}
    request = {"tokens": 32, "layouts": ["contiguous", "zigzag"], "heads": 6, "value_heads": 12}
    plain, zigzag = scan_peers.NAMES["contiguous"], scan_peers.NAMES["zigzag"]
    heads = "6 heads and 12 value heads do not divide over 4 ranks (--heads, --value-heads)"
    for modules, found, said in (
        ((delta, cp), [plain], {zigzag: "TypeError: no layout zigzag"}),
        ((delta, SimpleNamespace()), [], dict.fromkeys((plain, zigzag), "has no attribute 'build_cp_context'")),
        ((None, cp), [], dict.fromkeys((plain, zigzag), "ModuleNotFoundError: ")),
    ):
        for name, module in zip(("fla.ops.gated_delta_rule", "fla.ops.cp"), modules, strict=True):
            monkeypatch.setitem(sys.modules, name, module)
        measured, absent = scan_peers.peers(request, ranks, inputs, torch.ones(1, 8, 6))
        assert absent == {scan_peers.ULYSSES: heads}
        works, failures = ranks.willing(measured)
        assert list(works) == found and list(failures) == list(said)
        assert all(said[name] in words for name, words in failures.items()), failures
    even = {**request, "heads": 8, "value_heads": 16}
    assert scan_peers.ULYSSES in scan_peers.peers(even, ranks, inputs, torch.ones(1, 8, 6))[0]


@pytest.mark.parametrize("fails", [False, True])
def test_a_capture_that_fails_says_what_its_step_said(fails: bool) -> None:
    """Whether or not its end fails too; and not what came before that in the step."""

    def step() -> None:
        try:
            raise RuntimeError("connection closed")
        except RuntimeError as error:
            raise PeerLost(0, 1, "the hop", "connection closed") from error

    @contextmanager
    def capture(graph: Any, **options: Any) -> Iterator[None]:
        try:
            yield
        finally:
            if fails:
                raise RuntimeError("operation failed due to a previous error during capture")

    with patch("torch.cuda.CUDAGraph", object), patch("torch.cuda.graph", capture), pytest.raises(PeerLost):
        graphs._captured(step, None, None)  # type: ignore[arg-type]


def relayed(
    before: float,
    forward: list[float],
    beside_forward: float,
    between: float,
    reverse: list[float],
    beside_reverse: float,
    after: float,
) -> Work:
    """A rank's work, of whose folds nothing is done before their messages are there."""
    return Work(before, forward, forward, beside_forward, between, reverse, reverse, beside_reverse, after)


def test_what_a_step_is_made_of() -> None:
    """By rank the figures of steps whose times and waits are made by hand, and their least and most in the table."""
    ranks = [Account(step=3.5, waits=[0.2, 0.05], host=1.0), Account(step=3.6, waits=[0.1, 0.0], host=1.2)]
    works = [vars(relayed(0.5, [0.1, 0.1], 0.0, 0.6, [0.1, 0.1], 0.2, left)) for left in (1.5, 1.6)]
    way = {"layout": "zigzag", "transport": "peer", "segment_tokens": 64, "replays": {"64": {"work_ms": works}}}
    told = {"local shard": [ranks[0]._asdict()], "zigzag, peer": [rank._asdict() for rank in ranks]}
    rows = accounts({"accounts": told, "ways": [way]})
    cells = [list(column.cells)[-1] for column in rows.columns]
    own, waiting, host = "3.250 to 3.500", "0.100 to 0.250", "1.000 to 1.200"
    assert cells == ["zigzag, peer", "3.600", own, "2.900", waiting, "0.400", host]
    assert [list(column.cells)[0] for column in rows.columns][1:4] == ["3.500", "3.250", ""]

    class Alone:  # a rank that works, on a CPU
        device, wait, synchronize = torch.device("cpu"), staticmethod(lambda: None), staticmethod(lambda: None)
        comm = Transport()

    def work() -> None:
        time.sleep(0.01)
        with WAITS.counted():
            time.sleep(0.02)

    (found,) = account(work, Alone(), 4)  # type: ignore[arg-type]
    assert found.waiting >= 20 and found.own >= 10
    (found,) = account(lambda: time.sleep(0.01), Alone(), 4)  # type: ignore[arg-type]
    assert found.waiting == 0 and found.own >= 10
    assert not WAITS.on and account(None, Alone(), 4) == []  # type: ignore[arg-type]


def test_the_shortest_of_several_segment_lengths_counts() -> None:
    layout = Layout("contiguous", 2, 512)
    fast = [relayed(10.0, [1.0], 0.0, 20.0, [2.0], 0.0, 5.0) for _ in range(2)]
    full = [relayed(9.0, [4.0], 0.0, 19.0, [8.0], 0.0, 4.0) for _ in range(2)]  # more segments, a longer chain
    assert _shortest(layout, {64: full, 256: fast}, 1000.0) == (43.0, 256)


def test_hops_by_one_timer_and_by_several() -> None:
    """Three ranks; a hop takes 7 us there and 9 us back, and the one in the middle has a message for 20 us each way.
    Then with timers that are 1 s and 2 s ahead."""
    there = [Stamps(0, 0, 10_000), Stamps(1_000, 17_000, 37_000), Stamps(2_000, 44_000, 0)]
    assert hops_there(there) == [7.0, 7.0]
    assert hops_there([there[0], there[1]._replace(began=11_000), there[2]]) == [7.0]  # it came late: it did not wait
    # backward: the third raises at 100, the second sees it at 109 and raises at 129, the first sees it at 138
    back = [Stamps(0, 138_000, 0), Stamps(0, 109_000, 129_000), Stamps(0, 0, 100_000)]
    ahead = [0, 1_000_000_000, 2_000_000_000]
    there, back = ([Stamps(*(x + by for x in s)) for s, by in zip(p, ahead, strict=True)] for p in (there, back))
    assert hops_and_back(there, back) == [8.0, 8.0]


def test_stamps_of_a_fold() -> None:
    """When the wait began and ended, then each tile's flag; the last one counts. What sends nothing raised none."""
    sent = Stamps.of(torch.tensor([1_000, 5_000, 11_500, 12_000, 11_000]))
    assert sent == Stamps(1_000, 5_000, 12_000) and sent.relay_ms == 0.007
    assert Stamps.of(torch.tensor([1_000, 5_000, 0, 0])).relay_ms is None


def test_works_have_the_medians_of_steps() -> None:
    steps = [Work(n, [n, 2 * n], [3 * n, 4 * n], 5 * n, 6 * n, [7 * n], [8 * n], 9 * n, 10 * n) for n in (9, 1, 2)]
    assert Work.median_of(steps) == steps[2]


def test_the_makespan_is_that_of_a_chain() -> None:
    """Two ranks, hand-made times: the state is waited for where it comes late, and costs nothing where it is early."""
    even = [relayed(10.0, [1.0], 0.0, 20.0, [2.0], 0.0, 5.0) for _ in range(2)]
    contiguous = Layout("contiguous", 2, 128)
    # forward: rank 0 leaves at 11, rank 1 at max(10, 12) + 1 = 13; reverse: rank 1 at 13 + 20 + 2 = 35, rank 0 at
    # max(31, 36) + 2 = 38
    assert makespan(contiguous, even, 1.0) == 38 + 5
    early = [relayed(1.0, [1.0], 0.0, 20.0, [2.0], 0.0, 5.0), relayed(10.0, [1.0], 0.0, 5.0, [2.0], 0.0, 5.0)]
    assert makespan(contiguous, early, 1.0) == max(11 + 5 + 2 + 5, max(22, 19) + 2 + 5)
    # zigzag: rank 0 holds intervals 0 and 3, rank 1 holds 1 and 2; two hops there, two back
    both = [relayed(10.0, [1.0, 1.0], 0.0, 20.0, [2.0, 2.0], 0.0, 5.0) for _ in range(2)]
    there = [10 + 1, 11 + 1 + 1, 13 + 1, 14 + 1 + 1]  # intervals 0, 1, 2, 3
    back3 = there[3] + 20 + 2
    back2 = max(there[2] + 20, back3 + 1) + 2
    assert makespan(Layout("zigzag", 2, 256), both, 1.0) == back2 + 2 + 1 + 2 + 5
    # eight ranks, seven hops there and back, hidden where there is as much to do beside them
    layout, chain = Layout("contiguous", 8, 512), 10 + 8 * 1.0 + 7 * 1.0
    waits = [relayed(10.0, [1.0], 0.0, 20.0, [2.0], 0.0, 25.0)] * 8
    assert makespan(layout, waits, 1.0) == chain + 20 + 8 * 2 + 7 + 25
    hides = [relayed(10.0, [1.0], 0.0, 20.0, [2.0], 22.0, 3.0)] * 8
    assert makespan(layout, hides, 1.0) == max(chain + 20 + 22 + 2, chain + 20 + 8 * 2 + 7) + 3


def test_a_fold_that_waits_has_only_its_relay_before_it() -> None:
    """By hand: a fold keeps its rank for 3 forward and 5 backward, 1 and 2 of it between its message and the next
    one's flag, where there is a next one. A hop takes 1."""

    def work(before: float, relay_forward: list[float], relay_reverse: list[float]) -> Work:
        n = len(relay_forward)
        return Work(before, [3.0] * n, relay_forward, 0.0, 20.0, [5.0] * n, relay_reverse, 0.0, 5.0)

    first, last = work(10.0, [1.0], [5.0]), work(10.0, [3.0], [2.0])
    contiguous = Layout("contiguous", 3, 192)
    # forward: rank 0 leaves at 13, rank 1 sees that at 14 and leaves at 15, rank 2 has it at 16 and ends at 19;
    # backward: rank 2 leaves at 19 + 20 + 5 = 44, rank 1 at 45 + 2 = 47, rank 0 ends at 48 + 5 = 53
    assert makespan(contiguous, [first, work(10.0, [1.0], [2.0]), last], 1.0) == 53 + 5
    # Rank 1 is at its wait 2 after it is there: in time at 11, for the message comes at 14, and late by 0.5 at 12.5.
    assert makespan(contiguous, [first, work(11.0, [1.0], [2.0]), last], 1.0) == 53 + 5
    assert makespan(contiguous, [first, work(12.5, [1.0], [2.0]), last], 1.0) == 53.5 + 5
    # zigzag: rank 0 holds intervals 0 and 3, rank 1 holds 1 and 2. What stays on a rank is not sent.
    # forward: 10 + 3 = 13; 14 + 3 = 17; 17 + 3 = 20, though it was there at 17; 21 + 3 = 24
    # backward: 24 + 20 + 5 = 49; 50 + 5 = 55; 55 + 5 = 60; 61 + 5 = 66
    both = [work(10.0, [1.0, 3.0], [2.0, 5.0]), work(10.0, [3.0, 1.0], [5.0, 2.0])]
    assert makespan(Layout("zigzag", 2, 256), both, 1.0) == 66 + 5
