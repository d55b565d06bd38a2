"""What doctor says of a hostfile: the file's own slips, and hosts that ssh does or does not reach."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dnsp import hosts
from dnsp.cli import main
from dnsp.hosts import Host, examine, read_hostfile
from tests.launch.daemons import HOSTS, Ssh

ROOT = Path(__file__).resolve().parents[2]

SLIPS = [
    ("node1\n", ":1: 'node1' is not a host; write NAME slots=N"),
    ("# all\n\nnode1 slots=two\n", ":3: 'node1 slots=two' is not a host"),
    ("node1 slots=0\n", ":1: node1 slots=0 takes no rank"),
    ("a slots=2\nb slots=2\na slots=2\n", ":3: a is there twice"),
    ("# nothing\n", "names no host"),
]


@pytest.mark.parametrize(("text", "said"), SLIPS)
def test_slips_in_the_file(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    (tmp_path / "hosts").write_text(text)
    assert main(["doctor", str(folder / "tiny.yaml"), "--hostfile", str(tmp_path / "hosts")]) == 2
    output = capsys.readouterr()
    assert said in output.err and not output.out


def test_a_file_that_is_not_there_and_a_missing_configuration(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """deepspeed would train on this machine alone."""
    assert main(["doctor", str(folder / "tiny.yaml"), "--hostfile", str(tmp_path / "none")]) == 2
    assert "cannot read the hostfile" in capsys.readouterr().err
    assert main(["doctor", "--hostfile", str(tmp_path / "none")]) == 2
    assert "go with a configuration" in capsys.readouterr().err


def test_the_example_is_a_hostfile() -> None:
    assert read_hostfile(ROOT / "launch" / "hostfile.example") == [Host("node1", 8), Host("node2", 8)]


def rows_of(hosts: list[Host], ranks: int) -> dict[str, tuple[str, str, str]]:
    return {name: (status, found, cure) for name, status, found, cure in examine(hosts, ranks)}


@pytest.fixture
def reached(ssh: Ssh, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", ssh.path(environ))


def test_hosts_that_are_well(reached: None) -> None:
    rows = rows_of([Host(host, 2) for host in HOSTS], 4)
    assert rows["hostfile"] == ("ok", "2 hosts, 4 slots", "")
    assert rows["pdsh"][0] == "ok"
    for host in HOSTS:
        status, found, _ = rows[f"{host} slots=2"]
        assert status == "ok" and " GPU" in found and "dnsp 0." in found, found


def test_unknown_and_unreachable_hosts(reached: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unknown, closed = "no-such-host.invalid", "127.0.0.3"  # nothing listens on the latter
    rows = rows_of([Host(HOSTS[0], 1), Host(unknown, 1), Host(closed, 1)], 3)
    assert rows[f"{HOSTS[0]} slots=1"][0] == "ok"
    status, found, cure = rows[f"{unknown} slots=1"]
    assert status == "missing" and found.startswith("unknown host") and unknown in found and "/etc/hosts" in cure
    status, found, cure = rows[f"{closed} slots=1"]
    assert status == "missing" and "not reachable" in found and "refused" in found and f"ssh {closed}" in cure
    # a Python that is not there, as on a host without the shared file system
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    status, found, cure = rows_of([Host(HOSTS[0], 1)], 1)[f"{HOSTS[0]} slots=1"]
    assert status == "missing" and str(tmp_path / "python") in cure


def test_a_host_with_another_version(reached: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import dnsp

    monkeypatch.setattr(dnsp, "__version__", "99.0")  # here, not there
    status, found, cure = rows_of([Host(HOSTS[0], 1)], 1)[f"{HOSTS[0]} slots=1"]
    assert status == "missing" and "here 99.0" in found and "install dnsp 99.0" in cure


def test_fewer_gpus_than_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of hosts that this machine does not have; without any GPU the ranks are the CPU's."""
    gpus = {"many": 8, "few": 4}
    monkeypatch.setattr(hosts, "ask", lambda host, port: {**hosts.versions(), "gpus": gpus[host.name]})
    rows = rows_of([Host("many", 8), Host("few", 8)], 16)
    assert rows["many slots=8"][0] == "ok"
    status, found, cure = rows["few slots=8"]
    assert status == "missing" and "4 GPUs" in found and "fewer GPUs than slots" in found and "few slots=4" in cure
    gpus.update(many=0, few=0)
    rows = rows_of([Host("many", 8), Host("few", 8)], 16)
    assert rows["many slots=8"][0] == rows["few slots=8"][0] == "ok"


def test_too_few_and_uneven_slots(reached: None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fewer = ("hostfile", "missing", "1 host, 2 slots, fewer than the 4 ranks")
    assert next(examine([Host(HOSTS[0], 2)], 4))[:3] == fewer
    monkeypatch.chdir(folder)
    (folder / "uneven").write_text(f"{HOSTS[0]} slots=2\n{HOSTS[1]} slots=1\n")
    assert main(["doctor", "tiny.yaml", "--hostfile", "uneven", "--json", "uneven.json"]) == 1
    findings = {f["name"]: f for f in json.loads(Path("uneven.json").read_text())["findings"]}
    assert findings["hostfile"]["status"] == "missing"
    assert findings["hostfile"]["found"] == f"uneven slots: {HOSTS[1]} slots=1, {HOSTS[0]} slots=2"
    # three slots are a sequence group of three, which a zigzag of 256 tokens cannot be cut into
    assert findings["ranks"]["status"] == "missing" and "256" in findings["ranks"]["found"]
