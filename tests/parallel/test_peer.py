"""Scans through symmetric memory: P processes on one GPU (or a GPU each where there are several).

Ranks are started once for each group size and work through everything; truth is one process's, computed beside it.
Long because all that goes through that memory is met here, and ranks share what they are given.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dnsp.kernels import kept
from dnsp.kernels.scan import LocalScan
from dnsp.launch.mps import shared_gpu
from dnsp.parallel import scan as parallel_scan
from dnsp.parallel import symmetric
from dnsp.parallel.attention import attention
from dnsp.parallel.delta_rule import begin_delta_rule, delta_rule
from dnsp.parallel.errors import PeerLost, PlanError
from dnsp.parallel.grid import Grid, make_grid
from dnsp.parallel.halo import causal_conv1d
from dnsp.parallel.layout import KINDS, Layout
from dnsp.parallel.plan import Plan, local_plan, make_plan
from dnsp.watchdog import queues
from tests.ranks import RankFailure, run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

LIMITS = {"deadline": 3.0, "noticed": 12.0, "layer bf16": 2e-2}  # seconds; relative error against one process
TOKENS, SEGMENT = 2048, 128
TRANSPORTS = ("peer", "p2p", "gather")
DOCUMENTS = {
    "one": [[0]],
    "crossing": [[0, 100, 101, 1000, 1024, 1700]],
    "goes on": [[-1, 1300]],
}
H, HV, K, V = 2, 4, 128, 128
STEPS, BACK_TO_BACK, REPLAYS = 200, 10_000, 25
SIZES = [2, 4, pytest.param(8, marks=pytest.mark.slow)]


@pytest.fixture(scope="module", autouse=True)
def _together() -> Iterator[None]:
    with shared_gpu() as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


def on_gpu(timeout: float = 60.0) -> Grid:
    """A rank's grid, and its GPU."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", str(queues(int(os.environ["WORLD_SIZE"]))))
    torch.cuda.set_device(int(os.environ["RANK"]) % torch.cuda.device_count())
    return make_grid(timeout=timeout)


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same numbers on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


# The op: outputs and gradients have one process's bits.


def leaves(goes_on: bool, seed: int = 1) -> dict[str, Tensor]:
    shapes = {"q": (1, TOKENS, H, K), "k": (1, TOKENS, H, K), "v": (1, TOKENS, HV, V)}
    given = {name: drawn(*shape, seed=seed + i, dtype=torch.bfloat16) for i, (name, shape) in enumerate(shapes.items())}
    given["g"] = -0.1 * drawn(1, TOKENS, HV, seed=seed + 3).abs()
    given["beta"] = drawn(1, TOKENS, HV, seed=seed + 4).sigmoid()
    return given | ({"initial_state": drawn(1, HV, K, V, seed=seed + 5)} if goes_on else {})


def differentiated(plan: Plan, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a plan's ranks find, those results alone that they hold."""
    mine = {n: (x if n == "initial_state" else plan.local(x)).clone().requires_grad_() for n, x in given.items()}
    state = mine.get("initial_state")
    o, final = delta_rule(
        *(mine[n] for n in ("q", "k", "v", "g", "beta")), plan=plan, l2norm=True, initial_state=state,
        output_final_state=state is not None,
    )  # fmt: skip
    wanted, grads = [o], [plan.local(drawn(1, TOKENS, HV, V, seed=77, dtype=torch.bfloat16))]
    if final is not None:
        wanted, grads = [*wanted, final], [*grads, drawn(1, HV, K, V, seed=78)]
    torch.autograd.backward(wanted, grads)
    found = {"o": o.detach()} | {f"d{n}": x.grad for n, x in mine.items() if x.grad is not None}
    return found | ({} if final is None else {"final": final.detach()})


def unequal(plan: Plan, found: dict[str, Tensor], truth: dict[str, Tensor]) -> list[str]:
    whole = ("final", "dinitial_state")
    return [n for n, x in found.items() if not torch.equal(x, truth[n] if n in whole else plan.local(truth[n]))]


def op_cases(a_host: int) -> dict[str, Any]:
    os.environ["DNSP_HOST"] = f"host {int(os.environ['RANK']) // a_host}"
    parallel_scan.MESSAGE = 2**14  # states of 256 KiB go by p2p in parts
    grid = on_gpu()
    found: dict[str, Any] = {}
    for name, starts in DOCUMENTS.items():
        given = leaves(name == "goes on")
        truth = differentiated(local_plan(starts, TOKENS, SEGMENT).to("cuda"), given)
        for kind, transport in itertools.product(KINDS, TRANSPORTS):
            plan = make_plan(starts, Layout(kind, grid.world, TOKENS), grid, SEGMENT, transport=transport).to("cuda")
            mine = differentiated(plan.agreed(), given)
            found[f"{name}, {kind}, {transport}"] = unequal(plan, mine, truth), sorted(mine)
    return found


@pytest.mark.parametrize(
    ("size", "a_host"), [(2, 2), (4, 4), (4, 2), *(pytest.param(8, n, marks=pytest.mark.slow) for n in (8, 2))]
)
def test_the_op_has_the_bits_of_one_process(size: int, a_host: int) -> None:
    """On one host, and as if over several, from one to the next of which states go by p2p."""
    for rank, found in enumerate(run_ranks(op_cases, size, a_host, timeout=600)):
        for case, (differ, names) in found.items():
            assert {"o", "dq", "dk", "dv", "dg", "dbeta"} <= set(names), case
            assert not differ, (rank, case, differ)


# The scan alone: shapes and documents of all kinds, ranks that dawdle, many in a row.


class Problem:
    """Summaries of a whole sequence, and what one process makes of them."""

    def __init__(
        self, seed: int, ranks: int, kind: str, shape: tuple[int, int, int, int], each: int, cut: bool
    ) -> None:
        B, HV, K, V = shape
        self.layout = Layout(kind, ranks, 64 * each * (2 * ranks if kind == "zigzag" else ranks))
        N = self.layout.count * each
        self.M, self.U = drawn(N, B, HV, K, K, seed=seed) / K**0.5, drawn(N, B, HV, K, V, seed=seed + 1)
        self.forgets = (drawn(N, B, HV, seed=seed + 2) > 0.5).int()
        self.M[self.forgets != 0] = 0
        draw = random.Random(seed)
        self.starts = [[0, *sorted(draw.sample(range(1, 64 * N), draw.randint(0, 3) if cut else 0))] for _ in range(B)]
        one = local_plan(self.starts, 64 * N, 64).to("cuda")
        self.continues = one.segments.continues_NB
        self.forward = LocalScan().forward(self.M, self.U, self.continues, None, None, False)()[0]
        self.reverse = LocalScan().reverse(self.M, self.U, self.continues, None, None, False, False)()[0]

    def plan(self, grid: Grid, transport: str = "peer") -> Plan:
        return make_plan(self.starts, self.layout, grid, 64, transport=transport).to("cuda")

    def held(self, plan: Plan) -> Tensor:
        return torch.tensor([start // 64 for start in plan.segments.starts], device="cuda")

    def wrong(self, plan: Plan) -> Tensor:
        """Whether a scan there and back has other bits anywhere, on the device."""
        n = self.held(plan)
        return self.wrong_of(plan, self.M[n], self.U[n], self.forgets[n], self.forward[n], self.reverse[n])

    @staticmethod
    def wrong_of(
        plan: Plan, M: Tensor, U: Tensor, forgets: Tensor | None, forward: Tensor, reverse: Tensor
    ) -> Tensor:
        there, _ = plan.scan.forward(M, U, plan.segments.continues_NB, forgets, None, False)()
        back, _ = plan.scan.reverse(M, U, plan.segments.continues_NB, forgets, None, False, False)()
        return (there != forward).any() | (back != reverse).any()


SHAPES = [(1, 4, 128, 128), (2, 2, 64, 64), (1, 3, 32, 16), (1, 8, 128, 128), (3, 1, 64, 64)]


def scan_cases() -> dict[str, Any]:
    grid = on_gpu()
    draw, mine = random.Random(0), random.Random(grid.rank)
    problems = [
        Problem(10 * i, grid.world, kind, shape, each, cut)
        for i, (kind, shape, each, cut) in enumerate(itertools.product(KINDS, SHAPES, (1, 3), (False, True)))
    ]
    plans = [problem.plan(grid) for problem in problems]
    wrong = torch.zeros(STEPS, dtype=torch.bool, device="cuda")
    for step in range(STEPS):
        n = draw.randrange(len(problems))
        if mine.random() < 0.2:  # a host that is late
            time.sleep(mine.random() * 0.01)
        if mine.random() < 0.2:  # a GPU that is late
            torch.cuda._sleep(int(mine.random() * 5e6))
        wrong[step] = problems[n].wrong(plans[n])
    found: dict[str, Any] = {"random steps": int(wrong.sum())}

    for kind in KINDS:
        problem = Problem(7, grid.world, kind, (1, 2, 64, 64), 2, False)
        plan = problem.plan(grid)
        n = problem.held(plan)
        M, U, forgets = (x[n].contiguous() for x in (problem.M, problem.U, problem.forgets))
        forward, reverse = problem.forward[n], problem.reverse[n]
        many = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(BACK_TO_BACK // (2 * len(KINDS))):
            many += problem.wrong_of(plan, M, U, forgets, forward, reverse)
        found[f"back to back, {kind}"] = int(many)

        # A graph freezes arguments; counts go on.
        graph = torch.cuda.CUDAGraph()
        again = torch.zeros((), dtype=torch.int64, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            again += problem.wrong_of(plan, M, U, forgets, forward, reverse)
            again += problem.wrong_of(plan, M, U, forgets, forward, reverse)
        for replay in range(REPLAYS):
            graph.replay()
            if replay % 5 == grid.rank:
                time.sleep(0.005)
            if replay % 3 == 0:  # other scans in between
                again += problems[0].wrong(plans[0])
        found[f"graph, {kind}"] = int(again)
    symmetric.check_all()
    found["calls"] = plans[0].comm.calls
    return found


@pytest.mark.parametrize("size", SIZES)
def test_scans_never_mistake_each_other(size: int) -> None:
    for rank, found in enumerate(run_ranks(scan_cases, size, timeout=600)):
        assert found.pop("calls") > 0
        assert not any(found.values()), (rank, found)


# A layer of everything that communicates, as it is and recomputed.


def layer_cases() -> dict[str, Any]:
    grid = on_gpu()
    starts = DOCUMENTS["crossing"]
    given = leaves(False)
    weight = 0.5 * drawn(HV * V, 4, seed=9).to(torch.bfloat16)

    def run(plan: Plan, recompute: bool) -> dict[str, Tensor]:
        mine = {n: plan.local(x).clone().requires_grad_() for n, x in given.items()}

        def layer(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
            values = causal_conv1d(v.flatten(2), weight, plan=plan).unflatten(2, v.shape[2:])
            o, _ = delta_rule(q, k, values, g, beta, plan=plan, l2norm=True)
            return attention(o, k, q, plan=plan)

        y = kept.checkpoint(layer, *mine.values()) if recompute else layer(*mine.values())
        y.backward(plan.local(drawn(*(1, TOKENS, HV, V), seed=8).to(y.dtype)))
        return {"y": y.detach(), **{n: x.grad for n, x in mine.items() if x.grad is not None}}

    truth = run(local_plan(starts, TOKENS, SEGMENT).to("cuda"), False)
    found: dict[str, Any] = {}
    bits: dict[tuple[str, str], dict[str, Tensor]] = {}
    for kind, transport in itertools.product(KINDS, TRANSPORTS):
        keys = {"p2p": "ring"}.get(transport, transport)
        plan = make_plan(
            starts, Layout(kind, grid.world, TOKENS), grid, SEGMENT, transport=transport, attention_transport=keys,
            attention_backend="flash_deterministic",
        ).to("cuda").at_layer(3)  # fmt: skip
        run(plan, False)
        calls = [plan.comm.calls]
        plain = run(plan, False)
        calls.append(plan.comm.calls)
        recomputed = run(plan, True)
        calls.append(plan.comm.calls)
        errors = {}
        for n, x in plain.items():
            want = plan.local(truth[n]).double()
            errors[n] = float((x.double() - want).norm() / want.norm())
        bits[kind, transport] = plain
        found[f"{kind}, {transport}"] = {
            "like peer": all(torch.equal(x, bits[kind, "peer"][n]) for n, x in plain.items()),
            "calls": (calls[1] - calls[0], calls[2] - calls[1]),
            "differ": [n for n in plain if not torch.equal(plain[n], recomputed[n])],
            "errors": errors,
        }
    return found


def test_a_layer_and_its_recomputation() -> None:
    for found in run_ranks(layer_cases, 2, timeout=600):
        for case, seen in found.items():
            assert seen["calls"][0] == seen["calls"][1] > 0, (case, seen)
            assert not seen["differ"] and seen["like peer"], (case, seen)
            assert max(seen["errors"].values()) < LIMITS["layer bf16"], (case, seen)


# Everything that communicates, in any order: scans, halos, keys and their gradients go through memories of their own.


def mixed_cases() -> dict[str, Any]:
    """Each op of each plan is held against one process once; 200 steps of all three in random order, on ranks that
    dawdle, then have the bits of that first time."""
    grid = on_gpu()
    draw, mine = random.Random(2), random.Random(grid.rank)
    given = leaves(False)
    weight = 0.5 * drawn(HV * V, 4, seed=9).to(torch.bfloat16)

    def scan(plan: Plan) -> dict[str, Tensor]:
        return differentiated(plan, given)

    def halo(plan: Plan) -> dict[str, Tensor]:
        x = plan.local(given["v"]).flatten(2).clone().requires_grad_()
        y = causal_conv1d(x, weight, plan=plan)
        y.backward(plan.local(drawn(1, TOKENS, HV * V, seed=8, dtype=y.dtype)))
        assert x.grad is not None
        return {"y": y.detach(), "dx": x.grad}

    def keys(plan: Plan) -> dict[str, Tensor]:
        parts = [plan.local(given[name]).clone().requires_grad_() for name in ("v", "k", "q")]
        y = attention(*parts, plan=plan)
        y.backward(plan.local(drawn(1, TOKENS, HV, V, seed=8, dtype=y.dtype)))
        return {"y": y.detach()} | {f"d{n}": x.grad for n, x in enumerate(parts) if x.grad is not None}

    ops = {"scan": scan, "halo": halo, "keys": keys}
    plans, first, errors = [], [], dict.fromkeys(ops, 0.0)
    for n in range(6):
        starts = [[0, *sorted(draw.sample(range(1, TOKENS), draw.choice((0, 2, 20))))]]
        layout = Layout(KINDS[n % 2], grid.world, TOKENS)
        own = {"attention_transport": "peer", "attention_backend": "flash_deterministic"}
        plan = make_plan(starts, layout, grid, SEGMENT, transport="peer", **own).to("cuda").agreed()
        one = local_plan(starts, TOKENS, SEGMENT).to("cuda")
        plans.append(plan)
        first.append({name: op(plan) for name, op in ops.items()})
        for name, op in ops.items():
            for part, x in op(one).items():
                want, found = plan.local(x).double(), first[n][name][part].double()
                errors[name] = max(errors[name], float((found - want).norm() / want.norm()))
    wrong = {name: torch.zeros((), dtype=torch.int64, device="cuda") for name in ops}
    for _ in range(STEPS):
        n = draw.randrange(len(plans))
        for name in draw.sample(sorted(ops), len(ops)):
            if mine.random() < 0.1:
                time.sleep(mine.random() * 0.01)
            if mine.random() < 0.1:
                torch.cuda._sleep(int(mine.random() * 5e6))
            for part, x in ops[name](plans[n]).items():
                wrong[name] += (x != first[n][name][part]).any()
    symmetric.check_all()
    return {"errors": errors, "wrong": {name: int(count) for name, count in wrong.items()}}


@pytest.mark.parametrize("size", SIZES)
def test_scans_halos_and_keys_never_mistake_each_other(size: int) -> None:
    for rank, found in enumerate(run_ranks(mixed_cases, size, timeout=600)):
        assert found["errors"]["scan"] == 0 and max(found["errors"].values()) < LIMITS["layer bf16"], (rank, found)
        assert not any(found["wrong"].values()), (rank, found)


# What goes wrong.


def noticed(grid: Grid, work: Callable[[], object]) -> tuple[str, int | None, float]:
    """What a rank is told, of whom, and after how many seconds, where rank 1 leaves out a work of all."""
    grid_barrier(grid)
    start = time.monotonic()
    if grid.rank == 1:
        time.sleep(2 * LIMITS["deadline"] + 2)
        return "", None, 0.0
    try:
        work()
        torch.cuda.synchronize()
        symmetric.check_all()
    except PeerLost as lost:
        return str(lost), lost.peer, time.monotonic() - start
    return "nothing was noticed", None, time.monotonic() - start


def with_a_stalled_exchange(what: str) -> tuple[str, int | None, float]:
    grid = on_gpu(LIMITS["deadline"])
    own = {"attention_transport": "peer", "attention_backend": "flash_deterministic"}
    layout = Layout("contiguous", grid.world, TOKENS)
    plan = make_plan([[0]], layout, grid, SEGMENT, transport="peer", **own).to("cuda").at_layer(5)
    given = {name: plan.local(x) for name, x in leaves(False).items()}
    weight = drawn(HV * V, 4, seed=9).to(torch.bfloat16)

    def work() -> None:
        if what == "halo":
            causal_conv1d(given["v"].flatten(2), weight, plan=plan)
        else:
            attention(given["v"], given["k"], given["q"], plan=plan)

    work()
    return noticed(grid, work)


@pytest.mark.parametrize("what", ["halo", "keys"])
def test_a_stalled_exchange_names_the_rank_within_the_deadline(what: str) -> None:
    """Contiguous: the next rank waits for the stalled one's halo, and for its keys."""
    told = run_ranks(with_a_stalled_exchange, 4, what, timeout=200, check=False)
    assert not any(isinstance(found, RankFailure) for found in told), told
    words, peer, seconds = told[2]
    assert words.startswith("rank 2 lost rank 1 during ") and "layer 5" in words and peer == 1, told
    assert ("halo" in words) == (what == "halo") and "(forward)" in words, told
    assert LIMITS["deadline"] - 1 < seconds < LIMITS["noticed"], told


def with_a_stalled_rank(kind: str, backward: bool) -> tuple[str, int | None, float]:
    grid = on_gpu(LIMITS["deadline"])
    problem = Problem(1, grid.world, kind, (1, 2, 64, 64), 2, False)
    plan = problem.plan(grid).at_layer(5)
    n = problem.held(plan)
    M, U = problem.M[n], problem.U[n]
    assert not problem.wrong(plan)

    def work() -> None:
        if backward:
            for _ in range(2):
                plan.scan.reverse(M, U, plan.segments.continues_NB, None, None, False, False)()
        else:
            plan.scan.forward(M, U, plan.segments.continues_NB, None, None, False)()

    return noticed(grid, work)


def grid_barrier(grid: Grid) -> None:
    torch.cuda.synchronize()
    grid.transport().barrier()


@pytest.mark.parametrize(("kind", "backward"), [("contiguous", False), ("contiguous", True), ("zigzag", False)])
def test_a_stalled_rank_is_named_within_the_deadline(kind: str, backward: bool) -> None:
    told = run_ranks(with_a_stalled_rank, 4, kind, backward, timeout=200, check=False)
    assert not any(isinstance(found, RankFailure) for found in told), told
    # Contiguous: those behind the stalled rank wait. Zigzag: a state comes back to those before it, too.
    waiting = {"contiguous": [0] if backward else [2, 3], "zigzag": [0, 2, 3]}[kind]
    for rank in waiting:
        words, peer, seconds = told[rank]
        way = "backward" if backward else "forward"
        assert words.startswith(f"rank {rank} lost rank 1 during the delta rule's hop at interval"), (rank, words)
        assert f"({way}) of layer 5" in words and peer == 1, (rank, words)
        assert LIMITS["deadline"] - 1 < seconds < LIMITS["noticed"], (rank, seconds)


def refusals() -> dict[str, str]:
    grid = on_gpu()
    found = {}
    comm = grid.transport()
    for name, work in {
        "no room": lambda: symmetric.memory(comm, torch.device("cuda", torch.cuda.current_device())).reserve(10**9),
        "shape": lambda: Problem(1, grid.world, "contiguous", (1 + grid.rank, 2, 64, 64), 1, False).wrong(
            Problem(1, grid.world, "contiguous", (1 + grid.rank, 2, 64, 64), 1, False).plan(grid)
        ),
        "documents": lambda: make_plan(
            [[0, 5 + grid.rank]], Layout("zigzag", grid.world, 1024), grid, transport="peer"
        ).agreed(),
    }.items():
        try:
            work()
            found[name] = "nothing"
        except PlanError as error:
            found[name] = str(error)
    return found


def test_refusals() -> None:
    for found in run_ranks(refusals, 2, timeout=200):
        assert "the symmetric buffers take" in found["no room"] and "MiB free; use p2p" in found["no room"], found
        assert "disagree about the state of a scan: rows is 1 on rank 0 and 2 on rank 1" in found["shape"], found
        assert "disagree about the plan: documents is 2 documents" in found["documents"], found


# What needs no state is computed while states travel: a rank's stream is free until it asks for them.


def overlap_cases() -> dict[str, bool]:
    """Each sender is held up, by hosts alone, until its receiver's GPU has done what lies between begin and finish."""
    grid = on_gpu(20.0)
    comm, first, found = grid.transport(), grid.rank == 0, {}
    given = leaves(False)
    names = ("q", "k", "v", "g", "beta")

    def work_is_done() -> None:
        torch.cuda.current_stream().synchronize()
        comm.barrier()

    for transport in TRANSPORTS:
        layout = Layout("contiguous", grid.world, TOKENS)
        plan = make_plan([[0]], layout, grid, SEGMENT, transport=transport).to("cuda")
        results = []
        for held in (False, True):
            mine = [plan.local(given[name]).clone().requires_grad_() for name in names]
            weight = drawn(V, V, seed=40, dtype=torch.bfloat16).requires_grad_()
            if held and first:
                comm.barrier()  # forward: the second rank has computed its gate
                weight.register_hook(lambda grad: work_is_done())
            scan = begin_delta_rule(*mine, plan=plan, l2norm=True)
            gate = mine[2] @ weight
            if held and not first:
                work_is_done()
            o, _ = scan.finish()
            if held and not first:  # backward: the first rank has computed its gate's gradient
                o.register_hook(lambda grad: comm.barrier())
            (o * gate).sum().backward()
            results.append([o.detach(), weight.grad, *(x.grad for x in mine)])
        symmetric.check_all()
        found[transport] = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    return found


def test_a_rank_works_while_states_travel() -> None:
    for found in run_ranks(overlap_cases, 2, timeout=300):
        assert found == dict.fromkeys(TRANSPORTS, True)
