"""Starts the ranks of a run on this machine and watches them: what ``dnsp train --ranks N`` does without a launcher.

The ranks live in sessions of their own, so that an interrupt reaches them once, through here. Rank 0 owns the
terminal; of the others nothing is seen. When one fails the rest are ended, and the user reads the first cause.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from dnsp.launch.environment import Environment, LaunchError

ERROR_FILE = "DNSP_ERROR_FILE"  # where a rank leaves its failure, as JSON: {"time", "message", "consequence", "quiet"}
SUPERVISOR = "DNSP_SUPERVISOR"  # our process id: a rank whose supervisor is gone ends itself
SETTLE = 3.0  # seconds the other ranks get to say why they failed too
END = 10.0  # seconds between asking and killing


def start_ranks(arguments: Sequence[str], ranks: int, port: int | None = None) -> int:
    """Run ``python -m dnsp ARGUMENTS`` as ``ranks`` local ranks; return the exit status of the run.

    Args:
        arguments: the command line of one rank.
        ranks: how many.
        port: where rank 0 listens; None takes a free one.

    Raises:
        LaunchError: when the port is in use.
    """
    port = free_port(port)
    with tempfile.TemporaryDirectory(prefix="dnsp-ranks-") as folder:
        processes: list[subprocess.Popen[bytes]] = []
        logs: list[IO[bytes] | None] = []
        stopping = _forward_signals(processes)
        try:
            for rank in range(ranks):
                log: IO[bytes] | None = None
                if rank > 0:
                    log = Path(folder, f"{rank}.log").open("wb")  # noqa: SIM115 - closed below
                logs.append(log)
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "dnsp", *arguments],
                        env=rank_environment(rank, ranks, port, Path(folder)),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT if log else None,
                        start_new_session=True,
                    )
                )
            failed = _wait(processes)
            if failed is None:
                return 0
            _settle(processes)
            cause, status = first_cause(processes, Path(folder), stopping.number)
            if cause:
                print(cause, file=sys.stderr, flush=True)
            return status
        finally:
            _end(processes)
            for log in logs:
                if log:
                    log.close()
            stopping.restore()


def rank_environment(rank: int, ranks: int, port: int, folder: Path) -> dict[str, str]:
    """The variables of one rank: its place, its share of the cores, and where it reports a failure."""
    place = Environment("local", rank, ranks, rank, ranks, "127.0.0.1", port)
    environ = {**os.environ, **place.variables()}
    environ[ERROR_FILE] = str(folder / f"{rank}.json")
    environ[SUPERVISOR] = str(os.getpid())
    environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // ranks)))
    if sys.platform == "linux":  # the ranks talk over loopback whatever this machine's name resolves to
        environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # python -m dnsp must find the package that is running now, installed or not
    root = str(Path(__file__).absolute().parents[2])
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environ.get("PYTHONPATH")]))
    return environ


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_port(port: int | None = None) -> int:
    """``port`` when nothing listens on it, or a free one for None."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port or 0))
            probe.listen(1)
        except (OSError, OverflowError) as error:
            raise LaunchError(f"port {port} cannot be used ({error}); give another with --port, or none") from None
        return int(probe.getsockname()[1])


def first_cause(processes: Sequence[subprocess.Popen[bytes]], folder: Path, stopped: int) -> tuple[str, int]:
    """The message and status of what failed first; ``stopped``: the signal that was handed on, 0 for none.

    A rank's own report comes before a signal, a signal before a rank that ended without a word, and all of them before
    the reports of those that lost a peer; of these, that of the one which gave the verdict, before its echoes.
    """
    reported: list[tuple[Any, str, int]] = []
    consequences: list[tuple[bool, Any, str]] = []
    killed, silent = [], []
    for rank, process in enumerate(processes):
        code = process.poll()
        if code is None or code == 0:
            continue
        report = _report(folder / f"{rank}.json")
        if report is not None:
            if report["consequence"]:
                consequences.append((report["quiet"], report["time"], report["message"]))
            else:
                reported.append((report["time"], report["message"], code))
        elif code < 0:
            killed.append((rank, signal.Signals(-code).name))
        else:
            silent.append((rank, code))
    if reported:
        _, message, code = min(reported)
        return message, code
    if killed:
        if stopped:
            return f"error: stopped by {signal.Signals(stopped).name} before the run could save", 128 + stopped
        rank, name = killed[0]
        hint = "; the machine may be out of memory" if name == "SIGKILL" else ""
        return f"error: rank {rank} was ended by {name}{hint}. The other ranks were ended.", 1
    if silent:
        rank, code = silent[0]
        return _tail(rank, folder / f"{rank}.log", code), code
    return (min(consequences)[2], 1) if consequences else ("", 1)


def _report(path: Path) -> dict[str, Any] | None:
    try:
        report: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return report


def _tail(rank: int, log: Path, code: int) -> str:
    """What a rank without a report wrote last; rank 0 wrote to the terminal itself."""
    lines = log.read_text(errors="replace").strip().splitlines()[-30:] if log.exists() else []
    return "\n".join([*lines, f"error: rank {rank} ended with status {code}"])


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait until every rank ended well (None) or one did not (its rank)."""
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code not in (None, 0):
                return rank
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)


def _settle(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + SETTLE
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.05)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for kill in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            if process.poll() is None:
                process.send_signal(kill)
        deadline = time.monotonic() + END
        while time.monotonic() < deadline and any(process.poll() is None for process in processes):
            time.sleep(0.05)


class _forward_signals:
    """Hands SIGTERM, SIGINT and SIGUSR1 on to every rank, which save and stop; a third one kills."""

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        self.processes = processes
        self.count = self.number = 0  # how many, and the last
        self.old = {s: signal.signal(s, self.handle) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}

    def handle(self, number: int, frame: object) -> None:
        self.count, self.number = self.count + 1, number
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number if self.count < 3 else signal.SIGKILL)

    def restore(self) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)
