"""What the ranks of a run could talk through: on this machine, without touching a process group, and as a group."""

from __future__ import annotations

import importlib
import itertools
import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .errors import first_line
from .transport import Transport


class Backend(NamedTuple):
    """``works``: usable here; ``found``: what was seen, in words, or why it is not usable."""

    name: str
    works: bool
    found: str


def backends() -> list[Backend]:
    """gloo (CPU ranks), NCCL (GPU ranks) and symmetric memory (one-sided writes between the GPUs of a host)."""
    if not dist.is_available():
        return [Backend(name, False, "this torch was built without torch.distributed") for name in _PROBES]
    return [Backend(name, *probe()) for name, probe in _PROBES.items()]


def _gloo() -> tuple[bool, str]:
    if not dist.is_gloo_available():
        return False, "this torch was built without gloo"
    if dist.is_initialized():
        return True, "built in"
    try:  # a group of one: whether gloo finds a network interface is only known by asking
        group: Any = dist.ProcessGroupGloo(dist.HashStore(), 0, 1, timedelta(seconds=10))
        group.allreduce(torch.ones(1)).wait()
    except RuntimeError as error:
        return False, first_line(error)
    return True, "a group of one summed"


def _nccl() -> tuple[bool, str]:
    if not dist.is_nccl_available():
        return False, "this torch was built without NCCL"
    version = ".".join(map(str, torch.cuda.nccl.version()))
    return torch.cuda.is_available(), version if torch.cuda.is_available() else f"{version}, but no CUDA device"


def _symmetric_memory() -> tuple[bool, str]:
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    try:
        importlib.import_module("torch.distributed._symmetric_memory")
    except ImportError as error:
        return False, str(error)
    count = torch.cuda.device_count()
    pairs = itertools.permutations(range(count), 2)
    deaf = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if deaf:
        return False, f"GPU {deaf[0][0]} cannot reach GPU {deaf[0][1]}'s memory"
    return True, "one GPU" if count == 1 else f"all {count} GPUs reach each other"


_PROBES = {"gloo": _gloo, "nccl": _nccl, "symmetric memory": _symmetric_memory}


NO_GPU = "it needs a GPU on every rank"


class Place(NamedTuple):
    """Where a rank is."""

    host: str
    gpu: str


def places(comm: Transport) -> list[Place]:
    """Of every rank of the group; all call it together."""
    return comm.from_all(Place(host(), _gpu()))


def unreachable(where: Sequence[Place]) -> str | None:
    """Why ranks at these places of one host cannot write each other's memory, in words; None where they can. Asks this
    rank's own devices; see :func:`refusal` for the group's answer."""
    if not all(place.gpu for place in where):
        return NO_GPU
    mine = torch.cuda.current_device()
    numbers = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    others = [numbers.get(place.gpu, mine) for place in where]  # unseen here: the rendezvous will tell
    return _out_of_reach(mine, others)


def _out_of_reach(mine: int, others: Sequence[int]) -> str | None:
    """Why a rank with GPU ``mine`` cannot write the memory of those with the ``others``, by their numbers here."""
    for other in others:
        if other != mine and not torch.cuda.can_device_access_peer(mine, other):
            return f"ranks of a host write each other's memory, and GPU {mine} cannot reach GPU {other}'s"
    try:
        importlib.import_module("torch.distributed._symmetric_memory")
    except ImportError as error:
        return f"this torch has no symmetric memory ({error})"
    return None


def refusal(comm: Transport) -> str | None:
    """Why this group cannot use ``peer``, the same words on every rank; None where it can. All call it together.

    Ranks of a host share memory; where a group spans hosts, states go from one to the next by p2p.
    """
    if comm.size == 1:
        return None if torch.cuda.is_available() else NO_GPU
    where = places(comm)
    answers = comm.from_all((len(comm.near), unreachable([where[rank] for rank in comm.near])))
    if max(near for near, _ in answers) == 1:
        return "no two neighbours of the group are on one host, and memory is shared inside one"
    for rank, (_, words) in enumerate(answers):
        if words:
            return f"rank {comm.ranks[rank]}: {words}"
    return None


def refusal_here(ranks: int, sequence: int) -> str | None:
    """What :func:`refusal` would say on so many ranks of this machine, in sequence groups of ``sequence``, before there
    are any: each takes the GPU of its number, and they share GPUs where there are fewer."""
    if not torch.cuda.is_available():
        return NO_GPU if sequence == 1 else f"rank 0: {NO_GPU}"
    count = torch.cuda.device_count()
    for rank in range(ranks) if sequence > 1 else ():
        first = rank - rank % sequence
        words = _out_of_reach(rank % count, [other % count for other in range(first, first + sequence)])
        if words:
            return f"rank {rank}: {words}"
    return None


def host() -> str:
    """A name of this rank's host, which no other has; DNSP_HOST gives it another, to try several hosts on one."""
    if name := os.environ.get("DNSP_HOST"):
        return name
    try:  # two containers may have one name
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{socket.gethostname()} {file.read().strip()}"
    except OSError:
        return socket.gethostname()


def _gpu() -> str:
    if not torch.cuda.is_available():
        return ""
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
