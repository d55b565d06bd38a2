"""What a run chooses once, and keeps."""

from __future__ import annotations

import pytest

from dnsp.choices import Choices, make_choices
from dnsp.config import Config, parse_config
from dnsp.errors import UsageError
from dnsp.parallel.errors import PlanError
from dnsp.parallel.grid import Grid
from dnsp.parallel.layout import Layout
from dnsp.parallel.plan import make_plan


def config(**tree: dict) -> Config:
    return parse_config(tree, "the test")


def test_on_a_cpu() -> None:
    assert make_choices(config()) == (Choices("flash_cpu", 0), "")
    assert make_choices(config(parallel={"attention_backend": "plain"})) == (Choices("plain", 0), "")
    assert make_choices(config(model={"pattern": ["gated_delta"]})) == (Choices("auto", 0), "")
    with pytest.raises(PlanError, match="attention_backend=cudnn: it is for cuda tensors, these are on cpu; use auto"):
        make_choices(config(parallel={"attention_backend": "cudnn"}))


def test_a_run_goes_on_with_what_it_had_where_that_works() -> None:
    assert make_choices(config(), Choices("plain").to_dict())[0].attention_backend == "plain"
    assert make_choices(config(), Choices("cudnn", 132).to_dict())[0] == Choices("flash_cpu", 0)  # came from a GPU
    asked = config(parallel={"attention_backend": "flash_cpu"})
    assert make_choices(asked, Choices("plain").to_dict())[0].attention_backend == "flash_cpu"


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    settings = config(engine={"dtype": "bf16"}, model={"head_dim": 64})
    choices, why = make_choices(settings)
    assert (choices.attention_backend, why) == ("cudnn", "") and choices.multiprocessors > 0
    assert make_choices(settings, Choices("flash", 7).to_dict())[0] == Choices("flash", 7)
    repeating = config(engine={"dtype": "bf16", "deterministic": True}, model={"head_dim": 64})
    assert make_choices(repeating)[0] == Choices("flash_deterministic", 132)


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
