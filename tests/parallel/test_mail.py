"""The peer scan without a GPU: real ranks whose memory is a shared file, the kernels under Triton's interpreter.

Everything is as on a GPU but the making of the memory and the device's timer: a wait has no end here, and sleeps a
little where it would look at the time.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dnsp.kernels import scan as kernels_scan
from dnsp.kernels import triton_scan
from dnsp.parallel import scan as parallel_scan
from dnsp.parallel import symmetric
from dnsp.parallel.attention import attention
from dnsp.parallel.errors import PeerLost
from dnsp.parallel.grid import make_grid
from dnsp.parallel.halo import causal_conv1d
from dnsp.parallel.layout import KINDS, Layout
from dnsp.parallel.plan import local_plan, make_plan
from dnsp.parallel.transport import Transport
from tests.kernels.interpreter import hasten
from tests.kernels.triton_compile import Compiled
from tests.ranks import run_ranks

SHAPES = [(1, 1, 16, 16), (2, 1, 16, 32)]  # B, HV, K, V
PAUSE = 3e-3  # seconds that a wait sleeps each time it has looked: ranks share cores


def share_through(folder: str, comm: Transport) -> None:
    """Replaces symmetric memory by files, and the question for a GPU by yes."""
    hasten()
    from dnsp.parallel import plan, post, scan, symmetric

    class OnHost(symmetric.Symmetric):
        def __init__(self) -> None:
            self.comm, self.device, self.capacity = comm, torch.device("cpu"), 0
            self.memories, self._where, self._kept = [], {}, []

        def meet(self, U_NBHKV: Tensor) -> None:
            self.check()
            capacity = symmetric.capacity_of(triton_scan.tiles_of(U_NBHKV))
            if capacity > self.capacity:
                words = symmetric.words_of(capacity)
                files = [f"{folder}/{rank}-{capacity}" for rank in range(comm.size)]
                self.take([torch.from_file(file, True, words, dtype=torch.int32) for file in files])
                comm.barrier()

    class PostOnHost(post.Post):
        def __init__(self) -> None:
            self.comm, self.device, self.slot_words, self._next = comm, torch.device("cpu"), 0, 0
            self.memories, self._where, self._kept, self._out, self._in = [], {}, [], None, None  # type: ignore

        def grow(self, words: int, what: str) -> None:
            files = [f"{folder}/post-{rank}-{words}" for rank in range(comm.size)]
            self.take([torch.from_file(file, True, words, dtype=torch.int32) for file in files])
            comm.barrier()

    now = triton_scan._now

    def lets_others_work(timed: bool) -> Any:
        time.sleep(PAUSE)
        return now(timed)

    triton_scan._now = lets_others_work
    if comm.size == 1:  # alone on its host
        scan.on_gpu = kernels_scan.on_gpu = triton_scan.takes = lambda U: True
        return
    assert comm.control is not None
    plan.mail_on_host = True
    symmetric._regions[comm.control.group_name, post.Post] = PostOnHost()
    symmetric._regions[comm.control.group_name, symmetric.Symmetric] = OnHost()
    triton_scan.takes = lambda U: True
    scan.on_gpu = kernels_scan.on_gpu = lambda U: True


class Drawn(NamedTuple):
    """A layout with documents, summaries of all its segments, which of them forget, a state at an end, and by turns
    whether one comes in and whether one goes out."""

    name: str
    layout: Layout
    starts: list[list[int]]
    M: Tensor
    U: Tensor
    flags: Tensor
    state: Tensor
    ends: tuple[tuple[bool, bool], ...]


def drawn(world: int) -> Iterator[Drawn]:
    draw = random.Random(world)
    for step, (kind, shape, each) in enumerate(itertools.product(KINDS, SHAPES, (1, 2))):
        B, HV, K, V = shape
        layout = Layout(kind, world, 64 * each * (2 if kind == "zigzag" else 1) * world)
        starts = [[0, *sorted(draw.sample(range(1, layout.tokens), step % 3))] for _ in range(B)]
        N = layout.tokens // 64
        generator = torch.Generator().manual_seed(step)
        M, U = (torch.randn(N, B, HV, K, width, generator=generator) for width in (K, V))
        state = torch.randn(B, HV, K, V, generator=generator)
        M /= K**0.5
        flags = (torch.rand(N, B, HV, generator=generator) < (1.0 if step % 3 == 0 else 0.5)).int()
        M[flags != 0] = 0  # as strong decays leave it
        ends = ((True, False), (False, True)) if step % 4 in (1, 2) else ((False, False), (True, True))
        yield Drawn(f"{kind} {shape} {each} {starts}", layout, starts, M, U, flags, state, ends)


def by_one_process(case: Drawn) -> list[list[tuple[Tensor, Tensor | None]]]:
    """For each of a case's ``ends``: what a scan forward and one in reverse find."""
    one = local_plan(case.starts, case.layout.tokens, 64)
    given = case.M, case.U, one.segments.continues_NB, None
    found = []
    for has_initial, want_final in case.ends:
        initial, final = (case.state if there else None for there in (has_initial, want_final))
        forward = one.scan.forward(*given, initial, want_final)()
        found.append([forward, one.scan.reverse(*given, final, has_initial, want_final)()])
    return found


def on_every_rank(folder: str, a_host: int) -> tuple[int, list[str]]:
    os.environ["DNSP_HOST"] = f"host {int(os.environ['RANK']) // a_host}"
    grid = make_grid(timeout=60)
    share_through(f"{folder}/{grid.rank // a_host}", grid.transport().nearby())
    parallel_scan.MESSAGE = 1  # as many parts as there are rows, where there are several hosts
    cases = list(drawn(grid.world))
    shared: list[Any] = [None] * grid.world  # every rank finds the truth of some cases, in one process, for all
    torch.distributed.all_gather_object(shared, [by_one_process(case) for case in cases[grid.rank :: grid.world]])
    mine, wrong, hops = random.Random(grid.rank), [], 0
    for step, case in enumerate(cases):
        M, U, flags = case.M, case.U, case.flags
        plan = make_plan(case.starts, case.layout, grid, 64, transport="peer")
        told = M.masked_fill((flags != 0)[..., None, None], torch.nan)  # and nobody reads it who is told
        held = [start // 64 for start in plan.segments.starts]
        truths = shared[step % grid.world][step // grid.world]
        for (has_initial, want_final), wanted in zip(case.ends, truths, strict=True):
            if mine.random() < 0.3:
                time.sleep(0.2 * mine.random())
            initial, final = (case.state if there else None for there in (has_initial, want_final))
            mine_M, forgets = (told, flags[held]) if has_initial == bool(step % 2) else (M, None)
            own = mine_M[held], U[held], plan.segments.continues_NB, forgets
            found = [
                plan.scan.forward(*own, initial, want_final)(),
                plan.scan.reverse(*own, final, has_initial, want_final)(),
            ]
            ends = plan.holds_last and want_final, 0 in plan.intervals[0] and has_initial
            for way, (states, last), (all_states, truth), here in zip("><", found, wanted, ends, strict=True):
                same = torch.equal(states, all_states[held])
                same &= (last is None) == (not here) and (last is None or torch.equal(last, truth))
                if not same:
                    wrong.append(f"{case.name} {way} {has_initial} {want_final}")
        hops += plan.comm.calls
    return hops, wrong


def in_vain() -> dict[str, Any]:
    """Waits whose time is up at once, on one rank that plays the second of four."""
    from dnsp.kernels import proof, proof_run
    from dnsp.kernels.launches import candidates
    from dnsp.parallel import symmetric

    inbox, outbox, clock = triton_scan.loopback(4, torch.device("cpu"))
    clock = clock._replace(limit=-1)
    M, U = torch.randn(1, 1, 4, 16, 16), torch.randn(1, 1, 4, 16, 16)

    def post() -> None:
        triton_scan.fold(M, U, None, None, None, 1, False, outbox=outbox, clock=clock)

    found: dict[str, Any] = {}
    with proof.mode(proof_run.Recording(candidates()["as tuned"])):
        post()
        triton_scan.wait(4, inbox, outbox, clock, 3, 0)
        found["in time"] = clock.record.tolist(), clock.status.tolist()
        for _ in range(triton_scan.DEPTH - 1):
            post()
        triton_scan.wait(4, None, outbox, clock, 5, 2)
        found["no room"] = clock.record.tolist(), clock.status.tolist()
        sent = inbox.ready_C.tolist()
        post()
        triton_scan.wait(4, inbox, None, clock, 7, 1)
        found["after"] = clock.record.tolist(), clock.status.tolist(), inbox.ready_C.tolist() == sent

    class Told(symmetric.Region):
        def __init__(self) -> None:
            self.comm = Transport(None, (10, 11, 12, 13), 1, timeout=7.0)
            self.device = torch.device("cpu")
            self.memories, self._where, self._kept = [], {}, []
            self.take([torch.zeros(16, dtype=torch.int32) for _ in range(4)])

        def _status(self, rank: int) -> list[int]:
            return self.memories[rank][:4].tolist()

    for name, kind, waits in (("direct", 1, {}), ("behind", 1, {0: 3}), ("full", 2, {}), ("ring", 1, {0: 3, 3: 1})):
        told = Told()
        number = told.where("the hop", 0, 2)
        told.check()
        for rank, other in waits.items():
            told.memories[rank][1] = other + 1
        told.clock.record[0] = 4 * number + kind
        try:
            told.check()
        except PeerLost as lost:
            found[name] = lost.peer, str(lost)
    return found


def test_a_larger_memory_leaves_a_captured_graph_its_own() -> None:
    """Counts of an earlier memory are kept, and what a wait on it leaves is seen."""

    class Grown(symmetric.Symmetric):
        def __init__(self) -> None:
            self.comm, self.device = Transport(None, (10, 11), 1, timeout=7.0), torch.device("cpu")
            self.memories, self._where, self._kept = [], {}, []

        def _status(self, rank: int) -> list[int]:
            return self.memories[rank][:4].tolist()

    grown = Grown()
    grown.take([torch.zeros(symmetric.words_of(64), dtype=torch.int32) for _ in range(2)])
    inbox, outbox, earlier = grown.inbox(0), grown.outbox(0), grown.clock
    counts = [StorageWeakRef(x.untyped_storage()) for x in (inbox.taken_C, outbox.sent_C)]
    del inbox, outbox
    grown.take([torch.zeros(symmetric.words_of(128), dtype=torch.int32) for _ in range(2)])
    assert grown.capacity == 128 and not any(count.expired() for count in counts)
    larger = [*grown.inbox(0), *grown.outbox(0)]  # not those that were asked for before
    assert all(128 in x.shape and not x.any() for x in larger)
    earlier.record[0] = 4 * grown.where("the hop", 0, None) + 1
    with pytest.raises(PeerLost, match="rank 11 lost rank 10 during the hop"):
        grown.check()


def test_a_wait_in_vain_is_recorded_once_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (found,) = run_ranks(in_vain, 1, fresh=True)
    assert found["in time"] == ([0], [0, 0, 0, 0])
    assert found["no room"] == ([5 * 4 + 2], [1, 3, 0, 0])
    assert found["after"] == ([5 * 4 + 2], [1, 3, 0, 0], True)  # nothing is waited for or delivered any more
    words = "rank 11 lost rank {} during the hop: rank {} did not {} within 7 s"
    assert found["direct"] == (10, words.format(10, 10, "deliver"))
    assert found["behind"] == (13, words.format(13, 10, "deliver") + ", itself waiting for rank 13")
    assert found["full"] == (12, words.format(12, 12, "take what came before"))
    assert found["ring"][0] == 13


def exchanging() -> list[tuple[str, bool, float]]:
    """Attention and halos of every layout, there and back, against one process: same bits, relative error."""
    grid = make_grid(timeout=60)
    with tempfile.TemporaryDirectory(prefix="mail-") as mine:
        share_through(grid.transport().from_all(mine)[0], grid.transport())
        found = []
        for kind, starts in itertools.product(KINDS, ([[0], [0]], [[0, 100, 101, 400], [0, 256]])):
            T, layout = 512, Layout(kind, grid.world, 512)
            plan = make_plan(starts, layout, grid, transport="peer", attention_transport="peer")
            ring, one = make_plan(starts, layout, grid), local_plan(starts, T)
            draw = torch.Generator().manual_seed(3)
            q, k, v, do = (torch.randn(2, T, heads, 15, generator=draw) for heads in (2, 1, 1, 2))
            x, weight, dx = (torch.randn(*shape, generator=draw) for shape in ((2, T, 5), (5, 4), (2, T, 5)))
            x, dx = x.bfloat16(), dx.bfloat16()
            results = []
            for each in (plan, ring, one):
                leaves = [each.local(t).clone().requires_grad_() for t in (q, k, v, x)]
                o = attention(*leaves[:3], plan=each)
                y = causal_conv1d(leaves[3], weight.bfloat16(), plan=each)
                torch.autograd.backward([o, y], [each.local(do), each.local(dx)])
                results.append([o.detach(), y.detach(), *(leaf.grad for leaf in leaves)])
            for name, got, by_ring, whole in zip(("o", "y", "dq", "dk", "dv", "dx"), *results, strict=True):
                want = plan.local(whole).double()
                error = float((got.double() - want).norm() / want.norm())
                found.append((f"{kind} {starts} {name}", torch.equal(got, by_ring), error))
        grid.transport().barrier()
        return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_exchanges_by_mail_are_those_of_the_ring(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for rank, found in enumerate(run_ranks(exchanging, size, timeout=280, fresh=True)):
        for case, same, error in found:
            assert same and error < (1e-2 if case.endswith(("y", "dx")) else 1e-6), (rank, case, same, error)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("size", "a_host"),
    [(2, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((3, 3), (4, 4), (4, 2), (3, 2)))],
)
def test_scans_by_mail_have_one_processs_bits(size: int, a_host: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one host, and over several, from one to the next of which states go by p2p."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with tempfile.TemporaryDirectory(prefix="mail-") as folder:
        for n in range(size):
            Path(folder, str(n)).mkdir()
        for rank, (hops, wrong) in enumerate(run_ranks(on_every_rank, size, folder, a_host, timeout=280, fresh=True)):
            assert hops > 0 and not wrong, (rank, wrong)


def compiled(kernel: Any, constants: dict[str, Any], **options: int) -> tuple[str, Compiled]:
    """PTX and binary for a GPU that need not be there."""
    integers = {"N", "steps", "B", "HV", "first_row", "start", "sends", "capacity"}
    integers |= {"first_tile", "tiles", "limit", "where", "peer", "receives", "depth"}
    counts = {"forgets", "taken", "in_free", "out_ready", "sent", "status", "ready", "free"}
    types, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name] = "constexpr"
        elif name in integers:
            types[name] = "i32"
        else:
            special = {"record": "*i64", "stamps": "*i64", "continues": "*i1"}
            types[name] = "*i32" if name in counts else special.get(name, "*fp32")
            attributes[(i,)] = [["tt.divisibility", 16]]
    binary = triton.compile(
        ASTSource(kernel, types, constants, attributes),
        target=GPUTarget("cuda", 90, 32),
        options=options,
    )
    return binary.asm["ptx"], Compiled.of(binary.asm["cubin"])


def test_the_wait_acquires_and_is_small() -> None:
    constants = {"BLOCK": triton_scan.WAITED, "TIMED": True}
    ptx, binary = compiled(triton_scan.wait_kernel, constants, num_warps=1, num_stages=1)
    loop = ptx[ptx.index("// %.lr.ph") : ptx.index("fence.acq_rel.sys")]
    assert "ld.volatile.global" in loop and "%globaltimer" in loop  # counts are read again, and time is looked at
    assert "st.global" not in loop and ".shared" not in ptx and "ntid" not in loop
    assert ptx.index("fence.acq_rel.sys") < ptx.rindex("st.global")
    assert binary.spilled == 0 and not binary.matrix


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("forgets", [False, True])
def test_the_fold_releases_what_it_has_written(reverse: bool, forgets: bool) -> None:
    constants = {
        **{"K": 128, "V": 128, "BV": triton_scan.COLUMNS, "DEPTH": triton_scan.DEPTH, "TILE": triton_scan.TILE},
        **{"TIMED": True, "HAS_CONTINUES": True, "HAS_FORGETS": forgets, "REVERSE": reverse},
    }
    how = triton_scan.options(128)
    ptx, binary = compiled(triton_scan.fold_kernel, constants | {"WIDTH": how.pop("WIDTH")}, **how)
    raised, freed = (found.start() for found in re.finditer(r"atom\.global\.sys\.release\.exch", ptx))
    written, read = ptx.rindex("st.global.v4", 0, raised), ptx.rindex("ld.volatile.global.v4", 0, freed)
    assert written < ptx.index("bar.sync", written) < raised  # all have written the state before its flag is raised
    assert raised < read < ptx.index("bar.sync", read) < freed  # all have read the slot before it is given back
    assert "st.global.v4" in ptx[raised:]  # what the message does not need comes behind it
    assert binary.matrix and binary.spilled == 0
    assert "cp.async" in ptx  # the next summary is on its way while one is multiplied
