"""Who am I: read from each launcher's own variables."""

from __future__ import annotations

import pytest

from dnsp.launch.environment import Environment, LaunchError, find_environment, first_host, placed_rank
from dnsp.placement import describe

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "1234",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
}
DEEPSPEED = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_PROCID": "5",  # as --distribution=cyclic numbers them
    "SLURMD_NODENAME": "gpu08",
    "SLURM_RESTART_COUNT": "1",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NODELIST": "localhost,gpu08",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
}

CASES = [
    (TORCHRUN, Environment("torchrun", 5, 8, 1, 4, "node0", 1234, node=1, nodes=2, restarts=2)),
    (DEEPSPEED, Environment("deepspeed", 3, 4, 1, 2, "10.0.0.1", 29500, node=1, nodes=2)),
    (SLURM, Environment("slurm", 6, 7, 2, 3, "localhost", 23456, node=1, nodes=2, node_name="gpu08", restarts=1)),
    ({}, Environment("none", 0, 1, 0, 1, "127.0.0.1", 29500)),
]


@pytest.mark.parametrize(("variables", "place"), CASES, ids=["torchrun", "deepspeed", "slurm", "none"])
def test_each_launcher(variables: dict[str, str], place: Environment) -> None:
    assert find_environment(variables) == place


@pytest.mark.parametrize("nodes", [1, 2, 3, 4])
@pytest.mark.parametrize("per_node", [1, 2, 3, 4, 6, 8])
def test_sequence_groups_lie_inside_a_node_first(nodes: int, per_node: int) -> None:
    """For every size of a group that divides the world: as many groups inside a node as any order of ranks can have."""
    world = nodes * per_node
    for sequence in (n for n in range(1, world + 1) if world % n == 0):
        places = [(node, local) for node in range(nodes) for local in range(per_node)]
        node_of = {placed_rank(node, local, nodes, per_node, sequence): node for node, local in places}
        assert sorted(node_of) == list(range(world))
        assert placed_rank(0, 0, nodes, per_node, sequence) == 0  # where the launcher said that the master is
        groups = [{node_of[first + i] for i in range(sequence)} for first in range(0, world, sequence)]
        assert sum(len(group) == 1 for group in groups) == nodes * (per_node // sequence)
        if per_node % sequence == 0 or sequence % per_node == 0:  # the launcher's own order
            assert all(placed_rank(node, local, nodes, per_node, sequence) == node * per_node + local
                       for node, local in places)  # fmt: skip


def test_a_process_takes_its_place() -> None:
    place = Environment("torchrun", 5, 6, 2, 3, "node0", 1234, node=1, nodes=2)
    assert place.placed(2).rank == 5 and place.placed(None) == place
    assert Environment("torchrun", 2, 6, 2, 3, "node0", 1234, node=0, nodes=2).placed(2).rank == 4
    uneven = Environment("slurm", 4, 7, 0, 3, "node0", 1234, node=1, nodes=2)
    assert uneven.placed(2) == uneven


def test_where_the_ranks_are_is_said() -> None:
    lines = describe([(0, "a")] * 3 + [(1, "a")] * 3, 2)
    assert lines == [
        "placement: 6 ranks on 2 nodes, 3 sequence groups of 2, 2 inside a node",
        "  a (node 0): ranks 0-2, sequence groups 0-1 (1 with other nodes)",
        "  a (node 1): ranks 3-5, sequence groups 1-2 (1 with other nodes)",
    ]
    alone = describe([(0, "a"), (1, "b")], 1)
    assert alone[0] == "placement: 2 ranks on 2 nodes, 2 sequence groups of 1, all inside a node"
    many = describe([(node, f"n{node}") for node in range(40) for _ in range(8)], 8)
    assert len(many) == 18 and many[-1] == "  and 24 more nodes"
    assert describe([(0, "a")], 1) == ["placement: one rank on a"]


def test_what_is_handed_on_is_read_back() -> None:
    place = Environment("local", 1, 2, 1, 2, "127.0.0.1", 4321)
    assert find_environment(place.variables()) == place


def test_a_batch_script_without_srun_is_one_process() -> None:
    batch = {name: value for name, value in SLURM.items() if "STEP" not in name}
    assert find_environment(batch).launcher == "none"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[07-09,12],login", "gpu07"), ("a", "a"), ("a,b", "a"), ("n[3]", "n3"), ("r[1-2]n[10-12]-ib", "r1n10-ib")],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({**TORCHRUN, "RANK": "8"}, "RANK=8 is not below WORLD_SIZE=8"),
        ({**TORCHRUN, "RANK": "x"}, "RANK='x'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({**TORCHRUN, "MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "4"}, "does not hold task 2 of node 1 of 7 tasks"),
        ({**SLURM, "SLURM_LOCALID": "3"}, "does not hold task 3"),
    ],
)
def test_half_a_launcher_is_refused(variables: dict[str, str], said: str) -> None:
    with pytest.raises(LaunchError, match=said):
        find_environment(variables)
