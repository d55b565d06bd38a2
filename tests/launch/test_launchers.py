"""The launchers themselves: the same command is a rank of torchrun, of deepspeed, and of nothing."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dnsp.launch.local import free_port
from tests.launch.daemons import HOSTS, Ssh
from tests.launch.documents import documented

SCRIPTS = Path(sys.executable).parent

Launched = Callable[..., subprocess.CompletedProcess[str]]
Losses = Callable[[Path], list[float]]
WholeLosses = Callable[[int], list[float]]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_torchrun(folder: Path, launched: Launched) -> None:
    torchrun = documented("README.md", "torchrun", {"node 8": "node 2"}) + " run.dir=torchrun"
    port = {"PET_MASTER_PORT": str(free_port())}  # torchrun's own, which another torchrun here may have
    done = launched("sh", "-c", torchrun, **port)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder: torchrun") == 1
    assert "placement: 2 ranks on 1 node, 1 sequence group of 2, all inside a node" in done.stdout
    # a refusal is said once, whatever torchrun says around it
    done = launched("sh", "-c", torchrun, **port)
    assert done.returncode != 0
    assert done.stderr.count("error: torchrun holds a run already") == 1


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_torchrun_starts_two_nodes_again(
    folder: Path,
    environ: dict[str, str],
    losses: Losses,
    whole_losses: WholeLosses,
    wait_for: Callable[..., None],
) -> None:
    """A rank is killed; torchrun starts the ranks of both nodes again, and the run resumes without being told."""
    run, rendezvous = folder / "restarted", f"127.0.0.1:{free_port()}"
    smaller = {"node 8": "node 1", "node1:29400": rendezvous, "runs/mine": "restarted", "every=100": "every=4"}
    command = documented("docs/clusters.md", "torchrun", smaller).split()
    logs = [folder / f"agent-{node}.log" for node in (0, 1)]
    agents = []
    try:
        for log in logs:
            with log.open("wb") as out:
                agents.append(
                    subprocess.Popen(
                        (*command, "train.steps=120"), cwd=folder, env=environ, stdout=out, stderr=subprocess.STDOUT
                    )
                )

        def said() -> str:
            return "\n".join(log.read_text() for log in logs)

        def steps() -> int:
            path = run / "metrics.jsonl"
            return path.read_bytes().count(b"\n") if path.exists() else 0

        wait_for(lambda: steps() >= 5, said)
        ranks = [child for agent in agents for child in psutil.Process(agent.pid).children(recursive=True)]
        victim = next(rank for rank in ranks if rank.environ().get("RANK") == "1")
        victim.send_signal(signal.SIGKILL)
        codes = [agent.wait(timeout=200) for agent in agents]
    finally:
        for agent in agents:
            if agent.poll() is None:
                agent.kill()
                agent.wait()
    text = "\n".join(log.read_text() for log in logs)
    assert codes == [0, 0], text
    resumed = re.findall(r"torchrun has started this run again \((\d+)\): from step (\d+)", text)
    assert len(resumed) == 1 and int(resumed[0][1]) >= 4, text
    assert "holds a run already" not in text, text
    assert "placement: 2 ranks on 2 nodes, 1 sequence group of 2, 0 inside a node" in text
    assert losses(run) == whole_losses(120)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_deepspeed(folder: Path, launched: Launched, losses: Losses, whole_losses: WholeLosses) -> None:
    deepspeed = (str(SCRIPTS / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port()))
    done = launched(*deepspeed, "--module", "dnsp", "train", "tiny.yaml", "run.dir=deepspeed")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder: deepspeed") == 1
    assert losses(folder / "deepspeed") == whole_losses(2)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_deepspeed_over_ssh(
    folder: Path,
    environ: dict[str, str],
    launched: Launched,
    ssh: Ssh,
    losses: Losses,
    whole_losses: WholeLosses,
) -> None:
    """Two hosts, one rank each, by the hostfile; what doctor says of the file before."""
    (folder / "hosts").write_text("# two names of this host\n" + "".join(f"{host} slots=1\n" for host in HOSTS))
    # what ranks on other hosts shall have in their environment beside Python's own variables
    (folder / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\nGLOO_SOCKET_IFNAME=lo\n")
    path = ssh.path(environ)
    hosts = {"launch/hostfile.example": "hosts"}
    doctor = documented("docs/clusters.md", "dnsp doctor", hosts)
    deepspeed = documented("README.md", "deepspeed", hosts)
    assert deepspeed == documented("docs/clusters.md", "deepspeed", hosts)
    done = launched("sh", "-c", doctor, PATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    # the first host's own address is not one that the loopback hosts of this test reach
    ours = f"deepspeed --master_port {free_port()} --master_addr {HOSTS[0]}"
    done = launched("sh", "-c", deepspeed.replace("deepspeed", ours, 1) + " run.dir=over-ssh", PATH=path)
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.count("run folder: over-ssh") == 1
    assert "placement: 2 ranks on 2 nodes, 1 sequence group of 2, 0 inside a node" in done.stdout
    assert losses(folder / "over-ssh") == whole_losses(2)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_master_port_in_use(launched: Launched) -> None:
    """Rank 0 of a launcher that does not look: it says so, and the others do not wait for it."""
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        deepspeed = (str(SCRIPTS / "deepspeed"), "--num_accelerators", "2", "--master_port", str(port))
        done = launched(*deepspeed, "--module", "dnsp", "train", "tiny.yaml", "run.dir=busy")
    assert done.returncode == 2, done.stderr
    assert f"127.0.0.1:{port}: the port is in use" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_world_that_does_not_fit(launched: Launched) -> None:
    """Refused by every rank before it looks for the others, said once a node."""
    torchrun = (str(SCRIPTS / "torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "dnsp")
    done = launched(*torchrun, "train", "tiny.yaml", "run.dir=odd", "parallel.sequence=3")
    assert done.returncode != 0
    assert done.stderr.count("error: parallel.sequence=3 does not divide 2 ranks") == 1
    done = launched(*torchrun, "train", "tiny.yaml", "run.dir=odd", "parallel.sequence=1", "train.global_batch=3")
    assert done.stderr.count("error: train.global_batch=3 is not a multiple of train.micro_batch=1 times 2 data") == 1


LATE = """
import os, sys, time
from dnsp.ending import end
late = os.environ["LOCAL_RANK"] == "0"
time.sleep(3 * late)
sys.exit(end(2, "the reason", quiet=not late))
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("launcher", [("torchrun", "--nproc-per-node"), ("deepspeed", "--num_accelerators")])
def test_the_rank_that_speaks_may_be_late(folder: Path, launched: Launched, launcher: tuple[str, str]) -> None:
    """A launcher ends every rank with the first that ended: one that keeps quiet leaves time to one that does not."""
    (folder / "late.py").write_text(LATE)
    command, ranks = launcher
    done = launched(str(SCRIPTS / command), ranks, "2", "--master_port", str(free_port()), "late.py")
    assert done.returncode != 0
    assert done.stderr.count("error: the reason\n") == 1, done.stderr
