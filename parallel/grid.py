"""The rank grid: world ranks reshaped ``[data, sequence]``, sequence ranks adjacent so that a group stays in a node."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby

import torch.distributed as dist

from .errors import LayoutError
from .probe import host
from .transport import Transport, backend_of

PATIENCE = timedelta(minutes=30)
GRACE = timedelta(seconds=10)  # NCCL ends a process without a word: until then whoever knows more has said it


@dataclass(frozen=True)
class Grid:
    """One rank's place. All fields in ranks; groups are None where there is one process and nothing to talk to."""

    world: int
    rank: int
    sequence: int
    sequence_group: dist.ProcessGroup | None = None
    sequence_control: dist.ProcessGroup | None = None  # the same ranks; gloo, for words between hosts
    everyone: dist.ProcessGroup | None = None  # gradients and optimizer shards: data and sequence ranks together
    alone: dist.ProcessGroup | None = None  # this rank only
    timeout: float = 30.0  # seconds a message of a group may wait
    near: tuple[int, ...] | None = None  # sequence ranks on this host, neighbours of each other; None: all
    near_control: dist.ProcessGroup | None = None  # those ranks; gloo
    hosts: int = 1  # of the sequence group, each with ranks that are neighbours

    @property
    def sequence_size(self) -> int:
        return self.sequence

    @property
    def data_size(self) -> int:
        return self.world // self.sequence

    @property
    def sequence_rank(self) -> int:
        return self.rank % self.sequence

    @property
    def data_rank(self) -> int:
        return self.rank // self.sequence

    @property
    def sequence_ranks(self) -> tuple[int, ...]:
        """The global ranks of this rank's sequence group, in sequence order."""
        first = self.data_rank * self.sequence
        return tuple(range(first, first + self.sequence))

    def transport(self) -> Transport:
        """The messages of this rank's sequence group."""
        return Transport(
            self.sequence_group,
            self.sequence_ranks,
            self.sequence_rank,
            self.sequence_control,
            self.timeout,
            self.near,
            self.near_control,
            self.hosts,
        )

    def mpu(self) -> Mpu:
        """What ``deepspeed.initialize(mpu=...)`` asks for."""
        return Mpu(self)


def make_grid(sequence: int | None = None, timeout: float = 30.0) -> Grid:
    """The grid of this process. ``sequence``: ranks of a sequence group (None: all of them); ``timeout``: seconds a
    message of a group may wait. Every rank of the world calls this together; without an initialised
    torch.distributed it is the grid of one. Raises LayoutError where the world does not divide.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    size = world if sequence is None else sequence
    if size < 1 or world % size:
        ways = " or ".join(str(n) for n in range(1, world + 1) if world % n == 0)
        raise LayoutError(
            f"a sequence group of {size} does not divide {world} ranks: use {ways} (parallel.sequence), or more ranks"
        )
    if not dist.is_initialized():
        return Grid(world=1, rank=0, sequence=1)
    limit = timedelta(seconds=timeout)
    if backend_of(None) == "nccl":
        limit += GRACE
    # Words between hosts may wait for a rank that still compiles or proves its kernels.
    controls = [
        dist.new_group(range(first, first + size), timeout=PATIENCE, backend="gloo") if size > 1 else None
        for first in range(0, world, size)
    ]
    # Own groups, also where they hold the same ranks: a scan's messages never queue behind a gradient reduction.
    groups = [dist.new_group(range(first, first + size), timeout=limit) for first in range(0, world, size)]
    everyone = dist.new_group(range(world), timeout=limit)
    alone = dist.new_group([rank], timeout=limit, use_local_synchronization=True)
    mine = rank // size
    group, control = groups[mine] if size > 1 else None, controls[mine]
    return Grid(world, rank, size, group, control, everyone, alone, timeout, *_near(world, rank, size))


def _near(world: int, rank: int, size: int) -> tuple[tuple[int, ...] | None, dist.ProcessGroup | None, int]:
    """The sequence ranks around this one on its host, and their group, where they are not the whole sequence group; and
    how many hosts that spans."""
    hosts: list[str] = [""] * world
    together = dist.new_group(range(world), timeout=PATIENCE, backend="gloo")
    dist.all_gather_object(hosts, host(), group=together)
    found: tuple[tuple[int, ...] | None, dist.ProcessGroup | None, int] = None, None, 1
    for first in range(0, world, size):
        start = first
        runs = [len(list(names)) for _, names in groupby(hosts[first : first + size])]
        for length in runs:
            ranks = range(start, start + length)
            start = ranks.stop
            if len(ranks) == size:
                continue
            group = dist.new_group(ranks, timeout=PATIENCE, backend="gloo") if len(ranks) > 1 else None
            if rank in ranks:
                found = tuple(r - first for r in ranks), group, len(runs)
    return found


class Mpu:
    """DeepSpeed 0.19's model-parallel unit for data and sequence parallelism; tensor and pipeline sizes are 1.

    The presence of ``initialize_sequence_parallel`` is what switches DeepSpeed's sequence-parallel handling on: ZeRO
    then shards over ``sequence_data_parallel`` and divides summed gradients by the number of data ranks alone.
    The model-parallel group must be this rank alone: clipping at stage 0 sums squared norms over it.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def initialize_sequence_parallel(self, sequence_parallel_size: int) -> None:
        """The groups exist already; DeepSpeed only looks whether this method does."""

    def get_sequence_parallel_group(self) -> dist.ProcessGroup | None:
        return self._grid.sequence_group or self._grid.alone

    def get_sequence_parallel_world_size(self) -> int:
        return self._grid.sequence_size

    def get_sequence_parallel_rank(self) -> int:
        return self._grid.sequence_rank

    def get_sequence_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self._grid.everyone

    def get_sequence_data_parallel_world_size(self) -> int:
        return self._grid.world

    def get_sequence_data_parallel_rank(self) -> int:
        return self._grid.rank

    def get_data_parallel_world_size(self) -> int:
        return self._grid.data_size

    def get_data_parallel_rank(self) -> int:
        return self._grid.data_rank

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(range(self._grid.sequence_rank, self._grid.world, self._grid.sequence_size))

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._grid.alone

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0

    # Universal checkpoints convert only where these say 1.
    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_pipeline_model_parallel_group = get_model_parallel_group
    get_pipeline_model_parallel_world_size = get_model_parallel_world_size
    get_pipeline_model_parallel_rank = get_model_parallel_rank
