"""Where a step's time goes, who is slow, and what a step's figures say of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from dnsp import figures
from dnsp.figures import GPU, Figures, shares
from dnsp.flops import step_flops
from dnsp.launch.mps import shared_gpu
from dnsp.parallel.grid import Grid
from dnsp.parallel.transport import Transport
from dnsp.parallel.waits import WAITS, gather_rows
from dnsp.slow import AGAIN, WINDOW, Sample, SlowRanks
from dnsp.timing import PHASES, StepClock
from tests.ranks import python_path, run_ranks

ROOT = Path(__file__).resolve().parents[2]
ADDS_UP = 0.9  # of a step's time are in its phases
LATE, NOTICED = 0.5, 0.35  # seconds that a rank comes late, and that the other has to have waited at least


class Sleeper(nn.Module):
    def forward(self, seconds: float) -> torch.Tensor:
        time.sleep(seconds)
        with WAITS.counted():
            time.sleep(seconds)
        return torch.ones(())


def test_phases() -> None:
    model = Sleeper()
    clock = StepClock(model, torch.device("cpu"))
    model(0.0)  # outside of a step nothing counts
    for _ in range(2):  # a step leaves nothing to the next
        clock.begin()
        for _ in range(2):
            clock.mark("data")
            time.sleep(0.02)
            model(0.03)
            time.sleep(0.05)
        clock.mark("optimizer")
        with WAITS.counted(), WAITS.counted():  # counted once
            time.sleep(0.01)
        time.sleep(0.04)
        seconds = clock.end()
        wanted = {"data": 0.04, "forward": 0.06, "backward": 0.10, "communication": 0.07, "optimizer": 0.04}
        assert list(seconds) == list(PHASES)
        for phase, least in wanted.items():
            assert least <= seconds[phase] < least + 0.2, phase
    with WAITS.counted():
        time.sleep(0.01)
    assert WAITS.take()[0] == 0.0


def late() -> tuple[float, list[list[float]]]:
    """Rank 1 comes late to an exchange; what each rank waited, and every rank's row."""
    import torch.distributed as dist

    rank = dist.get_rank()
    transport = Transport(dist.group.WORLD, (0, 1), rank)
    mine, theirs = torch.full((4,), float(rank)), torch.empty(4)
    WAITS.on = True
    dist.barrier()  # they start at different times
    if rank == 1:
        time.sleep(LATE)
    transport.exchange([(1 - rank, mine)], [(1 - rank, theirs)], "a test").wait()
    waited, _ = WAITS.take()
    assert theirs[0] == 1 - rank
    return waited, gather_rows([float(rank), float("nan"), waited], dist.group.WORLD)


def test_waiting_for_a_rank_that_is_late_counts() -> None:
    (punctual, rows), (late_one, others) = run_ranks(late, 2)
    assert NOTICED < punctual < LATE + 5
    assert late_one < punctual / 2
    assert [row[0] for row in rows] == [0.0, 1.0] and all(row[1] != row[1] for row in rows)
    assert [row[2] for row in rows] == [punctual, late_one] == [row[2] for row in others]


def late_through_shared_memory() -> float:
    """Rank 0 comes late with the state that rank 1 waits for, on the device; seconds that each rank's stream stood."""
    from dnsp.parallel.delta_rule import delta_rule
    from dnsp.parallel.grid import make_grid
    from dnsp.parallel.layout import Layout
    from dnsp.parallel.plan import make_plan
    from dnsp.watchdog import queues

    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", str(queues(2)))
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank % torch.cuda.device_count())
    grid = make_grid(2)
    plan = make_plan([[0]], Layout("contiguous", 2, 2048), grid, 128, transport="peer").to("cuda").agreed()
    q, k, v = (torch.randn(1, 1024, heads, 128, device="cuda", dtype=torch.bfloat16) for heads in (2, 2, 4))
    g, beta = (torch.full((1, 1024, 4), value, device="cuda") for value in (-0.1, 0.5))
    WAITS.cuda = WAITS.on = True
    for late in (0.0, LATE):  # the first time kernels are proven and loaded
        WAITS.take()
        torch.cuda.synchronize()
        grid.transport().barrier()
        if rank == 0:
            time.sleep(late)
        with torch.no_grad():
            delta_rule(q, k, v, g, beta, plan=plan, l2norm=True)
        torch.cuda.synchronize()
    seconds, spans = WAITS.take()
    return seconds + sum(begin.elapsed_time(end) / 1e3 for begin, end in spans)


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_waiting_on_the_device_for_a_state_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    with shared_gpu() as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        late_one, punctual = run_ranks(late_through_shared_memory, 2, timeout=280)
    assert NOTICED < punctual < LATE + 5
    assert late_one < punctual / 2


def test_every_step_says_where_its_time_went(reference: Path, metrics: Callable[[Path], list[dict[str, Any]]]) -> None:
    from dnsp.config import load_config
    from dnsp.model.decoder import Decoder

    config = load_config(reference.parent / "tiny.yaml")
    parameters = sum(p.numel() for p in Decoder(config.model).parameters())
    one_document = step_flops(config.model, parameters, [512])
    for record in metrics(reference):
        phases = [record[f"{phase}_s"] for phase in PHASES]
        assert all(seconds >= 0 for seconds in phases) and min(phases[1:3]) > 0
        assert ADDS_UP * record["step_s"] < sum(phases) <= record["step_s"]
        assert record["communication_s"] > 0
        assert record["tokens_per_s_per_gpu"] == pytest.approx(record["tokens_per_s"] / 2)
        # between that of documents of one token and that of one document
        flops = record["tflops"] * 1e12 * record["step_s"]
        assert step_flops(config.model, parameters, [1] * 512) < flops < 1.000001 * one_document
        assert record["tflops_per_gpu"] == pytest.approx(record["tflops"] / 2)
    assert min(record["tflops"] * record["step_s"] for record in metrics(reference)) < 0.999e-12 * one_document
    ranks = [json.loads(line) for line in (reference / "ranks.jsonl").read_text().splitlines()]
    assert ranks[0]["step"] == 1 and ranks[-1]["step"] == 12
    assert all(len(line[name]) == 2 for line in ranks for name in ("work_s", "communication_s"))
    assert "% of it: " in (reference.parent / "said.txt").read_text()


def test_a_slow_rank_is_named_once() -> None:
    watch = SlowRanks([f"node, GPU {n}" for n in range(4)], [0] * 4)
    steady = [Sample(1.0, 1980.0)] * 4
    slow = [*steady[:2], Sample(1.4, 1410.0, 0x40), steady[3]]
    for step in range(WINDOW):
        assert watch.update(step, steady) == []
    said = [line for step in range(WINDOW, 3 * WINDOW) for line in watch.update(step, slow)]
    again = [line for step in range(3 * WINDOW, 3 * WINDOW + AGAIN) for line in watch.update(step, slow)]
    assert said == again == [
        "rank 2 (node, GPU 2) is slow: its own work takes 1.4 s a step, the median is 1 s; "
        "its clock is 1410 MHz, the median is 1980 MHz (hardware thermal slowdown)"
    ]


def test_a_slow_step_is_no_slow_rank() -> None:
    watch = SlowRanks(["a", "b"], [0, 0])
    steps = [[Sample(1.0), Sample(9.0 if step % 3 == 0 else 1.0)] for step in range(4 * WINDOW)]
    assert [line for step, samples in enumerate(steps) for line in watch.update(step, samples)] == []


def test_ranks_with_more_work_are_compared_with_each_other() -> None:
    """A contiguous layout: the second rank of a sequence group has three times the first one's attention."""
    work = [1.0, 3.0, 1.0, 3.0, 1.0, 3.0]
    for peers, slow in (([0, 1] * 3, []), ([0] * 6, [1, 3, 5])):
        watch = SlowRanks([str(n) for n in range(6)], peers)
        said = [line for step in range(WINDOW) for line in watch.update(step, [Sample(s) for s in work])]
        assert [int(line.split()[1]) for line in said] == slow
    watch = SlowRanks([str(n) for n in range(6)], [0, 1] * 3)
    work[3] = 4.5
    said = [line for step in range(WINDOW) for line in watch.update(step, [Sample(s) for s in work])]
    assert [line.split()[1] for line in said] == ["3"]


def test_faults_of_a_gpu_are_said(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no machine of the tests can be made to have: Xid and memory errors of one of two GPUs."""
    from dnsp.config import load_config

    config = load_config(workplace / "tiny.yaml")
    said: list[str] = []
    telemetry: Any = SimpleNamespace(say=said.append, ranks=lambda record: None)
    places = [(0, "a", 0), (1, "b", 0)]
    of = Figures(config, Grid(2, 0, 2), Sleeper(), torch.device("cpu"), places, telemetry)
    work: Any = SimpleNamespace(sequences=[SimpleNamespace(doc_starts=[0], length=512)])
    assert said[0] == "placement: 2 ranks on 2 nodes, 1 sequence group of 2, 0 inside a node"
    values = dict.fromkeys(GPU, 0.0) | {"power_w": 400.0, "sm_clock_mhz": 1980.0, "ecc_uncorrected": 2.0}
    rows: list[list[float]] = []
    monkeypatch.setattr(figures, "gather_rows", lambda row, group: rows)

    def step(number: int, **second: float) -> tuple[dict[str, float], list[str]]:
        head = [1.0, 0.0, 0.3, 0.6, 0.05, 0.05]
        rows[:] = [[*head, *values.values()], [*head, *(values | second).values()]]
        said.clear()
        return of.step(number, 1.0, work, dict.fromkeys(PHASES, 0.2)), list(said)

    record, lines = step(1)
    assert lines == []  # errors from before the run are not its own
    assert record["power_w"] == 800 and record["sm_clock_mhz"] == 1980 and record["throttled_gpus"] == 0
    record, lines = step(2, ecc_uncorrected=3.0, xid=79.0, throttle=0x8, sm_clock_mhz=345.0)
    assert lines == [
        "rank 1 (b, local rank 0): the driver reports Xid 79; NVIDIA's list of Xid errors says what to do",
        "rank 1 (b, local rank 0): 1 uncorrected memory errors (ECC); replace this GPU",
    ]
    assert record["throttled_gpus"] == 1 and record["sm_clock_mhz"] == 345
    assert step(3, ecc_uncorrected=3.0, xid=79.0)[1] == []  # said once


def test_the_live_line() -> None:
    record = {"step_s": 2.0, "data_s": 0.001, "forward_s": 0.5, "backward_s": 1.2, "communication_s": 0.2, "mfu": 0.334}
    assert shares(record) == "MFU 0.334 % of it: forward 25, backward 60, waiting 10"
    assert shares({"step_s": 1.0}) == ""


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_rank_that_is_stopped_again_and_again_is_named(workplace: Path) -> None:
    """One of two ranks gets a fifth of the time."""
    log = workplace / "slow.log"
    environ = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    settings = ("train", "tiny.yaml", "--ranks", "2", "run.dir=slow", "train.steps=100000", "checkpoint.every=0")
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "dnsp", *settings], cwd=workplace, env=environ, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 150
        while "step 1/" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        victim = next(rank for rank in psutil.Process(process.pid).children() if rank.environ().get("RANK") == "1")
        while "is slow" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            victim.send_signal(signal.SIGSTOP)
            time.sleep(0.08)
            victim.send_signal(signal.SIGCONT)
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    (line,) = [line for line in log.read_text().splitlines() if "is slow" in line]
    assert line.startswith("rank 1 (") and "its own work takes" in line
