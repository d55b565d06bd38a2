"""ZeRO 3 begins with the weights of every other stage, and no rank ever holds the whole model for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks

WORLD, LAYERS = 2, 24
HELD = 0.75  # of the whole model's bytes, at most, in a rank of two that keeps half of them


def config(stage: int, tied: bool = True, layers: int = LAYERS, hidden: int = 512) -> Any:
    from dnsp.config import parse_config

    return parse_config(
        {
            "model": {
                "vocab_size": 97,
                "hidden_size": hidden,
                "intermediate_size": 2 * hidden,
                "num_hidden_layers": layers,
                "pattern": ["gated_delta", "attention", "deltanet", "linear_attention"],
                "head_dim": 16,
                "tie_word_embeddings": tied,
            },
            "engine": {"zero_stage": stage},
        },
        "the test",
    )


def peak() -> int:
    """The most that this process has held, bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def started() -> dict[str, Any]:
    """A hollow model filled on each rank: what it took, and on rank 0 all weights, of tied and untied embeddings."""
    from dnsp.deepspeed_json import deepspeed_config
    from dnsp.engine import Engine, fill_in_shards
    from dnsp.model.decoder import Decoder
    from dnsp.parallel.grid import make_grid

    grid = make_grid(1)
    found: dict[str, Any] = {}
    small = [config(3, tied, layers=4, hidden=64) for tied in (True, False)]
    for settings in small:  # the first also brings in everything that is imported late
        torch.manual_seed(7)
        engine = Engine(Decoder(settings.model, hollow=True), settings, grid, 1)
        decayed = [len(group["params"]) for group in engine.model.param_groups(0.1)]
        found[f"tied {settings.model.tie_word_embeddings}"] = (engine.whole_weights(), torch.rand(()), decayed)
    # other weights than are drawn: rank 0's count
    ours = {n: x + 1 for n, x in Decoder(small[0].model).named_parameters()} if grid.rank == 0 else None
    given = Engine(Decoder(small[0].model, hollow=True), small[0], grid, 1, weights=ours).whole_weights()
    found["given"] = all(given[n].equal(x) for n, x in ours.items()) if ours else not given

    large = config(3)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = peak()
    model = Decoder(large.model, hollow=True)
    fill_in_shards(model, deepspeed_config(large, 1, False), grid)
    found["held"] = peak() - before
    found["whole"] = sum(4 * p.ds_numel for p in model.parameters())
    return found


@pytest.mark.slow
def test_a_rank_never_holds_the_whole_model_and_begins_with_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from dnsp.model.decoder import Decoder

    # glibc gives back at once what it has mapped, from 32 MiB on at the latest: here, as for large models, all weights
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    first, *others = run_ranks(started, WORLD, fresh=True)
    for tied in (True, False):
        settings = config(0, tied, layers=4, hidden=64)
        torch.manual_seed(7)
        want = Decoder(settings.model)
        weights, drawn_next, groups = first[f"tied {tied}"]
        assert weights.keys() == dict(want.named_parameters()).keys()
        assert all(weights[name].equal(p) for name, p in want.named_parameters())
        assert drawn_next == torch.rand(())  # and so is all that is drawn later
        assert groups == [len(group["params"]) for group in want.param_groups(0.1)]
    for rank in (first, *others):
        assert rank["given"]
        assert rank["whole"] > 100e6
        share = rank["held"] / rank["whole"]
        assert share < HELD, share
