"""Real daemons for the launchers' tests, on this host and on free ports: an sshd, and Slurm's controller and two nodes.

They run as whoever runs the tests, from files in a folder of the tests, and end with them; a system's own sshd and
Slurm are not touched.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path

from dnsp.launch.local import free_port

SBIN = "/usr/sbin:/usr/local/sbin:/sbin"
HOSTS = ("127.0.0.1", "127.0.0.2")
NODES = ("node-a", "node-b")  # no resolver knows them


def _which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:{SBIN}")


def _missing(*programs: str) -> str:
    return ", ".join(program for program in programs if _which(program) is None)


def missing_for_ssh() -> str:
    """What is not installed, in words; empty where all of it is."""
    return _missing("sshd", "ssh", "ssh-keygen", "pdsh")


def missing_for_slurm() -> str:
    """What is not installed, in words; empty where all of it is."""
    return _missing("slurmctld", "slurmd", "munged", "srun", "sbatch")


class Ssh:
    """An sshd on 127.0.0.1 and 127.0.0.2, with a host key and a user's key made for it.

    ``bin`` holds an ``ssh`` that uses them; first in PATH it is what deepspeed, pdsh and doctor call.
    """

    def __init__(self, folder: Path) -> None:
        self.bin, self.port = folder / "bin", free_port()
        self.bin.mkdir()
        for key in ("host", "user"):
            make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)]
            subprocess.run(make, check=True, capture_output=True)
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # it is compiled into sshd, which wants it for root
        (folder / "sshd_config").write_text(
            "".join(f"ListenAddress {host}\n" for host in HOSTS)
            + f"Port {self.port}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nStrictModes no\n"
            "UsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\nPidFile none\n"
        )
        (folder / "ssh_config").write_text(
            f"Host *\n  Port {self.port}\n  IdentityFile {folder}/user\n  IdentitiesOnly yes\n"
            "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
        )
        wrapper = self.bin / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {_which("ssh")} -F {folder}/ssh_config "$@"\n')
        wrapper.chmod(0o755)
        log = folder / "sshd.log"
        command = [str(_which("sshd")), "-D", "-f", str(folder / "sshd_config"), "-E", str(log)]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while not all(_listens(host, self.port) for host in HOSTS):
            said = log.read_text() if log.exists() else ""
            assert self.process.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.05)

    def path(self, environ: dict[str, str]) -> str:
        """PATH with this ``ssh`` in front."""
        return f"{self.bin}{os.pathsep}{environ['PATH']}"

    def stop(self) -> None:
        _end([self.process])


class Slurm:
    """munged, slurmctld and two slurmd with four cores and two GPUs each, as they say: /dev/null and /dev/zero.

    Partition ``low`` is the default, and ``high`` preempts its jobs, which get their ``--signal`` and 60 s.
    """

    def __init__(self, folder: Path, environ: dict[str, str]) -> None:
        self.folder = folder
        self.environ = {**environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{environ['PATH']}:{SBIN}"}
        for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"):  # the tests may themselves run in a job
            self.environ.pop(name, None)
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o400)
        (folder / "state").mkdir()
        ports = [free_port() for _ in range(3)]
        user, host = getpass.getuser(), socket.gethostname().split(".")[0]
        nodes = "".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=4000 Gres=gpu:2\n"
            for name, port in zip(NODES, ports[1:], strict=True)
        )
        (folder / "gres.conf").write_text(f"NodeName={','.join(NODES)} Name=gpu File=/dev/null,/dev/zero\n")
        (folder / "slurm.conf").write_text(
            f"ClusterName=dnsp\nSlurmctldHost={host}(127.0.0.1)\nSlurmctldPort={ports[0]}\nSlurmUser={user}\n"
            f"SlurmdUser={user}\nAuthType=auth/munge\nCredType=cred/munge\n"
            f"AuthInfo=socket={folder}/munge.socket,cred_expire=5\nStateSaveLocation={folder}/state\n"
            f"SlurmdSpoolDir={folder}/spool-%n\nSlurmctldPidFile={folder}/slurmctld.pid\n"
            f"SlurmdPidFile={folder}/slurmd-%n.pid\nProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\n"
            "SwitchType=switch/none\nMpiDefault=none\nReturnToService=2\nSlurmdParameters=config_overrides\n"
            "SchedulerType=sched/backfill\nSchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0\n"
            "SelectType=select/cons_tres\nSelectTypeParameters=CR_Core\nGresTypes=gpu\nKillWait=20\n"
            "PreemptType=preempt/partition_prio\nPreemptMode=REQUEUE\nPreemptExemptTime=0\n"
            f"SlurmctldParameters=preempt_send_user_signal\n{nodes}"
            f"PartitionName=low Nodes={','.join(NODES)} Default=YES State=UP PriorityTier=1 GraceTime=60\n"
            f"PartitionName=high Nodes={','.join(NODES)} State=UP PriorityTier=10 PreemptMode=OFF\n"
        )
        self.processes: list[subprocess.Popen[bytes]] = []
        self._start(
            *("munged", "-F", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket"),
            *(f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged-own.log"),
            *(f"--seed-file={folder}/munge.seed", "--num-threads=2"),
        )
        self._wait(lambda: (folder / "munge.socket").exists())
        self._start("slurmctld", "-D", "-c")
        for node in NODES:
            self._start("slurmd", "-D", "-N", node)
        self._wait(lambda: self.call("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D").strip() == "2")

    def _start(self, program: str, *arguments: str) -> None:
        log = (self.folder / f"{len(self.processes)}-{program}.log").open("wb")
        with log:
            self.processes.append(
                subprocess.Popen(
                    [str(_which(program)), *arguments],
                    env=self.environ,
                    cwd=self.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )

    def _wait(self, true, timeout: float = 60) -> None:  # type: ignore[no-untyped-def]
        deadline = time.monotonic() + timeout
        while not true():
            if time.monotonic() > deadline or any(process.poll() is not None for process in self.processes):
                self.stop()
                raise RuntimeError(f"Slurm does not start:\n{self.logs()}")
            time.sleep(0.1)

    def call(self, *command: str, timeout: float = 60, check: bool = False) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(
            command, env=self.environ, cwd=self.folder, capture_output=True, text=True, timeout=timeout
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        shown = self.call("scontrol", "--oneliner", "show", "job", number)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def logs(self) -> str:
        texts = sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {path.name}\n" + "\n".join(path.read_text().splitlines()[-40:]) for path in texts)

    def stop(self) -> None:
        if len(self.processes) == 4:
            self.call("scancel", "--user", getpass.getuser())
            deadline = time.monotonic() + 30
            while self.call("squeue", "-h") and time.monotonic() < deadline:
                time.sleep(0.2)
        _end(self.processes[::-1])


def _listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
