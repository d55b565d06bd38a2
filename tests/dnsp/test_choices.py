"""What a run chooses once, and keeps."""

from __future__ import annotations

import re
from contextlib import ExitStack
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from dnsp import fits, watchdog
from dnsp.begin import settle_transports
from dnsp.choices import MIB, Choices, choose_transports, confirm, make_choices, shared_sizes
from dnsp.config import Config, parse_config
from dnsp.errors import UsageError
from dnsp.parallel import attention_backends, post, symmetric
from dnsp.parallel.attention import attention
from dnsp.parallel.delta_rule import delta_rule
from dnsp.parallel.errors import CannotShare, PlanError
from dnsp.parallel.grid import Grid, make_grid
from dnsp.parallel.layout import Layout
from dnsp.parallel.plan import make_plan
from dnsp.parallel.transport import Transport
from tests.ranks import run_ranks


def config(**tree: dict) -> Config:
    return parse_config(tree, "the test")


def test_on_a_cpu() -> None:
    choices, how = make_choices(config())
    assert choices == Choices("flash_cpu", 0)
    assert how.startswith("there and back on 256 tokens: flash_cpu ") and ", plain " in how and how.endswith(" ms")
    assert make_choices(config(parallel={"attention_backend": "plain"})) == (Choices("plain", 0), "")
    assert make_choices(config(model={"pattern": ["gated_delta"]})) == (Choices("auto", 0), "")
    with pytest.raises(PlanError, match="attention_backend=cudnn: it is for cuda tensors, these are on cpu; use auto"):
        make_choices(config(parallel={"attention_backend": "cudnn"}))


def test_a_run_goes_on_with_what_it_had_where_that_works() -> None:
    assert make_choices(config(), Choices("plain").to_dict())[0].attention_backend == "plain"
    assert make_choices(config(), Choices("cudnn", 132).to_dict())[0] == Choices("flash_cpu", 0)  # came from a GPU
    asked = config(parallel={"attention_backend": "flash_cpu"})
    assert make_choices(asked, Choices("plain").to_dict())[0].attention_backend == "flash_cpu"


def chosen_by_ranks() -> tuple[Choices, str]:
    """As a run does it, on ranks that would choose otherwise: on rank 0 alone torch's flash attention is slow."""
    grid = make_grid(timeout=30)
    times = {"flash_cpu": 2e-3, "plain": 1e-3} if grid.rank == 0 else {"flash_cpu": 1e-3, "plain": 2e-3}
    layout = Layout("zigzag", grid.world, 512)
    with patch.object(attention_backends, "_seconds", lambda name, heads, tokens: times[name]):
        made = make_choices(config(), layout=layout) if grid.rank == 0 else None
        choices, how = watchdog.from_first(made)
    plan = make_plan([[0]], layout, grid, attention_backend=choices.attention_backend).agreed()
    q, k, v = (torch.randn(1, plan.local_tokens, 2, 16, requires_grad=True) for _ in range(3))
    attention(q, k, v, plan=plan).sum().backward()
    return choices, how


def refused_by_one() -> str:
    """Rank 1 has not the package that rank 0's choice needs."""
    grid = make_grid(timeout=30)
    missing = (lambda name, heads: "it needs the package flash-attn-3") if grid.rank else (lambda name, heads: None)
    with patch("dnsp.parallel.attention_backends.unusable", missing):
        choices = watchdog.from_first(Choices("flash_cpu") if grid.rank == 0 else None)
        try:
            with watchdog.agreed():
                confirm(choices, config())
        except UsageError as error:
            return str(error)
    return "all began"


def test_what_one_rank_cannot_use_all_refuse() -> None:
    for said in run_ranks(refused_by_one, 2, timeout=60):
        assert said.startswith("attention_backend=flash_cpu: it needs the package flash-attn-3; use auto"), said


def test_bits_that_repeat_hang_on_no_stopwatch() -> None:
    with patch.object(attention_backends, "_seconds", side_effect=AssertionError("timed")):
        assert make_choices(config(engine={"deterministic": True}))[0].attention_backend == "flash_cpu"


def test_a_backend_that_fails_at_length_is_passed_over() -> None:
    def seconds(name: str, heads: object, tokens: int) -> float:
        if name == "flash_cpu":
            raise RuntimeError("no room\nfor it")
        return 1e-3

    with patch.object(attention_backends, "_seconds", seconds):
        choices, how = make_choices(config())
    assert choices.attention_backend == "plain" and "flash_cpu: no room" in how and "for it" not in how


def test_rank_0_times_and_all_take_its_choice() -> None:
    for choices, how in run_ranks(chosen_by_ranks, 2, timeout=60):
        assert choices.attention_backend == "plain"
        assert how == "there and back on 128 tokens: flash_cpu 2 ms, plain 1 ms"


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    settings = config(engine={"dtype": "bf16"}, model={"head_dim": 64})
    choices, how = make_choices(settings)
    assert choices.attention_backend == "cudnn" and choices.multiprocessors > 0
    assert "there and back on" in how and "cudnn " in how and "flash " in how
    assert make_choices(settings, Choices("flash", 7).to_dict())[0] == Choices("flash", 7)
    repeating = config(engine={"dtype": "bf16", "deterministic": True}, model={"head_dim": 64})
    assert make_choices(repeating)[0] == Choices("flash_deterministic", 132)


# Layout, ranks, tokens; heads of keys and of values, their width; type; multiprocessors: tokens of a segment.
SEGMENTS = [
    (("contiguous", 1, 32768), (16, 32, 128), "bf16", 132, 4096),
    (("contiguous", 1, 32768), (16, 16, 128), "bf16", 132, 4096),  # as the op on one GPU
    (("contiguous", 1, 32768), (16, 16, 128), "fp32", 132, 2048),
    (("contiguous", 1, 32768), (16, 16, 64), "bf16", 132, 1024),
    (("contiguous", 1, 32768), (16, 32, 128), "bf16", 33, 16384),
    (("zigzag", 4, 131072), (16, 16, 128), "bf16", 132, 4096),
    (("zigzag", 4, 131072), (16, 32, 128), "bf16", 132, 4096),
    (("zigzag", 8, 131072), (16, 32, 128), "bf16", 132, 2048),
    (("contiguous", 8, 131072), (16, 32, 128), "bf16", 132, 2048),
    (("contiguous", 8, 131072), (16, 32, 128), "bf16", 16, 16384),
]


@pytest.mark.parametrize(("cut", "heads", "dtype", "multiprocessors", "tokens"), SEGMENTS)
def test_segments_that_fill_a_gpu(
    cut: tuple[str, int, int], heads: tuple[int, int, int], dtype: str, multiprocessors: int, tokens: int
) -> None:
    keys, values, width = heads
    model = {"linear_num_key_heads": keys, "linear_num_value_heads": values}
    model |= {"linear_key_head_dim": width, "linear_value_head_dim": width}
    settings = config(model=model, engine={"dtype": dtype})
    assert Choices("auto", multiprocessors).segment_tokens(settings, Layout(*cut)) == tokens


def test_segments_fill_a_gpu_and_fit_the_intervals() -> None:
    heads = {"linear_num_value_heads": 32, "linear_value_head_dim": 128}
    whole = Layout("contiguous", 1, 32768)
    assert Choices("auto", 132).segment_tokens(config(model=heads), whole) == 4096  # 8 segments
    assert Choices("auto", 0).segment_tokens(config(model=heads), whole) is None
    named = config(model=heads, parallel={"segment_tokens": 128})
    assert Choices("auto", 132).segment_tokens(named, whole) == 128
    for kind, ranks, tokens in (("zigzag", 2, 32768), ("zigzag", 64, 2**20), ("contiguous", 4, 4 * 64 * 7)):
        layout = Layout(kind, ranks, tokens)
        segment = Choices("auto", 132).segment_tokens(config(model=heads), layout)
        assert segment is not None and layout.interval_tokens % segment == 0
        make_plan([[0]], layout, Grid(ranks, 0, ranks), segment)


def test_offloading_needs_checkpointing() -> None:
    with pytest.raises(UsageError, match="engine.activation_checkpointing=false keeps everything; set it to true"):
        config(engine={"activation_offloading": True})


def test_states_and_keys_go_by_peer_where_they_can() -> None:
    reachable = make_choices(config(), None, None)[0]
    assert (reachable.transport, reachable.attention_transport) == ("peer", "peer")
    assert make_choices(config(), None, None, several_hosts=True)[0].attention_transport == "ring"
    assert make_choices(config(), reachable.to_dict())[0] == Choices("flash_cpu", 0)  # went by peer, elsewhere
    assert make_choices(config(), Choices("flash_cpu", 0).to_dict(), None)[0].transport == "p2p"  # as it began
    narrow = config(model={"linear_value_head_dim": 24})
    assert make_choices(narrow, None, None)[0].transport == "p2p"
    said = make_choices(narrow, None, None)[0].transports(narrow, None, 0)
    assert said.startswith("states cross ranks by p2p, keys and values by peer (not by peer: states of 32 x 24 have no")
    for section in ({"transport": "peer"}, {"attention_transport": "peer"}):
        with pytest.raises(PlanError, match=f"parallel.{next(iter(section))}=peer: it needs a GPU on every rank; use"):
            make_choices(config(parallel=section))


def test_a_state_that_no_kernel_folds_is_refused_for_peer() -> None:
    wide = config(model={"linear_key_head_dim": 256}, parallel={"transport": "peer"})
    with pytest.raises(PlanError, match="states of 256 x 32 have no kernel that folds them"):
        make_choices(wide, None, None)


NO_ACCESS = "peer access is not supported between these two devices"


def own_gpu_alone(rank: int) -> ExitStack:
    """As if each rank saw one GPU, its own: nothing says that memory cannot be shared, until rank 1 tries."""

    def allocate(words: int, comm: Transport, device: torch.device, shared: bool) -> tuple[None, None]:
        comm.barrier()
        if rank == 1:
            raise RuntimeError(f"CUDA driver error: {NO_ACCESS}")
        return None, None

    patches = ExitStack()
    for name, value in {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.get_device_properties": lambda _: SimpleNamespace(uuid=f"GPU-{rank}"),
        "torch.cuda.is_current_stream_capturing": lambda: False,
        "torch.cuda.synchronize": lambda _: None,
        "torch.cuda.mem_get_info": lambda _: (2**40, 2**40),
        "torch.cuda.Stream": lambda _: None,
        "dnsp.parallel.symmetric._allocate": allocate,
    }.items():
        patches.enter_context(patch(name, value))
    return patches


def settled(section: dict[str, str]) -> tuple[str, str, str, str]:
    """What a rank of two is told, takes, and says."""
    grid, settings = make_grid(timeout=30), config(parallel=section)
    with own_gpu_alone(grid.rank):
        why_not = watchdog.peer_refusal(grid)
        choices = Choices("auto", 0, *choose_transports(settings, {}, why_not))
        began = f"{choices.transport}, {choices.attention_transport}"
        try:
            choices, shared, why_not = settle_transports(choices, settings, grid, [(1, 512)])
        except UsageError as error:
            return began, "", "", str(error)
    plan = make_plan([[0]], Layout("zigzag", grid.world, 512), grid, transport=choices.transport)
    x, gates = torch.randn(1, plan.local_tokens, 2, 16), torch.rand(1, plan.local_tokens, 2)
    delta_rule(x, x, x, -gates, gates, plan=plan, l2norm=True)
    return began, choices.transport, choices.attention_transport, choices.transports(settings, why_not, shared)


FAILED = "rank 1 cannot share {} MiB of memory: CUDA driver error: " + NO_ACCESS
SETTLED = [
    ({}, ("p2p", "ring"), f"states cross ranks by p2p, keys and values by ring (not by peer: {FAILED})"),
    (
        {"attention_transport": "gather"},
        ("p2p", "gather"),
        f"states cross ranks by p2p, keys and values by gather (not by peer: {FAILED})",
    ),
    (
        {"transport": "gather"},
        ("gather", "ring"),
        f"states cross ranks by gather, keys and values by ring (not by peer: {FAILED})",
    ),
]


@pytest.mark.parametrize(("section", "taken", "said"), SETTLED, ids=str)
def test_where_sharing_memory_fails_auto_takes_what_works(
    section: dict[str, str], taken: tuple[str, str], said: str
) -> None:
    """Rank 1 alone fails; all of them take the same, and say why."""
    found = run_ranks(settled, 2, section, timeout=60)
    assert found[0] == found[1] and "peer" in found[0][0]
    assert found[0][1:3] == taken
    assert re.sub(r"\d+ MiB", "{} MiB", found[0][3]) == said


@pytest.mark.parametrize("section", [{"transport": "peer"}, {"attention_transport": "peer"}], ids=str)
def test_where_sharing_memory_fails_peer_is_refused(section: dict[str, str]) -> None:
    for *_, said in run_ranks(settled, 2, section, timeout=60):
        way = "; use p2p and ring (parallel.transport, parallel.attention_transport)"
        assert re.sub(r"\d+ MiB", "{} MiB", said) == f"transport peer: {FAILED}{way}"


def one_group_fails() -> tuple[Choices, int, str | None]:
    grid = make_grid(2, timeout=30)

    def reserve(*given: object) -> int:
        if grid.data_rank == 1:
            raise CannotShare("rank 3 cannot")
        return 4096

    with patch("dnsp.begin.reserve", reserve):
        return settle_transports(Choices("auto", 0, "peer", "peer"), config(), grid, [(1, 512)])


def test_groups_that_could_share_go_with_one_that_cannot() -> None:
    for found in run_ranks(one_group_fails, 4, timeout=60):
        assert found == (Choices("auto", 0, "p2p", "ring"), 0, "rank 3 cannot")


def test_the_budget_of_symmetric_memory_is_worked_out_before_there_is_a_gpu() -> None:
    """By hand: 32 heads of 128 columns are 256 tiles of 2,048 numbers, twice four slots of them; keys and values of
    16,384 tokens, two heads of 256, in fp32 are 64 MiB, in four slots."""
    wide = {"linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "head_dim": 256}
    both = config(model={**wide, "num_key_value_heads": 2}, data={"sequence_length": 65536})
    tiles, message = shared_sizes(both, "peer", "peer", 4, [(1, 65536)])
    assert (tiles, message) == (256, 64 * MIB)
    assert symmetric.bytes_of(256) == 4 * (16 + 4 * 256 + 2 * 4 * 256 * 2048)
    assert post.bytes_of(4, message) == 4 * 64 * MIB + 4 * (16 + 4 * (4 + 8) + 4 * 4)
    _, halo = shared_sizes(both, "peer", "ring", 4, [(1, 65536)])
    assert halo == 4 * 3 * (32 * 256 + 32 * 128)  # three tokens of all channels
    longer = [(8, 512), (1, 65536), (3, 32768)]  # stages: the most rows, and the most tokens at once
    assert shared_sizes(both, "peer", "peer", 4, longer) == (8 * 256, 96 * MIB)
    for none in (("p2p", "ring", 4), ("peer", "peer", 1)):
        assert shared_sizes(both, *none, longer) == (None, None)
    ((name, status, found, _),) = fits._symmetric_memory(both, 4, here=False)
    assert (name, status) == ("symmetric memory", "info") and found.startswith("272 MiB a rank, 16 of them for states")
