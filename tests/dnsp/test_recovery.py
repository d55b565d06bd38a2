"""Runs that are killed, moved to other ranks and stages, or repeated: the same numbers, no wrong checkpoint."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from dnsp import begin, checkpoint
from dnsp.cli import main
from dnsp.config import parse_config
from dnsp.errors import UsageError
from dnsp.folder import check_free, started_again

KILLS = int(os.environ.get("DNSP_KILLS", "6"))  # DNSP_KILLS=20 python -m pytest -s tests/dnsp/test_recovery.py -k kill
VERDICT = 30.0  # seconds from a kill to the end of every rank
HELD = 0.05  # of the time that a checkpoint takes to be written the loop stands still, at most
NEXT, LATER = 1e-5, 1e-4  # relative differences of the first loss after a move, and of the 20 after it
# in shards also what DeepSpeed would leave whole: parameters below 100,000 elements
SHARDED = "engine.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"

Dnsp = Callable[..., Any]
Losses = Callable[[Path], list[float]]


def ran(dnsp: Dnsp, workplace: Path, ranks: int, *settings: str) -> Any:
    how = ("--ranks", ranks) if ranks > 1 else ()
    done = dnsp("train", "tiny.yaml", *how, *settings, cwd=workplace, timeout=200)
    assert done.returncode == 0, done.stderr
    return done


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(checkpoint.read(path).weights())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_moves_to_other_ranks_and_stages(workplace: Path, dnsp: Dnsp, losses: Losses) -> None:
    # at three times this rate rounding differences grow to 1e-4 within these steps on some processors
    batch = ("train.global_batch=4", "train.steps=25", "checkpoint.keep=99", "train.lr=3e-3")
    ran(dnsp, workplace, 4, "run.dir=moves", "parallel.sequence=2", "engine.zero_stage=2", *batch)
    stayed = losses(workplace / "moves")
    for ranks, sequence, stage in ((4, 4, 3), (2, 1, 1), (1, 1, 0)):
        moved = workplace / f"moved-{stage}"
        ignored = shutil.ignore_patterns(".lock", "step-0000000[68]", "step-000000[12]*")
        shutil.copytree(workplace / "moves", moved, ignore=ignored)
        place = (f"parallel.sequence={sequence}", f"engine.zero_stage={stage}", *([SHARDED] if stage == 3 else []))
        ran(dnsp, workplace, ranks, f"run.dir={moved.name}", "resume=auto", *place, *batch)
        errors = [abs(a - b) / b for a, b in zip(losses(moved), stayed, strict=True)]
        assert not any(errors[:4])  # those were not done again
        assert errors[4] < NEXT, (stage, errors[4])
        assert max(errors[5:]) < LATER, (stage, max(errors[5:]))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("ranks", "sequence", "stage"), [(2, 2, 2), (4, 2, 3)])
def test_the_same_seed_gives_the_same_bits_and_so_does_a_resumed_run(
    ranks: int, sequence: int, stage: int, workplace: Path, dnsp: Dnsp, losses: Losses
) -> None:
    place = (f"parallel.sequence={sequence}", f"engine.zero_stage={stage}", "train.global_batch=2", SHARDED)
    place = (*place, "checkpoint.keep=1", "checkpoint.keep_every=4")
    folders = [workplace / f"{name}-{ranks}" for name in ("once", "again", "resumed")]
    ran(dnsp, workplace, ranks, f"run.dir={folders[0].name}", *place)
    ran(dnsp, workplace, ranks, f"run.dir={folders[1].name}", *place)
    for steps in (5, 12):
        ran(dnsp, workplace, ranks, f"run.dir={folders[2].name}", *place, "resume=auto", f"train.steps={steps}")
    for folder in folders:  # the last one, and every fourth step's, whatever was saved between
        assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(folder)] == [4, 8, 12]
    for folder in folders[1:]:
        assert losses(folder) == losses(folders[0])
        ours, theirs = (weights(f / "checkpoints" / "step-00000012") for f in (folder, folders[0]))
        assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kill_9_of_a_random_rank_at_random_moments(
    workplace: Path, start: Callable[..., subprocess.Popen[str]], dnsp: Dnsp, losses: Losses
) -> None:
    """Checkpoints are written after every step, so that some kills fall into the writing."""
    draw = random.Random(os.environ.get("DNSP_KILL_SEED", "5"))
    run, place = workplace / "killed", ("engine.zero_stage=2", "checkpoint.every=1", "train.global_batch=2")
    writing, slowest = 0, 0.0
    for kill in range(KILLS):
        before = len(losses(run)) if (run / "metrics.jsonl").exists() else 0
        settings = ("--ranks", 2, "run.dir=killed", "resume=auto", "train.steps=5000", *place)
        process = start("train", "tiny.yaml", *settings, cwd=workplace)
        ranks = ranks_of(process)
        wait_until(partial(done_by, process, run, before + draw.randint(1, 3)), process)
        if kill % 2:  # in the middle of a checkpoint
            wait_until(lambda: any((run / "checkpoints").glob(".*.part")), process)
        time.sleep(draw.random() * 0.03)
        writing += bool(list((run / "checkpoints").glob(".*.part")))
        victim = draw.choice(ranks)
        victim.kill()
        began = time.monotonic()
        _, stderr = process.communicate(timeout=VERDICT)
        slowest = max(slowest, time.monotonic() - began)
        assert slowest < VERDICT
        assert process.returncode == 1 and "SIGKILL" in stderr, stderr
        assert list((run / "stacks").glob("rank-*.txt"))  # the other rank's
        _, alive = psutil.wait_procs(ranks, timeout=5)
        assert not alive
        for path in checkpoint.checkpoints(run):
            checkpoint.read(path)  # whole, every one of them
    assert writing
    steps = checkpoint.step_of(checkpoint.checkpoints(run)[-1]) + 2
    ran(dnsp, workplace, 2, "run.dir=killed", "resume=auto", f"train.steps={steps}", *place)
    ran(dnsp, workplace, 2, "run.dir=unharmed", f"train.steps={steps}", *place)
    assert losses(run) == losses(workplace / "unharmed")
    print(f"{KILLS} kills, {writing} in the writing of a checkpoint; {steps} losses are the unharmed run's")
    print(f"to the last bit; the run had ended {slowest:.1f} s after a kill, at most")
    ours, theirs = (weights(f / "checkpoints" / f"step-{steps:08d}") for f in (run, workplace / "unharmed"))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found: list[psutil.Process] = []

    def both() -> bool:
        found[:] = psutil.Process(process.pid).children()
        return len(found) == 2

    wait_until(both, process)
    return found


def done_by(process: subprocess.Popen[str], run: Path, steps: int) -> bool:
    """Whether this attempt has got to a step: rank 0 has metrics.jsonl open, earlier attempts' lines being gone."""
    path = run / "metrics.jsonl"
    if not path.exists() or path.read_bytes().count(b"\n") < steps:
        return False  # and no core's time was taken from the ranks, as it is by looking at their files
    return any(file.path == str(path) for rank in psutil.Process(process.pid).children() for file in rank.open_files())


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str], timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.003)


def test_what_is_kept_and_what_is_refused(reference: Path, tmp_path: Path) -> None:
    """Every damage to every file of a checkpoint is found; nothing in it is pickled."""
    whole = reference / "checkpoints" / "step-00000012"
    names = sorted(path.name for path in whole.iterdir())
    assert {Path(name).suffix for name in names} == {".safetensors", ".json"}
    found = checkpoint.read(whole)
    assert found.world == 2 and found.step == 12
    assert {"cursor", "config", "versions", "tokens", "choices"} <= found.state.keys()
    assert found.state["config"]["train"]["steps"] == 12 and found.state["versions"]["torch"] == version("torch")
    for rank in (0, 1):
        checkpoint.set_random_state(found.random(rank), torch.device("cpu"))
        assert torch.get_rng_state().equal(found.random(rank)["cpu"])
    assert found.random(2) == {}  # a rank that was not there
    for name in names:
        for damage in (flip, cut, remove):
            broken = tmp_path / "step-00000012"
            shutil.copytree(whole, broken)
            damage(broken / name)
            with pytest.raises(UsageError, match="is damaged"):
                checkpoint.read(broken)
            shutil.rmtree(broken)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def remove(path: Path) -> None:
    path.unlink()


def test_the_last_and_every_so_many_are_kept(tmp_path: Path) -> None:
    for step in range(5, 60, 5):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    checkpoint.prune(tmp_path, keep=2, keep_every=20)
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)] == [20, 40, 50, 55]
    checkpoint.prune(tmp_path, keep=1)
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)] == [55]


def test_a_removal_that_was_cut_short_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda path, **how: (path / "manifest.json").unlink())
        checkpoint.prune(tmp_path, keep=1)
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)] == [2]
    checkpoint.clean(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_ranges_of_a_tensor_come_from_whoever_has_them(reference: Path) -> None:
    found = checkpoint.read(reference / "checkpoints" / "step-00000012")
    name = "model.embed_tokens.weight"
    everything = found.read("exp_avg", name)
    assert len({rank for rank, _, _ in found.index["tensors"][name]["parts"]}) >= 1
    split = max((n for n in found.shapes if len(found.index["tensors"][n]["parts"]) > 1), default=name)
    flat = found.read("weights", split)
    for start, stop in ((0, 1), (3, 50), (len(flat) - 1, len(flat)), (len(flat) // 3, len(flat)), (5, 5)):
        assert found.read("weights", split, start, stop).equal(flat[start:stop])
    assert everything.shape == (257 * 32,) and float(everything.abs().max()) > 0


@pytest.mark.slow
def test_every_save_says_for_how_long_the_loop_was_held(workplace: Path, dnsp: Dnsp) -> None:
    """38 million parameters and their moments, 0.45 GB; the figures are the machine's, and are printed too."""
    wide = ("model.hidden_size=1536", "model.intermediate_size=4096", "data.sequence_length=256", "checkpoint.every=1")
    done = ran(dnsp, workplace, 2, "run.dir=wide", *wide, "train.steps=4", "checkpoint.keep=1", "run.timeout=100")
    tries = [json.loads(line) for line in (workplace / "wide" / "checkpoints.jsonl").read_text().splitlines()]
    shutil.rmtree(workplace / "wide")
    assert [one["step"] for one in tries] == [1, 2, 3, 4] and not any(one["error"] for one in tries)
    said = [line for line in done.stdout.splitlines() if "training stood still for" in line]
    assert [line.split()[1] for line in said] == ["1:", "2:", "3:", "4:"], done.stdout
    shares = []
    for one in tries:
        copied = one["held_s"] - one["waited_s"]
        shares.append(copied / one["write_s"])
        print(f"step {one['step']}: copied in {copied:.3f} s, {100 * shares[-1]:.1f} % of the writing")
    assert min(shares) <= HELD  # others on the machine can make one copy slower


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_run_folder_in_use_is_refused(
    workplace: Path, start: Callable[..., subprocess.Popen[str]], dnsp: Dnsp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    process = start("train", "tiny.yaml", "run.dir=busy", "train.steps=5000", cwd=workplace)
    wait_until(lambda: (workplace / "busy" / "metrics.jsonl").exists(), process)
    settings = ("train", "tiny.yaml", "run.dir=busy", "resume=auto")
    done = dnsp(*settings, "--ranks", 2, cwd=workplace)
    with monkeypatch.context() as patch:  # a rank by itself, whose others nobody starts
        for name, value in {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
            patch.setenv(name, value)
        alone = dnsp(*settings, cwd=workplace, timeout=20)
    asked = main(["doctor", "tiny.yaml", "run.dir=busy", "resume=auto", "--json", "busy.json"])
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    for refused in (done, alone):
        assert refused.returncode == 2 and "in use by a running run" in refused.stderr, refused.stderr
    rows = {row["name"]: row for row in json.loads((workplace / "busy.json").read_text())["findings"]}
    assert asked == 1 and rows["run folder"]["found"] == "busy is in use by a running run"


def test_where_a_run_goes_on_that_its_launcher_starts_again(tmp_path: Path) -> None:
    begun, saved = tmp_path / "begun", tmp_path / "saved"
    (saved / "checkpoints" / "step-00000003").mkdir(parents=True)
    for folder, resume, restarts, goes_on in (
        (begun, "none", 0, "none"),
        (begun, "none", 1, "auto"),
        (begun, "run:elsewhere", 1, "run:elsewhere"),  # its first start saved nothing
        (saved, "run:elsewhere", 0, "run:elsewhere"),
        (saved, "run:elsewhere", 2, "auto"),
        (None, "none", 1, "none"),  # every start makes a folder of its own
    ):
        config = parse_config({"run": {"dir": folder and str(folder)}, "resume": resume}, "the test")
        assert started_again(config, restarts).resume == goes_on


@pytest.mark.parametrize(("failure", "refused"), [(errno.EWOULDBLOCK, True), (errno.ENOLCK, False)])
def test_a_lock_is_asked_for_as_nfs_wants_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: int, refused: bool
) -> None:
    """There an exclusive lock needs a file that is open for writing; where there are no locks nobody holds one."""
    asked: list[tuple[int, int]] = []

    def flock(file: Any, how: int) -> None:
        asked.append((fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE, how))
        raise OSError(failure, "")

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / ".lock").touch()
    with pytest.raises(UsageError, match="in use by a running run") if refused else nullcontext():
        check_free(parse_config({"run": {"dir": str(tmp_path)}}, "the test"))
    assert asked == [(os.O_RDONLY, fcntl.LOCK_SH | fcntl.LOCK_NB)]


def test_who_only_looks_at_a_lock_refuses_nobody(tmp_path: Path) -> None:
    """Neither another that looks nor, beyond the moment it takes, a run that starts."""
    config = parse_config({"run": {"dir": str(tmp_path)}}, "the test")
    with (tmp_path / ".lock").open("wb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        check_free(config)
        threading.Timer(begin.GLANCE / 4, fcntl.flock, (looking, fcntl.LOCK_UN)).start()
        begin._make_folder(config, {}, "run")
    with pytest.raises(UsageError, match="in use by a running run"):
        check_free(config)
    begin._LOCKS.pop().release()
