"""Local ranks: what each one gets, and which failure the user reads."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dnsp.launch.environment import LaunchError, find_environment
from dnsp.launch.local import ERROR_FILE, cores, first_cause, free_port, rank_environment


def test_a_rank_finds_its_place_and_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    environ = rank_environment(1, 2, 4321, tmp_path)
    place = find_environment(environ)
    assert (place.rank, place.world_size, place.local_rank, place.master_port) == (1, 2, 1, 4321)
    assert int(environ["OMP_NUM_THREADS"]) == max(1, cores() // 2)
    assert environ[ERROR_FILE].startswith(str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert rank_environment(0, 2, 4321, tmp_path)["OMP_NUM_THREADS"] == "7"


def test_ports() -> None:
    assert 0 < free_port() < 65536
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(LaunchError, match="cannot be used"):
            free_port(taken.getsockname()[1])


# what each rank did: (how it ended, its report: message, consequence, time, quiet), and what the user reads
SLEEP, STATUS = "import time; time.sleep(60)", "import sys; sys.exit({})"
CASES = [
    ([(STATUS.format(1), ("lost rank 1", True, 1.0, False)), ("kill", None)], "rank 1 was ended by SIGKILL", 1),
    (
        [(STATUS.format(1), ("lost it", True, 1.0, False)), (STATUS.format(1), ("disk full", False, 2.0, False))],
        "disk full",
        1,
    ),
    ([(STATUS.format(2), ("later", False, 2.0, False)), (STATUS.format(2), ("sooner", False, 1.0, True))], "sooner", 2),
    ([(STATUS.format(1), ("lost", True, 1.0, False)), (SLEEP, None)], "lost", 1),
    # the one that gives the verdict asks the others where they are, and reports after its echo
    ([(STATUS.format(1), ("verdict", True, 2.0, False)), (STATUS.format(1), ("echo", True, 1.0, True))], "verdict", 1),
]


@pytest.mark.parametrize(("ranks", "said", "status"), CASES)
def test_the_first_cause_is_what_the_user_reads(
    tmp_path: Path, ranks: list[tuple[str, tuple[str, bool, float, bool] | None]], said: str, status: int
) -> None:
    processes = []
    try:
        for rank, (ending, report) in enumerate(ranks):
            code = SLEEP if ending == "kill" else ending
            processes.append(subprocess.Popen([sys.executable, "-c", code]))
            if report:
                fields = dict(zip(("message", "consequence", "time", "quiet"), report, strict=True))
                (tmp_path / f"{rank}.json").write_text(json.dumps(fields))
            if ending == "kill":
                processes[-1].kill()
        deadline = time.monotonic() + 10
        while any(p.poll() is None for p, (e, _) in zip(processes, ranks, strict=True) if e != SLEEP):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        message, code = first_cause(processes, tmp_path, stopped=0)
        assert said in message and code == status
    finally:
        for process in processes:
            process.kill()
            process.wait()
