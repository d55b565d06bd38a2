"""What the ranks of a run could talk through on this machine. It only asks: no process group of the run is touched."""

from __future__ import annotations

import importlib
import itertools
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


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
        return False, str(error).strip().splitlines()[0]
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
