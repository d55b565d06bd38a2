"""Messages between real ranks, and what the others are told when one dies or stays away."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from dnsp.parallel import transport
from dnsp.parallel.attention import attention
from dnsp.parallel.delta_rule import delta_rule
from dnsp.parallel.errors import PeerLost, PlanError
from dnsp.parallel.grid import make_grid
from dnsp.parallel.halo import causal_conv1d
from dnsp.parallel.layout import Layout
from dnsp.parallel.plan import make_plan
from dnsp.parallel.probe import NO_GPU, Place, refusal, unreachable
from dnsp.parallel.transport import Transport
from tests.ranks import RankFailure, run_ranks

LIMITS = {"group timeout": 3.0, "noticed": 10.0, "compiling timeout": 1.5}  # seconds
LOST = 1  # the rank that goes
OPS = {"dies": ("hop", "summaries", "halo", "keys"), "sleeps": ("hop", "summaries")}  # each waits out its timeout


def on_every_rank() -> tuple[tuple[object, ...], list[list[float]]]:
    """A grid of two by two, and messages between all four."""
    grid = make_grid(2, timeout=30)
    total = torch.tensor(float(grid.rank))
    dist.all_reduce(total, group=grid.sequence_group)
    place = grid.data_rank, grid.sequence_rank, grid.sequence_ranks, float(total)

    comm = Transport(grid.everyone, range(4), grid.rank)
    right, left = (grid.rank + 1) % 4, (grid.rank - 1) % 4
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        mine = torch.full((3,), float(grid.rank), dtype=dtype)
        arriving = torch.empty_like(mine)
        comm.exchange([(right, mine)], [(left, arriving)], "test").wait()
        found.append([float(arriving[0]), *(float(part[0]) for part in comm.all_gather(mine, "test"))])
    comm.exchange([(right, mine[:0])], [(left, mine[:0])], "test").wait()
    assert comm.calls == 6  # nothing to send is no call
    return (*place, grid.mpu().get_data_parallel_group_ranks()), found


def test_a_grid_of_data_and_sequence_ranks_and_their_messages() -> None:
    places, messages = zip(*run_ranks(on_every_rank, 4, timeout=60), strict=True)
    assert list(places) == [
        (0, 0, (0, 1), 1.0, [0, 2]),
        (0, 1, (0, 1), 1.0, [1, 3]),
        (1, 0, (2, 3), 5.0, [0, 2]),
        (1, 1, (2, 3), 5.0, [1, 3]),
    ]
    for rank, found in enumerate(messages):
        assert found == [[(rank - 1) % 4, 0.0, 1.0, 2.0, 3.0]] * 3


def without_a_rank(how: str) -> list[tuple[str, int, int | None, str, float]]:
    """Each communicating op in turn, on groups of their own, while one rank is dead or asleep."""
    grids = [make_grid(timeout=LIMITS["group timeout"]) for _ in range(4)]
    rank = grids[0].rank
    if rank == LOST:
        if how == "dies":
            os._exit(7)
        time.sleep(2 * LIMITS["group timeout"] + 2)
        return []
    x = torch.randn(1, 256, 2, 16)
    gates = torch.rand(1, 256, 2)
    told = []
    for grid, op in zip(grids, OPS[how], strict=False):
        gather = op == "summaries"
        layout = Layout("contiguous", grid.world, 256 * grid.world)
        plan = make_plan([[0]], layout, grid, transport="gather" if gather else "p2p")
        start = time.monotonic()
        try:
            if op in ("hop", "summaries"):
                delta_rule(x, x, x, -gates, gates, plan=plan, l2norm=True)
            elif op == "halo":
                causal_conv1d(x.flatten(2), torch.randn(32, 4), plan=plan)
            else:
                attention(x, x, x, plan=plan)
        except PeerLost as lost:
            told.append((op, lost.rank, lost.peer, str(lost), time.monotonic() - start))
    return told


def disagreeing() -> dict[str, str]:
    """What each of three ranks is told where rank 2 means something else."""
    grid = make_grid(timeout=30)
    odd = grid.rank == 2
    usual: dict[str, Any] = {"doc_starts": [[0, 70]], "tokens": 768, "segment_tokens": 64, "transport": "p2p"}
    changes: dict[str, dict[str, Any]] = {
        "documents": {"doc_starts": [[0, 71]]},
        "rows": {"doc_starts": [[0, 70], [0]]},
        "sequence length": {"tokens": 384},
        "segment_tokens": {"segment_tokens": 128},
        "transport": {"transport": "gather"},
    }
    told = {}
    for name, change in changes.items():
        given = usual | (change if odd else {})
        layout = Layout("contiguous", grid.world, given["tokens"])
        plan = make_plan(given["doc_starts"], layout, grid, given["segment_tokens"], transport=given["transport"])
        try:
            plan.agreed()
        except PlanError as refused:
            told[name] = str(refused)
    plan = make_plan([[0, 70]], Layout("zigzag", grid.world, 768), grid)
    assert plan.agreed() is plan
    try:
        x, gates = torch.randn(1, 256, 2, 16), torch.rand(1, 256, 2)
        by_peer = make_plan([[0]], Layout("contiguous", grid.world, 768), grid, transport="peer")
        delta_rule(x, x, x, -gates, gates, plan=by_peer)
    except PlanError as refused:
        told["peer"] = str(refused)
    told["refusal"] = str(refusal(grid.transport()))
    return told


def test_ranks_that_disagree_are_named_with_the_field() -> None:
    for told in run_ranks(disagreeing, 3, timeout=90):
        refused = told.pop("peer")
        assert "transport peer: it carries states" in refused and "on cpu; use p2p" in refused
        assert told.pop("refusal") == "rank 0: it needs a GPU on every rank"
        assert set(told) == {"documents", "rows", "sequence length", "segment_tokens", "transport"}
        for field, words in told.items():
            assert words.startswith(f"the ranks disagree about the plan: {field} is "), words
            assert "on rank 0 and " in words and "on rank 2; give every rank" in words, words


@contextmanager
def two_gpus(mine: int, deaf: Callable[[int, int], bool]) -> Iterator[None]:
    """As if this rank had one of two GPUs, some of which cannot reach others."""
    with (
        patch("torch.cuda.is_available", lambda: True), patch("torch.cuda.device_count", lambda: 2),
        patch("torch.cuda.current_device", lambda: mine),
        patch("torch.cuda.get_device_properties", lambda gpu: SimpleNamespace(uuid=f"GPU-{gpu}")),
        patch("torch.cuda.can_device_access_peer", lambda *pair: not deaf(*pair)),
    ):  # fmt: skip
        yield


def deaf_pairs() -> dict[str, list[str]]:
    """What a rank of two is told where neither GPU reaches the other, where one does not, and where both do."""
    from dnsp import watchdog
    from dnsp.choices import make_choices
    from dnsp.config import parse_config
    from dnsp.parallel import symmetric

    grid, told = make_grid(timeout=30), dict[str, list[str]]()
    for name, deaf in {
        "both": lambda *pair: True,
        "one": lambda *pair: pair == (1, 0),
        "none": lambda *pair: False,
    }.items():
        with two_gpus(grid.rank, deaf):
            words = watchdog.peer_refusal(grid)
            told[name] = [str(words)]
            try:
                if words:
                    symmetric.memory(grid.transport(), torch.device("cuda", grid.rank))
            except PlanError as refused:
                told[name].append(str(refused))
        for section in ({"transport": "peer"}, {"attention_transport": "peer"}, {}):
            try:
                chosen, _ = make_choices(parse_config({"parallel": section}, "the test"), None, words)
                told[name].append(f"{chosen.transport}, {chosen.attention_transport}")
            except PlanError as refused:
                told[name].append(str(refused))
    return told


def test_gpus_that_do_not_reach_each_other_are_named() -> None:
    for told in run_ranks(deaf_pairs, 2, timeout=90):
        assert told["none"] == ["None", "peer, peer", "peer, peer", "peer, peer"]
        for name, here, there in (("both", 0, 1), ("one", 1, 0)):
            words = f"rank {here}: ranks of a host write each other's memory, and GPU {here} cannot reach GPU {there}'s"
            assert told[name] == [
                words,
                f"transport peer: {words}; use p2p and ring (parallel.transport, parallel.attention_transport)",
                f"parallel.transport=peer: {words}; use auto, p2p or gather",
                f"parallel.attention_transport=peer: {words}; use auto, ring or gather",
                "p2p, ring",
            ]


def test_what_keeps_ranks_of_a_host_from_each_others_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is not seen from here, as where each rank is given one alone, is left to the rendezvous."""
    here, there, unseen, none = (Place("a host", gpu) for gpu in ("GPU-0", "GPU-1", "GPU-7", ""))
    with two_gpus(0, lambda *pair: True):
        assert unreachable([here, none]) == NO_GPU
        assert unreachable([here, here, unseen]) is None
        assert unreachable([there, here]) == (
            "ranks of a host write each other's memory, and GPU 0 cannot reach GPU 1's"
        )
    with two_gpus(0, lambda *pair: pair == (1, 0)):
        assert unreachable([here, there]) is None  # the other rank will say
        monkeypatch.setitem(sys.modules, "torch.distributed._symmetric_memory", None)
        assert str(unreachable([here, there])).startswith("this torch has no symmetric memory (")


@pytest.mark.parametrize("how", ["dies", "sleeps"])
def test_a_lost_rank_is_named(how: str) -> None:
    results = run_ranks(without_a_rank, 3, how, timeout=90, check=False)
    assert not isinstance(results[2], RankFailure), results[2]
    told = {op: (rank, peer, words, seconds) for op, rank, peer, words, seconds in results[2]}
    assert tuple(told) == OPS[how]
    for op, (rank, peer, words, seconds) in told.items():
        assert rank == 2 and seconds < LIMITS["noticed"], (op, seconds)
        assert words.startswith("rank 2 lost "), words
        assert peer == (None if op == "summaries" else LOST), (op, words)
    assert "hop at interval 2 (forward)" in told["hop"][2]
    assert "Timed out" in told["hop"][2] if how == "sleeps" else "keys and values" in told["keys"][2]


def compiling() -> tuple[dict[str, bool], list[str]]:
    """As if kernels were compiled here: a rank that comes late to the first of each kind, and once more to the next.
    Before that, what it is told where it means something else."""
    transport.COMPILING.add("cpu")
    grid, lost = make_grid(timeout=LIMITS["compiling timeout"]), dict[str, bool]()
    plan = make_plan([[0]], Layout("contiguous", grid.world, 256 * grid.world), grid)
    x, gates, weight = torch.randn(1, 256, 2, 16), torch.rand(1, 256, 2), torch.randn(32, 4)
    ops = {
        "halo": lambda: causal_conv1d(x.flatten(2), weight, plan=plan),
        "scan": lambda: delta_rule(x, x, x, -gates, gates, plan=plan, l2norm=True),
        "keys": lambda: attention(x, x, x, plan=plan),
    }
    told = []
    odd = x.double() if grid.rank == 0 else x
    fewer = x[:, :, : 2 - grid.rank]
    wrong: list[Callable[[], Any]] = [
        lambda: causal_conv1d(fewer.flatten(2), weight[: 16 * fewer.shape[2]], plan=plan),
        lambda: delta_rule(fewer, fewer, fewer, -gates[..., : fewer.shape[2]], gates[..., : fewer.shape[2]], plan=plan),
        lambda: attention(odd, odd, odd, plan=plan),
    ]
    for op in wrong:
        try:
            op()
        except PlanError as refused:
            told.append(str(refused))
    ops["the next layer's halo"] = lambda: causal_conv1d(x.flatten(2), weight, plan=plan.at_layer(1))
    for name in (*ops, "again"):
        if grid.rank == 0:
            time.sleep(LIMITS["compiling timeout"] + 0.5)
        try:
            ops.get(name, ops["scan"])()
            lost[name] = False
        except PeerLost:
            lost[name] = True
    return lost, told


def test_messages_have_their_time_once_all_have_come_to_the_first() -> None:
    (first, told), (second, same) = run_ranks(compiling, 2, timeout=60)
    assert told == same == [
        f"the ranks disagree about {words}; give every rank of a group the same"
        for words in (
            "a convolution's halo: channels is 32 on rank 0 and 16 on rank 1",
            "the state of a scan: value heads is 2 on rank 0 and 1 on rank 1",
            "attention's heads: dtype is float64 on rank 0 and float32 on rank 1",
        )
    ]
    assert second == {"halo": False, "scan": False, "keys": False, "the next layer's halo": False, "again": True}
    assert not any(first[name] for name in ("halo", "scan", "keys"))
