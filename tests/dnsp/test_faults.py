"""What goes wrong before the first step and later: one message, the right status, in time, nothing lost or left.

Long because each fault is made by hand, in processes that are real.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
import torch

from dnsp import ending, watchdog
from dnsp.checkpoint import way_on
from dnsp.cli import main
from dnsp.config import RunConfig, load_config
from dnsp.errors import UsageError
from dnsp.folder import check_identity, check_start, compare_models
from dnsp.launch.environment import Environment
from dnsp.parallel.errors import PeerLost
from dnsp.parallel.grid import GRACE
from dnsp.stalls import AHEAD, LINGER, Lead, Place, Stalls, flight_record, waiting_for
from dnsp.tasks.summary import diverged_at
from tests.dnsp.conftest import environment

BEFORE, LATER = 20.0, 30.0  # seconds until a refusal, until a fault has ended every rank

Dnsp = Callable[..., Any]
Losses = Callable[[Path], list[float]]


def wait_for_steps(run: Path, steps: int, process: subprocess.Popen[str], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    path = run / "metrics.jsonl"
    while time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= steps:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    raise AssertionError(f"{run} did not get to step {steps}")


def wait_for_ranks(process: subprocess.Popen[str], timeout: float = 60) -> None:
    """Until rank 0 holds metrics.jsonl open: an earlier attempt's lines that will be written again are gone then."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        for rank in psutil.Process(process.pid).children():
            if any(file.path.endswith("/metrics.jsonl") for file in rank.open_files()):
                return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("the ranks did not start")


def is_one_message(text: str) -> bool:
    return text.startswith("error: ") and len(text.strip().splitlines()) <= 2 and "Traceback" not in text


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def truncated(corpus: Path, folder: Path) -> Path:
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{corpus}{suffix}", folder / f"cut{suffix}")
    os.truncate(folder / "cut.bin", 1000)
    return folder / "cut"


def foreign(corpus: Path, folder: Path) -> Path:
    (folder / "foreign.bin").write_bytes(b"x" * 5000)
    (folder / "foreign.idx").write_bytes(b"y" * 5000)
    return folder / "foreign"


def empty(corpus: Path, folder: Path) -> Path:
    (folder / "empty.bin").touch()
    (folder / "empty.idx").touch()
    return folder / "empty"


# overrides, what the refusal must say
REFUSALS: list[tuple[list[str], str]] = [
    (["train.stpes=3"], "train.steps"),
    (["train.global_batch=3", "train.micro_batch=2"], "train.global_batch=3"),
    (["data.sequence_length=100000000"], "more than the"),
    (["model.vocab_size=100"], "100"),
    (["data.sources=[{path: nowhere/at-all}]"], "nowhere/at-all"),
    (["parallel.segment_tokens=100"], "segment_tokens=100"),
    (["init_from=run:nowhere"], "there is no run folder nowhere"),
    (["init_from=x"], "run:PATH"),
    (["init_from=hf:./nowhere"], "there is no such folder"),
    (["engine.offload_optimizer=true"], "engine.zero_stage=0 has none"),
    (["engine.zero_stage=2", "engine.offload_parameters=true"], "engine.zero_stage=2 has none"),
    (["engine.deepspeed={gradient_clipping: 3}"], "gradient_clipping=3 contradicts train.clip=1.0"),
    (["engine.deepspeed={zero_optimization: {stage: 3}}"], "stage=3 contradicts engine.zero_stage=0"),
    (["engine.deepspeed={bf16: {enabled: true}}"], "contradicts engine.dtype='fp32'"),
    (["engine.deepspeed={zero_optimization: 3}"], "must be keys and values"),
    (["faults.spike_factor=0.5"], "faults.spike_factor=0.5"),
    (["resume=auto"], "run.dir"),
    (["resume=nowhere"], "there is no run folder nowhere"),
    (["data.tokenizer=./nowhere"], "./nowhere"),
]


@pytest.mark.parametrize(("overrides", "said"), REFUSALS, ids=[" ".join(o)[:40] for o, _ in REFUSALS])
def test_refused_before_the_first_step(
    workplace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    assert main(["train", str(workplace / "tiny.yaml"), *overrides]) == 2
    assert time.monotonic() - began < BEFORE
    text = capsys.readouterr().err
    assert said in text and is_one_message(text), text
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.parametrize("damage", [truncated, foreign, empty])
def test_data_that_is_not_data(
    workplace: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path, Path], Path],
) -> None:
    monkeypatch.chdir(tmp_path)
    path = damage(corpus, tmp_path)
    assert main(["train", str(workplace / "tiny.yaml"), f"data.sources=[{{path: {path}}}]"]) == 2
    text = capsys.readouterr().err
    assert path.name in text and is_one_message(text), text
    assert not (tmp_path / "runs").exists()


# overrides that name another run, what the refusal must say, and whether the ranks have to meet for it
ANOTHERS: list[tuple[list[str], str, bool]] = [
    (["run.dir=reference"], "resume=auto continues it", False),
    (["run.dir=reference", "resume=auto", "model.head_dim=8"], "model.head_dim=16, the configuration has 8", False),
    (["run.dir=reference", "resume=auto", "data.seed=5"], "data.seed=0, the configuration has 5", True),
    (["init_from=run:reference", "model.hidden_size=64"], "or choose another init_from", False),
    (["resume=reference/checkpoints/step-00000010", "model.head_dim=8"], "model.head_dim=16, the configuration", False),
    (["resume=run:reference/checkpoints", "model.hidden_size=64"], "or choose another resume", False),
]


@pytest.mark.parametrize(("overrides", "said", "met"), ANOTHERS, ids=[" ".join(o)[:40] for o, *_ in ANOTHERS])
def test_another_run_is_refused_and_left_alone(
    reference: Path,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    said: str,
    met: bool,
) -> None:
    monkeypatch.chdir(workplace)
    join = Mock(wraps=watchdog.join)
    monkeypatch.setattr(watchdog, "join", join)
    before = contents(reference)
    assert main(["train", "tiny.yaml", "run.dir=new", *overrides]) == 2
    text = capsys.readouterr().err
    assert said in text and is_one_message(text), text
    assert join.called == met
    assert contents(reference) == before and not Path("new").exists()


def test_what_is_not_to_be_seen_refuses_nobody(reference: Path, workplace: Path, tmp_path: Path) -> None:
    """Another node's folder, a disk that fails, a file that is cut short, weights that are not taken: for rank 0."""
    other = ("model.hidden_size=64", f"run.dir={tmp_path}")
    for given in (("resume=nowhere",), (f"resume={'x' * 300}",), ("init_from=run:nowhere",), ("resume=auto",)):
        check_start(load_config(workplace / "tiny.yaml", [*other, *given]))
    (tmp_path / "run.json").write_text('{"model": {"hidd')
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    for given in (("resume=auto",), ("resume=auto", f"init_from=run:{reference}"), (f"resume={tmp_path}",)):
        check_start(load_config(workplace / "tiny.yaml", [*other, *given]))


def test_a_run_from_before_a_key_goes_on(reference: Path, workplace: Path, tmp_path: Path) -> None:
    """What was recorded without it is what its default does; any other value is another model."""
    identity = json.loads((reference / "run.json").read_text())
    del identity["model"]["deltanet"]["train_beta"], identity["model"]["rms_norm_eps"]
    (tmp_path / "run.json").write_text(json.dumps(identity))
    config = load_config(workplace / "tiny.yaml", [f"run.dir={tmp_path}", "resume=auto"])
    check_start(config)
    compare_models(identity["model"], config, tmp_path)
    other = load_config(workplace / "tiny.yaml", [f"run.dir={tmp_path}", "resume=auto", "model.rms_norm_eps=1e-3"])
    with pytest.raises(UsageError, match=r"with model.rms_norm_eps=1e-06, the configuration has 0.001"):
        check_start(other)


def test_ranks_that_do_not_fit(workplace: Path, tmp_path: Path, dnsp: Dnsp) -> None:
    """Known before a rank is started."""
    began = time.monotonic()
    done = dnsp("train", workplace / "tiny.yaml", "--ranks", 2, "data.sequence_length=500", cwd=tmp_path)
    assert done.returncode == 2
    assert time.monotonic() - began < BEFORE / 2
    assert "500" in done.stderr and "use 256 or 512" in done.stderr and is_one_message(done.stderr), done.stderr
    assert not list(tmp_path.iterdir())


def test_a_port_in_use(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["train", str(workplace / "tiny.yaml"), "--ranks", "2", "--port", str(port)]) == 2
    text = capsys.readouterr().err
    assert f"port {port}" in text and is_one_message(text), text


def test_a_loss_that_is_not_finite(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    assert main(["train", "tiny.yaml", "run.dir=wild", "train.lr=1e30"]) == 1
    text = capsys.readouterr().err
    assert is_one_message(text), text
    assert "not finite at step" in text and "on rank 0" in text and "4 times in a row" in text, text
    ended = diverged_at({"message": text})  # what a report of experiments makes of it
    assert ended is not None and ended[1] - ended[0] == 3 and f"at step {ended[1]} " in text, text
    assert not list((workplace / "wild").rglob("*.part"))


def test_stopped_damaged_killed_and_still_the_same(
    reference: Path, workplace: Path, start: Callable[..., subprocess.Popen[str]], dnsp: Dnsp, losses: Losses
) -> None:
    """One run asked to stop, its newest checkpoint damaged, one of its ranks killed: its losses are the reference's."""
    run = workplace / "mauled"
    # no checkpoint is due at step 4 or 5: the newest is the signal's
    settings = ("train", "tiny.yaml", "--ranks", 2, "run.dir=mauled", "resume=auto", "checkpoint.every=3")
    process = start(*settings, "train.steps=5000", cwd=workplace)
    wait_for_steps(run, 4, process)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=LATER)
    assert process.returncode == 0, stderr
    assert "as asked; resume=auto continues" in stdout
    saved = sorted((run / "checkpoints").iterdir())
    assert int(saved[-1].name.removeprefix("step-")) == len(losses(run))

    with (saved[-1] / "weights-00000-of-00002.safetensors").open("r+b") as file:
        file.seek(5000)
        file.write(b"\x55\x55\x55\x55")
    process = start(*settings, "train.steps=5000", cwd=workplace)
    wait_for_ranks(process)
    wait_for_steps(run, int(saved[-2].name.removeprefix("step-")) + 1, process)
    ranks = psutil.Process(process.pid).children()
    victim = next(rank for rank in ranks if rank.environ()["RANK"] == "1")
    victim.send_signal(signal.SIGKILL)
    began = time.monotonic()
    stdout, stderr = process.communicate(timeout=LATER)
    assert time.monotonic() - began < LATER
    assert process.returncode == 1
    assert "rank 1 was ended by SIGKILL" in stderr and is_one_message(stderr), stderr
    assert not any(rank.is_running() for rank in ranks)
    assert f"{saved[-1].relative_to(workplace)} is damaged: weights-00000-of-00002.safetensors" in stdout
    assert f"going on from {saved[-2].name}" in stdout

    done = dnsp(*settings, cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert losses(run)[:12] == losses(reference)


def test_ctrl_c_while_ranks_start_is_one_line(
    workplace: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """They are importing torch, and nothing has begun that could be saved."""
    process = start("train", workplace / "tiny.yaml", "--ranks", 2, cwd=tmp_path)
    deadline = time.monotonic() + BEFORE
    while len(ranks := psutil.Process(process.pid).children()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=BEFORE)
    assert (process.returncode, stdout) == (130, "")
    assert stderr == "error: stopped by SIGINT before the run could save\n"
    assert len(ranks) == 2 and not psutil.wait_procs(ranks, timeout=5)[1]


@pytest.mark.slow
def test_a_full_disk(reference: Path, workplace: Path, dnsp: Dnsp) -> None:
    """No checkpoint fits any more: the run goes on to its end, saying so, and nothing half-written stays."""

    def little_room() -> None:
        # a file may grow to less than the optimizer's state; the system says so as it does for a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    run = workplace / "full"
    done = dnsp("train", "tiny.yaml", "run.dir=full", "train.steps=4", cwd=workplace)
    assert done.returncode == 0, done.stderr
    before = sorted((run / "checkpoints").iterdir())
    done = dnsp(
        *("train", "tiny.yaml", "--ranks", 2, "run.dir=full", "resume=auto", "train.steps=8"),
        cwd=workplace,
        preexec_fn=little_room,
    )
    assert done.returncode == 1
    assert is_one_message(done.stderr), done.stderr
    assert "NOT SAVED: the checkpoint of step 6" in done.stdout and "the run goes on" in done.stdout
    assert "cannot write the checkpoint of step 8" in done.stderr and before[-1].name in done.stderr, done.stderr
    assert sorted((run / "checkpoints").iterdir()) == before
    assert not list(run.rglob("*.part"))


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_killed_at_any_moment_it_resumes_exactly(
    reference: Path, workplace: Path, start: Callable[..., subprocess.Popen[str]], dnsp: Dnsp, losses: Losses
) -> None:
    """The whole run is killed, supervisor and all, at moments that fall into checkpoint writing too."""
    run = workplace / "hunted"
    settings = ("train", "tiny.yaml", "--ranks", 2, "run.dir=hunted", "resume=auto", "checkpoint.every=1")
    for round_ in range(4):
        done_before = len(losses(run)) if (run / "metrics.jsonl").exists() else 0
        process = start(*settings, "train.steps=5000", cwd=workplace)
        wait_for_ranks(process)
        wait_for_steps(run, max(2, done_before), process)
        time.sleep(0.013 * round_)
        ranks = psutil.Process(process.pid).children()
        process.kill()
        process.communicate(timeout=LATER)
        _, alive = psutil.wait_procs(ranks, timeout=LATER)
        assert not alive  # ranks do not outlive the process that started them
        if len(losses(run)) >= 12:
            break
    done = dnsp(*settings, f"train.steps={max(12, len(losses(run)))}", cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert losses(run)[:12] == losses(reference)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_rank_that_hangs_is_given_up(workplace: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    """The second run starts while the first is on its way to its end."""
    hung = [hang_in(workplace, start, world, sequence) for world, sequence in ((2, 2), (3, 1))]
    for world, process, ranks in hung:
        run = workplace / f"hung-{world}"
        stacks = [run / "stacks" / f"rank-{rank:05d}.txt" for rank in range(0, world, 2)]
        deadline = time.monotonic() + LATER
        while not all(file.exists() for file in stacks) and time.monotonic() < deadline:
            time.sleep(0.05)
        _, stderr = process.communicate(timeout=LATER)
        assert process.returncode == 1
        # who, where, in which step and layer, waiting for what; whose stack is there, and whose cannot be
        lost = r"rank [02] lost ((rank 1|a rank of its group) during |a peer: )\S+"
        assert is_one_message(stderr) and re.search(lost, stderr), stderr
        place_of = r"rank [02] \(node \S+\) was at step \d+(, layer \d \(\w+\))?, in the \w+"
        silent = r"rank (0, )?1(, 2)? left no stack: stopped or gone"  # a busy machine may be slow to tell
        assert re.search(place_of, stderr) and re.search(silent, stderr), stderr
        for file in stacks:
            assert "dnsp/train.py" in file.read_text()
            assert json.loads(file.with_suffix(".json").read_text())["entries"]  # torch's flight recorder
        _, alive = psutil.wait_procs(ranks, timeout=5)
        assert not alive


def hang_in(
    workplace: Path, start: Callable[..., subprocess.Popen[str]], world: int, sequence: int
) -> tuple[int, subprocess.Popen[str], list[psutil.Process]]:
    """A run of so many ranks, rank 1 of which is stopped behind the third step; its process and its ranks."""
    run = workplace / f"hung-{world}"
    place = (f"parallel.sequence={sequence}", f"train.global_batch={world // sequence}", f"run.dir={run.name}")
    settings = ("--ranks", world, *place, "train.steps=5000", "run.timeout=5")
    process = start("train", "tiny.yaml", *settings, cwd=workplace)
    wait_for_steps(run, 3, process)
    ranks = psutil.Process(process.pid).children()
    victim = next(rank for rank in ranks if rank.environ()["RANK"] == "1")
    victim.suspend()
    return world, process, ranks


@pytest.mark.parametrize(("first", "quiet"), [(True, False), (False, True)])
def test_a_peer_that_the_watching_thread_misses_is_said_once(
    first: bool, quiet: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main thread waits inside a collective: of all ranks the first one speaks, under any launcher."""
    said: list[dict[str, Any]] = []

    def lost() -> None:
        raise PeerLost(0, 1, "a scan", "it is late")

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(watchdog, "check_peers", lost)
    monkeypatch.setattr(watchdog, "NOTICE", 0.0)
    monkeypatch.setattr(watchdog, "end", lambda status, message, **how: said.append({"message": message, **how}))
    monkeypatch.setattr(watchdog.os, "_exit", leave)
    watch = watchdog.Watch(Environment("torchrun", 0, 2, 0, 2, "127.0.0.1", 0))
    watch.folder = watch.stalls.folder = tmp_path
    if not first:
        (tmp_path / "failure.txt").touch()
    with pytest.raises(SystemExit):
        watch._look()
    assert "rank 0 lost rank 1 during a scan" in said[0]["message"]
    assert said[0]["consequence"] and said[0]["quiet"] is quiet


def test_whoever_knows_most_of_a_lost_rank_speaks_first() -> None:
    """A wait on the device in vain, then a rank without progress, then NCCL, all within 30 s by default."""
    settings = RunConfig()
    device = settings.timeout + watchdog.NOTICE
    stall = watchdog.patience(settings, late=True)
    assert device < stall and stall + LINGER < 30 < settings.timeout + GRACE.total_seconds()
    assert watchdog.patience(settings, late=False) == settings.stall
    assert watchdog.patience(RunConfig(stall=3), late=True) == 3


class Pending:
    """An event of a GPU that is done when somebody waits for it."""

    def __init__(self, queue: list[Pending]) -> None:
        self.queue = queue

    def record(self) -> None:
        self.queue.append(self)

    def synchronize(self) -> None:
        if self in self.queue:
            del self.queue[: self.queue.index(self) + 1]  # all that was launched before is done, too


def test_the_host_is_a_few_layers_ahead_at_most() -> None:
    queue: list[Pending] = []
    place, lead = Place(0), Lead(lambda: Pending(queue))
    layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3 * AHEAD))
    place.follow(layers, ["linear"] * len(layers), lead)
    x, depth = torch.ones(1, 2), []
    for layer in layers:
        x = layer(x)
        depth.append(len(queue))
    x.sum().backward()
    assert depth == [*range(1, AHEAD + 1), *[AHEAD] * (2 * AHEAD)] and len(queue) == AHEAD
    assert place.doing == "the backward" and place.layer == "0 (linear)"


def test_a_file_system_that_fails_keeps_no_verdict_back(tmp_path: Path) -> None:
    """Neither the one on a rank that stands still, nor where the others are that could leave their stacks."""
    said: list[str] = []
    stalls = Stalls(Place(0), said.append)
    stalls.folder, stalls.limit = tmp_path / ("x" * 300), 0.5  # no answer but an error
    stalls.start()
    stalls.join(timeout=10)
    assert len(said) == 1 and "no progress for" in said[0]
    assert "cannot be listed (File name too long)" in way_on(stalls.folder)
    stalls.folder = tmp_path
    (tmp_path / "stacks" / "rank-00001.txt").mkdir(parents=True)  # there, and not to be read
    (tmp_path / "stacks" / "rank-00002.txt").write_text("rank 2 was at step 3 for 4 s\n\nstack")
    assert stalls.where_the_others_are(3) == "rank 2 was at step 3 for 4 s; rank 1 left no stack: stopped or gone"


def entry(name: str, state: str = "scheduled", p2p: int = 0, collective: int = 0, sizes: int = 8) -> dict[str, Any]:
    """One of torch's flight recorder, of one group; ``p2p`` and ``collective``: launches of either kind so far."""
    counts = {"process_group": ["1", "sequence"], "p2p_seq_id": p2p, "collective_seq_id": collective}
    done = state == "completed"
    return {"profiling_name": name, "state": state, "retired": done, "input_sizes": [[sizes]], **counts}


# What NCCL's recorder and gloo's hold, and what the rank waits for.
RECORDED: list[tuple[str, list[dict[str, Any]], list[dict[str, Any]], str]] = [
    ("nothing is open", [entry("nccl:all_reduce", "completed", 0, 1)], [entry("gloo:send", "completed", 1)], ""),
    (
        "a GPU does one after another",
        [
            entry("nccl:all_reduce", "completed", 0, 1),
            entry("nccl:all_gather", "started", 0, 2, 16),
            entry("nccl:all_reduce", "scheduled", 0, 3),
        ],
        [entry("gloo:all_gather", "scheduled", 0, 1)],
        "nccl:all_gather of [[16]]",
    ),
    (
        "gloo's host waits in its last",
        [entry("nccl:all_reduce", "completed", 0, 1)],
        [entry("gloo:send", p2p=1), entry("gloo:recv", p2p=2, sizes=4)],
        "gloo:recv of [[4]]",
    ),
    (
        "messages posted together are done with their launch, and stand as scheduled for ever",
        [
            entry("nccl:send 0->1", p2p=1),
            entry("nccl:recv 0<-1", p2p=1),
            entry("nccl:coalesced", "completed", 1),
            entry("nccl:recv 0<-1", p2p=2, sizes=32),
            entry("nccl:coalesced", "started", 2),
        ],
        [],
        "nccl:recv 0<-1 of [[32]]",
    ),
]


@pytest.mark.parametrize(("nccl", "gloo", "said"), [case[1:] for case in RECORDED], ids=[case[0] for case in RECORDED])
def test_a_rank_that_stands_still_says_what_it_waits_for(
    nccl: list[dict[str, Any]], gloo: list[dict[str, Any]], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL has a recorder of its own, which a torch for the CPU has not."""
    recorders = torch._C._distributed_c10d
    for name, entries in (("_dump_nccl_trace_json", nccl), ("_dump_fr_trace_json", gloo)):
        recorded = json.dumps({"version": "2.10", "entries": entries}).encode()
        monkeypatch.setattr(recorders, name, lambda recorded=recorded: recorded, raising=False)
    assert waiting_for() == said
    assert flight_record()["entries"] == [*nccl, *gloo]
    monkeypatch.delattr(recorders, "_dump_nccl_trace_json")
    monkeypatch.setattr(recorders, "_dump_fr_trace_json", lambda: b"")
    assert waiting_for() == "" and not flight_record().get("entries")


class Ended(BaseException):
    """By the launcher."""


@pytest.mark.parametrize("local", ["0", "1"])
def test_srun_hears_a_refusal_once_a_node(
    local: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its tasks have no LOCAL_RANK yet; those that keep quiet leave time to the one that speaks, and are ended then."""
    monkeypatch.setenv("SLURM_LOCALID", local)
    monkeypatch.setattr(ending, "_let_others_speak", Mock(side_effect=Ended))
    for slip in ("train.stpes=3", "--rank"):
        with pytest.raises(Ended) if local == "1" else nullcontext():
            assert main(["train", str(workplace / "tiny.yaml"), slip]) == 2
        assert bool(capsys.readouterr().err) is (local == "0")


QUIET = """
import signal, threading
from dnsp.ending import end

signal.signal(signal.SIGTERM, lambda number, frame: None)
threading.Thread(target=end, args=(1, "what another says"), kwargs={"quiet": True}).start()
threading.Event().wait()
"""


def test_a_launcher_ends_the_wait_of_a_quiet_rank_in_any_thread() -> None:
    """The main thread waits inside a collective, where it runs no handler of signals."""
    process = subprocess.Popen([sys.executable, "-c", QUIET], env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 0.9 * ending.PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert process.poll() == -signal.SIGTERM
    assert process.communicate() == (None, "")


SETTLING = """
import os, signal, sys
from pathlib import Path
from dnsp.errors import RunError
from dnsp.launch.environment import Environment
from dnsp.watchdog import Watch

try:
    with Watch(Environment("torchrun", 0, 2, 0, 2, "127.0.0.1", 0)) as watch:
        watch.folder = watch.stalls.folder = Path(sys.argv[1])
        watch.settle = lambda: os.kill(os.getpid(), signal.SIGTERM)
        raise RunError("the reason")
except RunError as error:
    print(error, signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
"""


def test_a_launcher_that_ends_all_leaves_the_words_of_the_first_whole(tmp_path: Path) -> None:
    """What it is saying when SIGTERM comes: a checkpoint is being finished, the others are asked where they are."""
    done = subprocess.run(
        [sys.executable, "-c", SETTLING, str(tmp_path)], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "the reason True\n"), done.stderr


def test_a_damaged_record_of_a_model_is_refused_with_words(workplace: Path, tmp_path: Path) -> None:
    config = load_config(workplace / "tiny.yaml", [f"run.dir={tmp_path}", "resume=auto"])
    with pytest.raises(UsageError, match="whose model this version does not know; choose another init_from"):
        compare_models({"vocab_size": "many"}, config, tmp_path)
    (tmp_path / "run.json").write_text('{"model": 5}')
    with pytest.raises(UsageError, match="is of a run with model=5, the configuration has"):
        check_identity(tmp_path, {"model": config.model.model_dump(mode="json")})
    (tmp_path / "run.json").write_text("[5]")
    with pytest.raises(UsageError, match=r"run.json cannot be read .*; choose another run.dir"):
        check_identity(tmp_path, {"model": {}})


def test_a_rank_that_nobody_ends_says_its_reason_after_all(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where no launcher ends it for another's reason, there was none: but an echo of another's is none itself."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(ending, "_let_others_speak", lambda: print("waited", file=sys.stderr))
    assert ending.end(2, "mine", quiet=True) == 2 and ending.end(1, "another's", quiet=True, consequence=True) == 1
    assert capfd.readouterr().err == "waited\nerror: mine\nwaited\n"
