"""``dnsp doctor CONFIG --hostfile F``: the hosts that ``deepspeed --hostfile F`` would start, asked before it does.

Each is reached as deepspeed reaches it, by ssh without a password, and asked in this folder, with this Python, what it
has.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnsp.errors import UsageError

if TYPE_CHECKING:
    from dnsp.doctor import Row

CONNECT = 10  # seconds until a host counts as unreachable
ANSWER = 60  # and until it has to have answered: a cold Python on a shared file system
AT_ONCE = 32  # hosts asked at the same time
FACTS = "dnsp-host-facts "  # what the line of a host's answer begins with: shells may print a greeting


@dataclass(frozen=True)
class Host:
    name: str
    slots: int  # ranks it takes


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a file as deepspeed reads it: ``NAME slots=N`` a line, ``#`` before a comment.

    Raises:
        UsageError: with the line that is wrong. Where there is no file deepspeed would train on this machine alone.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not text"
        raise UsageError(f"cannot read the hostfile {path}: {why}; see launch/hostfile.example") from None
    hosts: list[Host] = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = re.match(r"(\S+)\s+slots=(\d+)(\s|$)", text)
        if match is None:
            raise UsageError(f"{path}:{number}: {text!r} is not a host; write NAME slots=N, for example node1 slots=8")
        host = Host(match.group(1), int(match.group(2)))
        if host.slots < 1:
            raise UsageError(f"{path}:{number}: {host.name} slots=0 takes no rank; give it slots, or remove the line")
        if host.name in (other.name for other in hosts):
            raise UsageError(f"{path}:{number}: {host.name} is there twice; add its slots up in one line")
        hosts.append(host)
    if not hosts:
        raise UsageError(f"the hostfile {path} names no host; write NAME slots=N, for example node1 slots=8")
    return hosts


def examine(hosts: Sequence[Host], ranks: int, ssh_port: int | None = None) -> Iterator[Row]:
    """A row for the file, one for pdsh and one for each host; ``ranks`` are wanted of them."""
    slots = sum(host.slots for host in hosts)
    sizes = sorted({host.slots for host in hosts})
    found = f"{len(hosts)} host{'s' if len(hosts) > 1 else ''}, {slots} slot{'s' if slots > 1 else ''}"
    if slots < ranks:
        cure = f"add hosts or slots, or take at most {slots} ranks (parallel.sequence, --ranks)"
        yield "hostfile", "missing", f"{found}, fewer than the {ranks} ranks", cure
    elif len(sizes) > 1:
        few, many = (next(host for host in hosts if host.slots == size) for size in (sizes[0], sizes[-1]))
        uneven = f"uneven slots: {few.name} slots={few.slots}, {many.name} slots={many.slots}"
        yield "hostfile", "missing", uneven, f"give every host the same number, for example slots={few.slots}"
    else:
        yield "hostfile", "ok", found, ""
    if len(hosts) > 1:
        pdsh = shutil.which("pdsh")
        cure = "" if pdsh else "deepspeed starts several hosts with it; on Debian: apt install pdsh"
        yield "pdsh", "ok" if pdsh else "missing", pdsh or "not installed here", cure
    if shutil.which("ssh") is None:
        yield "ssh", "missing", "not installed here", "on Debian: apt install openssh-client"
        return
    with ThreadPoolExecutor(min(AT_ONCE, len(hosts))) as pool:
        answers = list(pool.map(lambda host: ask(host, ssh_port), hosts))
    with_gpus = any(isinstance(answer, dict) and answer["gpus"] for answer in answers)
    for host, answer in zip(hosts, answers, strict=True):
        yield (f"{host.name} slots={host.slots}", *_judge(host, answer, with_gpus))


def ask(host: Host, ssh_port: int | None = None) -> dict[str, Any] | tuple[str, str]:
    """What a host says of itself (:func:`facts`), or why it does not, and the cure."""
    port = [] if ssh_port is None else ["-p", str(ssh_port)]
    options = ("-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT}")
    exports = "".join(f"export {n}={shlex.quote(v)}; " for n, v in os.environ.items() if n.startswith("PYTHON"))
    folder = shlex.quote(os.getcwd())
    remote = f"{exports}cd {folder} && {shlex.quote(sys.executable)} -m dnsp host-facts"
    try:
        done = subprocess.run(
            ["ssh", *options, *port, host.name, remote],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=ANSWER,
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {ANSWER} s", f"look at it: ssh {host.name}"
    said = [line.removeprefix(FACTS) for line in done.stdout.splitlines() if line.startswith(FACTS)]
    if said:
        answer: dict[str, Any] = json.loads(said[-1])
        return answer
    words = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    if done.returncode == 255:  # ssh's own
        if "resolve" in words or "not known" in words:
            return f"unknown host: {words}", "correct its name, or give it an address in /etc/hosts or ~/.ssh/config"
        return f"not reachable: {words}", f"'ssh {host.name} true' must work without a password (ssh-copy-id)"
    if "cd:" in words or "No such file" in words or "not found" in words:
        return words, f"{os.getcwd()} and {sys.executable} must be there too: share a file system, or install the same"
    return words, f"there, 'python -m dnsp' must work with {sys.executable}: install the same dnsp"


def _judge(host: Host, answer: dict[str, Any] | tuple[str, str], with_gpus: bool) -> tuple[Any, str, str]:
    if isinstance(answer, tuple):
        return "missing", *answer
    gpus = answer["gpus"]
    text = f"{gpus} GPU{'' if gpus == 1 else 's'}, dnsp {answer['dnsp']}, torch {answer['torch']}"
    for name, here in versions().items():
        if answer[name] != here:
            return "missing", f"{name} {answer[name]}, here {here}", f"install {name} {here} on {host.name} too"
    if with_gpus and gpus < host.slots:
        return "missing", f"{text}: fewer GPUs than slots", f"give {host.name} slots={gpus}, or remove it"
    return "ok", text, ""


def versions() -> dict[str, str]:
    """What has to be the same everywhere."""
    import dnsp

    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = "not installed"
    return {"dnsp": dnsp.__version__, "torch": torch}


def facts() -> str:
    """The line with which a host answers."""
    from dnsp.nvml import count

    return FACTS + json.dumps({**versions(), "gpus": count()})
