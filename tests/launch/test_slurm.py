"""Slurm for real: a controller, two nodes, sbatch and srun; a job that makes way twice ends with the right losses."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launch.daemons import NODES, Slurm
from tests.launch.documents import documented

ROOT = Path(__file__).resolve().parents[2]
WHERE = """
import json, os, sys
from dnsp.launch.environment import find_environment
place = find_environment()
said = json.dumps([os.environ["SLURM_PROCID"], place.node_name, place.rank, place.local_rank, place.local_world_size,
                   place.nodes, place.master_address, place.placed(2).rank])
sys.stdout.write(said + "\\n")
"""

SMALL = "--parsable --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=1"  # over what the script asks of a node


def sbatch(options: str) -> str:
    """The README's command on two nodes."""
    command = documented("README.md", "sbatch", {"--nodes 8": "--nodes 2"})
    assert command == documented("docs/clusters.md", "sbatch", {"--nodes 8": "--nodes 2"}).partition(" [")[0]
    return command.replace("sbatch", f"sbatch {options}", 1).replace("launch/", f"{ROOT}/launch/")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_srun_tells_each_task_its_place(slurm: Slurm) -> None:
    """Ranks of a node are neighbours, however tasks are dealt out; the master is found where no resolver knows it."""
    for options, local_ranks in (
        (("--ntasks-per-node=2", "--distribution=block"), [0, 1, 0, 1]),
        (("--ntasks-per-node=2", "--distribution=cyclic"), [0, 1, 0, 1]),
        (("--distribution=arbitrary", f"--nodelist={NODES[0]},{NODES[0]},{NODES[1]}"), [0, 1, 0]),
    ):
        tasks = len(local_ranks)
        command = ("srun", "--nodes=2", f"--ntasks={tasks}", *options, sys.executable, "-c", WHERE)
        said = slurm.call(*command, timeout=60, check=True)
        places = sorted((json.loads(line) for line in said.splitlines()), key=lambda place: place[2])
        assert [place[2] for place in places] == list(range(tasks))
        assert [place[1] for place in places] == sorted(place[1] for place in places)
        assert [place[3] for place in places] == local_ranks
        assert {(place[5], place[6]) for place in places} == {(2, "127.0.0.1")}
        if "--distribution=cyclic" in options:
            assert [place[0] for place in places] == ["0", "2", "1", "3"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_makes_way_and_resumes_by_itself(
    slurm: Slurm,
    folder: Path,
    losses: Callable[[Path], list[float]],
    whole_losses: Callable[[int], list[float]],
    wait_for: Callable[..., None],
) -> None:
    """Preempted once, out of time once, finished in the third start: the losses are those of an uninterrupted run."""
    out = folder / "job.log"
    options = f"{SMALL} --signal=B:USR1@120 --time=10 --output={out} --chdir={folder}"
    job = slurm.call("sh", "-c", f"{sbatch(options)} train.steps=100000 eval.sequences=1", check=True).strip()
    run = folder / "runs" / f"dnsp-{job}"

    def said() -> str:
        shown = [out.read_text() if out.exists() else "no output", json.dumps(slurm.job(job), indent=1), slurm.logs()]
        return "\n".join(shown)

    def steps() -> int:
        path = run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def newest() -> int:
        return max((int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")), default=0)

    wait_for(lambda: steps() >= 3, said)
    assert slurm.job(job)["JobState"] == "RUNNING"
    # a job of the other partition wants the nodes
    wanted = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    other = slurm.call("sbatch", "--parsable", *wanted, check=True).strip()
    wait_for(lambda: slurm.job(other)["JobState"] == "COMPLETED", said)
    preempted = newest()
    assert preempted >= 3, said()
    wait_for(lambda: slurm.job(job)["JobState"] == "RUNNING" and steps() > preempted, said)
    assert slurm.job(job)["Restarts"] == "1"

    # time runs out: the limit is moved up to the next minute, the signal is due two minutes before it
    began = time.strptime(slurm.job(job)["StartTime"], "%Y-%m-%dT%H:%M:%S")
    minutes = math.ceil((time.time() - time.mktime(began)) / 60) + 1
    slurm.call("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}", check=True)
    wait_for(lambda: slurm.job(job).get("Restarts") == "2", said)
    timed_out = newest()
    assert timed_out > preempted, said()
    slurm.call("scontrol", "update", f"JobId={job}", "TimeLimit=10", check=True)
    wait_for(lambda: slurm.job(job)["JobState"] == "RUNNING" and steps() > timed_out, said)

    # scancel saves too, and is the end: nothing is requeued
    slurm.call("scancel", job)
    wait_for(lambda: not slurm.call("squeue", "--noheader", "--jobs", job).strip(), said)
    time.sleep(3)
    assert slurm.job(job)["JobState"] == "CANCELLED", said()
    text = out.read_text()
    assert text.count("goes back into the queue") == 2, text
    assert f"slurm has started this run again (2): from step {timed_out}" in text
    assert "2 ranks on 2 nodes, 1 sequence group of 2, 0 inside a node" in text
    assert all(f"{node} (node {n}): ranks {n}, sequence groups 0 (0 with other nodes)" in text
               for n, node in enumerate(NODES))  # fmt: skip
    done = losses(run)
    assert newest() == len(done) > timed_out
    assert done == whole_losses(len(done))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_job_that_is_done_or_refused_ends(slurm: Slurm, folder: Path, wait_for: Callable[..., Any]) -> None:
    """Exit status of the ranks is the job's; a refusal is read in its output."""
    for overrides, state, line in (
        ((), "COMPLETED", "run folder: runs/dnsp-"),
        (("parallel.sequence=3",), "FAILED", "error: parallel.sequence=3 does not divide 2 ranks"),
    ):
        out = folder / f"{state}.log"
        command = sbatch(f"{SMALL} --wait --output={out} --chdir={folder}")
        job = slurm.call("sh", "-c", " ".join((command, *overrides)), timeout=200).strip()
        assert slurm.job(job)["JobState"] == state, out.read_text()
        assert line in out.read_text()
