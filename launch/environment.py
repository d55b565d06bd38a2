"""Who am I among the processes of this run: read from whichever launcher started them.

torchrun and deepspeed set RANK and its companions; Slurm's srun sets its own names; with none of them the run is one
process. Nothing of this package is imported here, so that a bad launch is refused before anything slow.

Ranks of a node are neighbours: torchrun and deepspeed number them so, and under Slurm the number is made from the node
and the task on it, whatever ``--distribution`` was. Sequence groups are runs of neighbours, see :func:`placed_rank`.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace

DEFAULT_PORT = 29500


class LaunchError(ValueError):
    """The launcher's variables do not describe a run."""


@dataclass(frozen=True)
class Environment:
    """One process's place: ``rank`` of ``world_size``, ``local_rank`` of ``local_world_size`` on its node."""

    launcher: str  # torchrun | deepspeed | slurm | local | none
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_address: str
    master_port: int
    node: int = 0  # of the run's nodes, counted by the launcher
    nodes: int = 1
    node_name: str = ""  # Slurm's; otherwise the host's
    restarts: int = 0  # how often the launcher has started this run again

    @property
    def host(self) -> str:
        """The node's name for people."""
        return self.node_name or socket.gethostname()

    def placed(self, sequence: int | None) -> Environment:
        """The same process under the rank that keeps sequence groups of this size inside a node; None: no groups."""
        if sequence is None or self.nodes * self.local_world_size != self.world_size:
            return self
        rank = placed_rank(self.node, self.local_rank, self.nodes, self.local_world_size, sequence)
        return replace(self, rank=rank)

    def variables(self) -> dict[str, str]:
        """The same as the variables that torch.distributed and DeepSpeed read."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": str(self.master_port),
        }


def find_environment(environ: Mapping[str, str] | None = None) -> Environment:
    """The place of this process under torchrun, deepspeed, ``srun``, ``dnsp --ranks`` or no launcher at all.

    Raises:
        LaunchError: when the variables are incomplete or contradict each other.
    """
    environ = os.environ if environ is None else environ
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _from_rank(environ)
    # a batch script without srun has SLURM_PROCID=0 and SLURM_NTASKS too; only a step has an id
    if "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ:
        return _from_slurm(environ)
    return Environment("none", 0, 1, 0, 1, "127.0.0.1", DEFAULT_PORT)


def _from_rank(environ: Mapping[str, str]) -> Environment:
    missing = [name for name in ("RANK", "WORLD_SIZE") if name not in environ]
    if missing:
        raise LaunchError(
            f"{missing[0]} is not set but its companions are; start with torchrun, deepspeed or srun, or unset "
            "RANK and WORLD_SIZE for one process"
        )
    rank, world = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    if not 0 <= rank < world:
        raise LaunchError(f"RANK={rank} is not below WORLD_SIZE={world}; start all ranks with one launcher")
    if world > 1 and "MASTER_ADDR" not in environ:
        raise LaunchError(f"WORLD_SIZE={world} but MASTER_ADDR is not set; name the host of rank 0 in it")
    local_world = next((_number(environ, n) for n in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if n in environ), world)
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "deepspeed" if "CROSS_SIZE" in environ else "local"
    node = next((_number(environ, n) for n in ("GROUP_RANK", "CROSS_RANK") if n in environ), rank // local_world)
    nodes = next((_number(environ, n) for n in ("GROUP_WORLD_SIZE", "CROSS_SIZE") if n in environ), None)
    return Environment(
        launcher=launcher,
        rank=rank,
        world_size=world,
        local_rank=_number(environ, "LOCAL_RANK") if "LOCAL_RANK" in environ else rank % local_world,
        local_world_size=local_world,
        master_address=environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_number(environ, "MASTER_PORT") if "MASTER_PORT" in environ else DEFAULT_PORT,
        node=node,
        nodes=-(-world // local_world) if nodes is None else nodes,
        restarts=_number(environ, "TORCHELASTIC_RESTART_COUNT") if "TORCHELASTIC_RESTART_COUNT" in environ else 0,
    )


def _from_slurm(environ: Mapping[str, str]) -> Environment:
    tasks = next((n for n in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if n in environ), None)
    if tasks is None:
        raise LaunchError("srun set no SLURM_NTASKS; give it --ntasks or --ntasks-per-node")
    world, node, local = _number(environ, tasks), _number(environ, "SLURM_NODEID"), _number(environ, "SLURM_LOCALID")
    names = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", environ.get("SLURM_NODELIST", "")))
    if world > 1 and not names and "MASTER_ADDR" not in environ:
        raise LaunchError("srun set no SLURM_JOB_NODELIST; name the host of rank 0 in MASTER_ADDR")
    # every task works out the same port: from the job, so that two jobs on one node do not meet
    port = 20_000 + _number(environ, "SLURM_JOB_ID") % 10_000 if "SLURM_JOB_ID" in environ else DEFAULT_PORT
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", ""))
    counts = _tasks_per_node(per_node) or [world]
    if sum(counts) != world or not node < len(counts) or not local < counts[node]:
        raise LaunchError(
            f"SLURM_STEP_TASKS_PER_NODE={per_node!r} does not hold task {local} of node {node} of {world} tasks; "
            "start the ranks with one srun"
        )
    # SLURM_PROCID follows --distribution, under which neighbours may lie on different nodes
    rank = sum(counts[:node]) + local
    return Environment(
        launcher="slurm",
        rank=rank,
        world_size=world,
        local_rank=local,
        local_world_size=counts[node],
        master_address=environ.get("MASTER_ADDR") or (_address(first_host(names)) if names else "127.0.0.1"),
        master_port=_number(environ, "MASTER_PORT") if "MASTER_PORT" in environ else port,
        node=node,
        nodes=len(counts),
        node_name=environ.get("SLURMD_NODENAME", ""),
        restarts=_number(environ, "SLURM_RESTART_COUNT") if "SLURM_RESTART_COUNT" in environ else 0,
    )


def placed_rank(node: int, local_rank: int, nodes: int, per_node: int, sequence: int) -> int:
    """The rank of a process such that as many sequence groups as can lie within one node do.

    Sequence groups are ``sequence`` neighbouring ranks. Each node first makes the whole groups that it has room for;
    what is left over on the nodes makes the groups that span them, in order. Where ``sequence`` divides ``per_node``,
    or a group is larger than a node, that is the launcher's own order. Rank 0 is the first process of the first node.

    >>> [placed_rank(node, i, 2, 3, 2) for node in (0, 1) for i in range(3)]
    [0, 1, 4, 2, 3, 5]
    """
    whole = per_node // sequence * sequence
    if local_rank < whole:
        return node * whole + local_rank
    return nodes * whole + node * (per_node - whole) + local_rank - whole


def _address(host: str) -> str:
    """A name that a resolver knows, as it is; of another of Slurm's node names the address that Slurm itself uses."""
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        pass
    try:
        shown = subprocess.run(["scontrol", "show", "node", host], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return host
    found = re.search(r"\bNodeAddr=(\S+)", shown)
    return found.group(1) if found else host


def first_host(nodelist: str) -> str:
    """The first host of Slurm's compressed list: ``gpu[07-09,12],login`` is ``gpu07``.

    >>> first_host("gpu[07-09,12],login")
    'gpu07'
    """
    head = re.match(r"[^,\[]+(\[[^\]]*\][^,\[]*)*", nodelist)
    if head is None:
        raise LaunchError(f"cannot read the node list {nodelist!r}; name the host of rank 0 in MASTER_ADDR")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", head.group())


def _tasks_per_node(per_node: str) -> list[int]:
    """Slurm writes tasks a node as ``4(x2),3``: node 0 and 1 have four, node 2 has three."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node):
        counts += [int(count)] * int(times or 1)
    return counts


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not text.isdigit():
        raise LaunchError(f"{name}={text!r} is not a whole number; it is the launcher's to set")
    return int(text)
