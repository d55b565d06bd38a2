"""Who am I: read from each launcher's own variables."""

from __future__ import annotations

import pytest

from dnsp.launch.environment import Environment, LaunchError, find_environment, first_host

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "1234",
    "TORCHELASTIC_RUN_ID": "none",
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
    "SLURM_PROCID": "6",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
}

CASES = [
    (TORCHRUN, Environment("torchrun", 5, 8, 1, 4, "node0", 1234)),
    (DEEPSPEED, Environment("deepspeed", 3, 4, 1, 2, "10.0.0.1", 29500)),
    (SLURM, Environment("slurm", 6, 7, 2, 3, "gpu07", 23456)),
    ({}, Environment("none", 0, 1, 0, 1, "127.0.0.1", 29500)),
]


@pytest.mark.parametrize(("variables", "place"), CASES, ids=["torchrun", "deepspeed", "slurm", "none"])
def test_each_launcher(variables: dict[str, str], place: Environment) -> None:
    assert find_environment(variables) == place


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
    ],
)
def test_half_a_launcher_is_refused(variables: dict[str, str], said: str) -> None:
    with pytest.raises(LaunchError, match=said):
        find_environment(variables)
