"""The engine's gradients are one process's at every stage and grid, and what it keeps comes back whole at any other.

Long because every case shares its ranks, which take long to start.
"""

from __future__ import annotations

import json
import math
import threading
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks

# relative errors against one process at stage 0; weights after a clipped update and moments absolute
TOLERANCE = {"gradient": 2e-5, "norm": 1e-5, "loss": 1e-6, "moments": 1e-6, "weights": 2e-4}
PROBE = {"error": 5e-5, "seconds": 5.0}
ROWS, TOKENS, VOCABULARY, CLIP, LR = 4, 512, 32, 0.05, 1e-2
SLOW = 2.0  # seconds that a disk takes

# stage, optimizer and parameters on the host, recomputation; ranks of a sequence group
CASES = {
    1: [(1, False, False, False, 1)],
    2: [
        *((stage, False, False, False, sequence) for stage in (0, 1, 2, 3) for sequence in (1, 2)),
        (1, True, False, False, 2),
        (2, True, False, True, 1),
        (3, True, True, True, 2),
    ],
    4: [(0, False, False, False, 2), (2, True, False, False, 2), (3, False, False, True, 4), (3, True, True, False, 2)],
}
# options of DeepSpeed's that change a gradient: stage, options, got over wanted with two ranks in a group
BREAKING = [
    (3, {"zero_optimization": {"reduce_scatter": False}}, 2.0),
    (1, {"data_types": {"grad_accum_dtype": "bf16"}}, None),
    (3, {"data_types": {"grad_accum_dtype": "bf16"}}, None),
]
# DeepSpeed leaves parameters below 100,000 elements whole on every rank; these shall be in shards too
SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def settings(stage: int, host: bool = False, away: bool = False, recompute: bool = False, **engine: Any) -> Any:
    from dnsp.config import parse_config

    return parse_config(
        {
            "model": {
                "vocab_size": VOCABULARY,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "pattern": ["gated_delta", "attention"],
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 16,
                "linear_num_key_heads": 1,
                "linear_num_value_heads": 2,
                "linear_key_head_dim": 16,
                "linear_value_head_dim": 16,
            },
            "engine": {
                "zero_stage": stage,
                "offload_optimizer": host,
                "offload_parameters": away,
                "activation_checkpointing": recompute,
                **{"deepspeed": SHARDED, **engine},
            },
            "train": {"global_batch": ROWS, "clip": CLIP},
        },
        "the test",
    )


def make(config: Any, sequence: int, timeout: float = 30.0) -> Any:
    from dnsp.engine import Engine
    from dnsp.model.decoder import Decoder
    from dnsp.parallel.grid import make_grid

    grid = make_grid(sequence, timeout)
    torch.manual_seed(0)
    model = Decoder(config.model, config.engine.activation_checkpointing, hollow=config.engine.zero_stage == 3)
    return Engine(model, config, grid, ROWS // grid.data_size)


def take_step(engine: Any, lr: float = LR) -> dict[str, Any]:
    """One step on the same rows whatever the grid: loss, gradients after the reduction, norm before the clipping.

    ZeRO 1 and 3 have them zigzag, 0 and 2 contiguous.
    """
    from dnsp.parallel.layout import KINDS, Layout
    from dnsp.parallel.plan import make_plan

    grid = engine.grid
    layout = Layout(KINDS[engine.stage % 2], grid.sequence_size, TOKENS)
    draw = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(0, VOCABULARY, (ROWS, TOKENS), generator=draw)
    targets_BT = torch.randint(0, VOCABULARY, (ROWS, TOKENS), generator=draw)
    loss = torch.zeros((), dtype=torch.float64)
    for micro in range(engine.accumulation):
        row = micro * grid.data_size + grid.data_rank
        plan = make_plan([[0, 100]], layout, grid, 64)
        local = plan.local(tokens_BT[row : row + 1]), plan.local(targets_BT[row : row + 1])
        loss += engine.backward(*local, plan, ROWS * TOKENS)
        if micro + 1 < engine.accumulation:
            engine.advance()
    gradients = {name: grad.clone() for name, grad in engine.gradients().items()}
    norm = engine.step(lr)
    dist.all_reduce(loss)
    return {"loss": loss, "gradients": gradients, "norm": norm}


def whole(engine: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Weights and moments put together from all ranks' fragments; every element must be there exactly once."""
    mine = [(f.name, f.start, {what: x.clone() for what, x in f.tensors.items()}) for f in engine.fragments()]
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    shapes = engine.shapes()
    kinds = ("weights", "exp_avg", "exp_avg_sq")
    found = {what: {n: torch.full((math.prod(s),), math.nan) for n, s in shapes.items()} for what in kinds}
    for name, start, tensors in (fragment for rank in ranks for fragment in rank):
        for what, x in tensors.items():
            assert bool(found[what][name][start : start + x.numel()].isnan().all()), f"{name} twice"
            found[what][name][start : start + x.numel()] = x
    assert not any(x.isnan().any() for tensors in found.values() for x in tensors.values())
    return found


def all_cases(cases: list[Any], folder: str) -> list[dict[str, Any]]:
    """Two steps of every case in one start; the state of the first is saved, and the second done again from it."""
    from dnsp import checkpoint
    from dnsp.config import CheckpointConfig
    from dnsp.probe import probe
    from dnsp.saving import Saver

    found = []
    for number, (*options, sequence) in enumerate(cases):
        config = settings(*options)
        engine = make(config, sequence)
        untouched = whole(engine)
        proven = probe(engine, config)
        same = all(untouched[what][n].equal(x) for what, tensors in whole(engine).items() for n, x in tensors.items())
        first = take_step(engine)
        state = whole(engine)
        saver = Saver(Path(folder, str(dist.get_world_size()), str(number)), engine, CheckpointConfig())
        saver.save(1, {})
        second = take_step(engine)
        after = whole(engine)
        saved = saver.wait()
        dist.barrier()
        back = make(config, sequence)
        back.load(checkpoint.read(checkpoint.checkpoints(saver.folder)[-1]), weights=True)
        again = take_step(back)
        equal = all(again["gradients"][n].equal(g) for n, g in second["gradients"].items())
        equal = equal and all(after[w][n].equal(x) for w, xs in whole(back).items() for n, x in xs.items())
        found.append(
            {
                **first,
                "state": state,
                "repeats": equal and again["norm"] == second["norm"],
                "probe": proven,
                "probe changes nothing": same,
                "saved": saved,
                "memory": engine.memory(),
                "parameters": sum(math.prod(shape) for shape in engine.shapes().values()),
                "dtypes": {str(x.dtype) for f in engine.fragments() for x in f.tensors.values()},
            }
        )
    return found


def one_process() -> dict[str, Any]:
    engine = make(settings(0), 1)
    return {**take_step(engine), "state": whole(engine)}


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("world", sorted(CASES))
def test_a_step_is_the_single_process_step_and_its_state_comes_back(world: int, tmp_path: Path) -> None:
    from dnsp.memory import model_bytes

    (truth,) = run_ranks(one_process, 1)
    ranks = run_ranks(all_cases, world, CASES[world], str(tmp_path), timeout=360)
    for number, (*options, _) in enumerate(CASES[world]):  # what doctor says that a rank keeps of the model
        expected = model_bytes(ranks[0][number]["parameters"], settings(*options).engine, world)
        for what in ranks[0][number]["memory"]:
            together = sum(cases[number]["memory"][what] for cases in ranks)
            assert together == world * (expected[what].device + expected[what].host), (world, options, what)
    for rank, cases in enumerate(ranks):
        for options, found in zip(CASES[world], cases, strict=True):
            case = (world, rank, options)
            for name, want in truth["gradients"].items():
                error = float((found["gradients"][name] - want).norm() / want.norm())
                assert error < TOLERANCE["gradient"], (case, name, error)
            assert abs(found["norm"] / truth["norm"] - 1) < TOLERANCE["norm"], case
            assert truth["norm"] > 2 * CLIP  # it was clipped
            assert abs(found["loss"] / truth["loss"] - 1) < TOLERANCE["loss"], case
            for what, tensors in truth["state"].items():
                limit = TOLERANCE["weights" if what == "weights" else "moments"]
                for name, want in tensors.items():
                    assert (found["state"][what][name] - want).abs().max() < limit, (case, what, name)
            assert found["repeats"], case
            assert found["saved"].error == "", case
            assert found["probe"].error < PROBE["error"] and found["probe"].seconds < PROBE["seconds"], case
            assert found["probe changes nothing"], case
            assert found["dtypes"] == {"torch.float32"}, case


def every_probe() -> list[tuple[tuple[int, int, str], float]]:
    """Every stage, size of a sequence group and layout of this world: the worst parameter's error."""
    from dnsp.config import ParallelConfig
    from dnsp.probe import probe

    world, found = dist.get_world_size(), []
    for size, stage, layout in product((1, 2, 4), range(4), ("contiguous", "zigzag")):
        if world % size == 0:
            parallel = ParallelConfig(sequence=size, layout=layout)  # type: ignore[arg-type]
            config = settings(stage).model_copy(update={"parallel": parallel})
            proven = probe(make(config, size), config)
            found.append(((size, stage, layout), proven.error))
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("world", [2, 4])
def test_the_probe_holds_at_every_stage_size_and_layout(world: int) -> None:
    for cases in run_ranks(every_probe, world, timeout=280):
        assert len(cases) == {2: 16, 4: 24}[world]
        for case, error in cases:
            assert error < PROBE["error"], (world, case, error)


def test_gradients_that_are_not_finite_are_no_fault_of_the_reduction() -> None:
    """A layer that diverges on the probe's tokens is the run's to name; the rest of its gradients is compared."""
    from dnsp.probe import BUCKETS, _judge

    want = torch.ones(2, BUCKETS, dtype=torch.float64)
    want[0, 3], want[0, 4] = float("nan"), float("inf")
    assert _judge(["a", "b"], want.clone(), want, 0.0).ok
    for row, column in ((1, 3), (0, 5), (0, 3)):  # the last: finite on one side alone
        got = want.clone()
        got[row, column] = 2.0
        found = _judge(["a", "b"], got, want, 0.0)
        assert not found.ok and found.name == "ab"[row], (row, column)


def as_the_run_does() -> tuple[float, list[tuple[str, str]], str]:
    """The probe's error, how its layers' messages cross ranks, and what it says where one did not arrive."""
    from dnsp import probe, watchdog
    from dnsp.choices import Choices
    from dnsp.parallel.errors import PeerLost

    config, ways = settings(1), []
    engine = make(config, 2)
    choices = Choices(transport="gather", attention_transport="gather")  # both are auto in the configuration
    engine.model.model.layers[0].register_forward_pre_hook(
        lambda _, given: ways.extend((x.scan.kind, x.attention_transport) for x in given if hasattr(x, "scan"))
    )
    error = probe.probe(engine, config, choices).error

    def lost() -> None:
        raise PeerLost(dist.get_rank(), None, "a scan", "it is late")

    with patch.object(watchdog, "check_peers", lost), pytest.raises(PeerLost) as late:
        probe.probe(engine, config, choices)
    return error, ways, str(late.value)


@pytest.mark.slow
def test_the_probe_goes_by_the_transports_of_the_run() -> None:
    for rank, (error, ways, late) in enumerate(run_ranks(as_the_run_does, 2)):
        assert error < PROBE["error"] and set(ways) == {("gather", "gather")}
        assert late == f"rank {rank} lost a rank of its group during a scan: it is late"


def broken(stage: int, options: dict[str, Any]) -> str:
    from dnsp.errors import UsageError
    from dnsp.probe import probe

    config = settings(stage, deepspeed=options)
    try:
        # where one rank alone cannot read its gradients, the other waits for it in vain
        return f"passed: {probe(make(config, 2, timeout=5.0), config)}"
    except UsageError as error:
        return str(error)


def all_broken() -> list[str]:
    others = {"zero_optimization": {"round_robin_gradients": True}}, {"sparse_gradients": True}
    return [broken(stage, options) for stage, options, _ in BREAKING] + [broken(2, options) for options in others]


def in_bf16() -> dict[str, Any]:
    """ZeRO 3 under bf16: what the forward sees of A_log, dt_bias and the norms, and what the optimizer keeps."""
    from dnsp.probe import probe

    config = settings(3, dtype="bf16")
    engine = make(config, 2)
    seen: dict[str, torch.dtype] = {}
    layer = engine.model.model.layers[0]
    layer.linear_attn.register_forward_pre_hook(
        lambda module, _: seen.update(A_log=module.A_log.dtype, dt_bias=module.dt_bias.dtype)
    )
    layer.input_layernorm.register_forward_pre_hook(lambda module, _: seen.update(norm=module.weight.dtype))
    proven = probe(engine, config)
    take_step(engine)
    kept = {x.dtype for f in engine.fragments() for x in f.tensors.values()}
    return {"seen": {name: str(dtype) for name, dtype in seen.items()}, "kept": kept, "error": proven.error}


def skipping() -> bool:
    """A skipped step leaves weights and moments as they were, at every stage; so does a norm that is not finite, for
    one element of one rank's gradient."""
    same = True
    for stage, host in ((0, False), (1, False), (2, True), (3, False), (3, True)):
        engine = make(settings(stage, host), 2)
        take_step(engine)
        before = whole(engine)
        for value in (math.nan, math.inf):
            hurt = engine.names["model.embed_tokens.weight"].register_hook(
                lambda grad, value=value: grad.index_fill(0, torch.tensor([3]), value) if dist.get_rank() else grad
            )
            norm = take_step(engine)["norm"]
            hurt.remove()
            kept = whole(engine)
            same = same and not math.isfinite(norm)
            same = same and all(before[w][n].equal(x) for w, xs in kept.items() for n, x in xs.items())
        original, engine.step = engine.step, lambda lr, engine=engine: engine.skip() or 0.0
        take_step(engine)
        engine.step = original
        changed = whole(engine)
        same = same and all(before[w][n].equal(x) for w, xs in changed.items() for n, x in xs.items())
        moved = take_step(engine)
        same = same and moved["norm"] > 0 and not whole(engine)["weights"]["model.norm.weight"].equal(
            before["weights"]["model.norm.weight"]
        )
    return same


def waited_in_a_forward(stage: int) -> float:
    """Seconds, in groups of one rank: nothing but ZeRO 3's weights is communicated."""
    from dnsp.parallel.layout import Layout
    from dnsp.parallel.plan import make_plan
    from dnsp.parallel.waits import WAITS

    engine = make(settings(stage), 1)
    tokens = torch.zeros(1, TOKENS, dtype=torch.long)
    plan = make_plan([[0]], Layout("zigzag", 1, TOKENS), engine.grid, 64)
    WAITS.take()
    WAITS.on = True
    engine.deepspeed(tokens, tokens, plan)
    WAITS.on = False
    return WAITS.take()[0]


def reduced_beside_the_backward(stage: int) -> int:
    """Reductions that DeepSpeed has begun when the gradients of the first layer, the last to come, are there. As on a
    GPU: that its stages 1 to 3 reduce from the backward's own hooks is what the generated ``overlap_comm`` asks for."""
    from dnsp.deepspeed_json import deepspeed_config

    assert deepspeed_config(settings(stage), 1, on_gpu=True)["zero_optimization"]["overlap_comm"]
    small = {**SHARDED["zero_optimization"], "reduce_bucket_size": 4000, "overlap_comm": True}
    engine = make(settings(stage, deepspeed={"zero_optimization": small}), 1)
    method = "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads" if stage == 3 else "reduce_ipg_grads"
    reduce, counts = getattr(engine.optimizer, method), {"in all": 0, "before": 0, "early": 0}

    def counted(*arguments: Any, **options: Any) -> Any:
        counts["in all"] += 1
        return reduce(*arguments, **options)

    def the_forward_begins(*_: Any) -> None:  # of each micro-batch
        counts["before"] = counts["in all"]

    def the_backward_ends(_: torch.Tensor) -> None:
        counts["early"] = counts["in all"] - counts["before"]

    setattr(engine.optimizer, method, counted)
    engine.deepspeed.register_forward_pre_hook(the_forward_begins)
    engine.names["model.layers.0.input_layernorm.weight"].register_hook(the_backward_ends)
    take_step(engine)
    return counts["early"]


def two_ranks() -> dict[str, Any]:
    waited = [waited_in_a_forward(stage) for stage in (1, 3)]
    beside = [reduced_beside_the_backward(stage) for stage in (1, 2, 3)]
    return {"broken": all_broken(), "bf16": in_bf16(), "skipping": skipping(), "waited": waited, "beside": beside}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_breaks_the_contract_is_refused_and_what_is_fp32_stays_so() -> None:
    for found in run_ranks(two_ranks, 2, timeout=280):
        *refused, unread, removed = found["broken"]
        assert "with engine.deepspeed={'zero_optimization': {'round_robin_gradients'" in unread, unread
        assert "DeepSpeed refuses engine.deepspeed={'sparse_gradients': True}: " in removed, removed
        for (stage, options, ratio), said in zip(BREAKING, refused, strict=True):
            assert "the gradient of model.embed_tokens.weight after DeepSpeed's reduction is" in said, said
            assert f"engine.deepspeed={options}" in said and f"ZeRO {stage}" in said
            if ratio is not None:
                assert f"is {ratio:.6g} times one process's" in said
        bf16 = found["bf16"]
        assert bf16["seen"] == dict.fromkeys(("A_log", "dt_bias", "norm"), "torch.float32")
        assert bf16["kept"] == {torch.float32} and bf16["error"] < PROBE["error"]
        assert found["skipping"]
        assert found["waited"][0] == 0 < found["waited"][1]
        assert min(found["beside"]) > 0, found["beside"]


def saving(folder: str) -> dict[str, Any]:
    """Two saves of a real engine on a disk that takes as long as it is told to, training going on beside the first."""
    from dnsp import checkpoint
    from dnsp.config import CheckpointConfig
    from dnsp.saving import Saver

    go_on, name = threading.Event(), "model.norm.weight"
    engine = make(settings(1), 1)
    take_step(engine)
    before = whole(engine)["weights"][name]
    saver = Saver(Path(folder), engine, CheckpointConfig())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "sync", lambda path: go_on.wait(60))
        saver.save(1, {})  # the first, too, returns while nothing is written
        unwritten = not go_on.is_set() and not checkpoint.checkpoints(saver.folder) and not saver.news()
        take_step(engine)
        threading.Timer(SLOW, go_on.set).start()
        saver.save(2, {})
        saver.wait()
    first, second = checkpoint.checkpoints(saver.folder)
    return {
        "unwritten": unwritten,
        "as it was": checkpoint.read(first).read("weights", name).equal(before),
        "as it is": checkpoint.read(second).read("weights", name).equal(whole(engine)["weights"][name]),
        "said": saver.news(),
        "logged": [json.loads(line) for line in (saver.folder / "checkpoints.jsonl").read_text().splitlines()],
    }


def test_training_stands_still_for_the_copy_alone_and_for_the_save_before(tmp_path: Path) -> None:
    (found,) = run_ranks(saving, 1, str(tmp_path))
    assert found["unwritten"] and found["as it was"] and found["as it is"]
    assert all("training stood still for" in line for line in found["said"]) and len(found["said"]) == 2
    first, second = found["logged"]
    assert first["write_s"] > SLOW > first["held_s"]  # what it waited for is not the writing
    assert second["held_s"] >= second["waited_s"] > 0.9 * SLOW  # but a second save waits for the first, and counts that
    assert "of them for the save before" in found["said"][1] and "of them" not in found["said"][0]


def without_memory(folder: str) -> list[str]:
    """Rank 1 has no memory to write its files with, then has some, then none for the copy, then some. What is said."""
    from dnsp import saving
    from dnsp.config import CheckpointConfig
    from dnsp.saving import Saver

    def none(*_: Any, **__: Any) -> None:
        raise MemoryError("cannot allocate")

    def none_for_the_copy(*size: Any, zeros: Any = torch.zeros, **how: Any) -> torch.Tensor | None:
        return none() if "pin_memory" in how else zeros(*size, **how)

    engine = make(settings(1), 1)
    take_step(engine)
    saver = Saver(Path(folder), engine, CheckpointConfig())
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(saving, "save_file", none)
        saver.save(1, {})
        saver.wait()
    said = saver.news()
    saver.save(2, {})
    saver.wait()
    said += saver.news()
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(torch, "zeros", none_for_the_copy)
        another = Saver(Path(folder), engine, CheckpointConfig())
        another.wait()
        another.save(3, {})
        another.wait()
    said += another.news()
    another.save(4, {})
    another.wait()
    return said + another.news()


def apart(folder: str) -> list[str]:
    """Rank 1 writes onto a disk of its own, as on a node that has lost the shared one. What is said, and is there."""
    from dnsp import checkpoint
    from dnsp.config import CheckpointConfig
    from dnsp.saving import Saver

    saver = Saver(Path(folder, "alone" if dist.get_rank() else ""), make(settings(1), 1), CheckpointConfig())
    saver.save(1, {})
    saver.wait()
    return saver.news() + [path.name for path in checkpoint.checkpoints(saver.folder)]


def broken_copy(folder: str) -> str:
    """The memory for the copy fails, and not for lack of it: what the save that needs it raises."""
    from dnsp.config import CheckpointConfig
    from dnsp.saving import Saver

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("an illegal memory access")

    engine = make(settings(1), 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "zeros", fail)
        saver = Saver(Path(folder), engine, CheckpointConfig())
        try:
            saver.save(1, {})
        except RuntimeError as error:
            return str(error)
    return "saved"


@pytest.mark.slow
def test_a_rank_without_memory_to_save_with_holds_nobody_up(tmp_path: Path) -> None:
    said, _ = run_ranks(without_memory, 2, str(tmp_path))
    assert len(said) == 4 and said[1].startswith("step 2: checkpoint of"), said
    assert said[3].startswith("step 4: checkpoint of"), said
    none = "there is no earlier checkpoint"
    assert said[0] == f"NOT SAVED: the checkpoint of step 1 (rank 1: cannot allocate); {none}, the run goes on"
    assert "step 3 (rank 1: the host has no memory for the copy: cannot allocate); the last checkpoint is" in said[2]


@pytest.mark.slow
def test_files_that_rank_0_does_not_see_are_no_checkpoint(tmp_path: Path) -> None:
    (said,), none = run_ranks(apart, 2, str(tmp_path))
    assert not none
    assert said.startswith("NOT SAVED: the checkpoint of step 1 (rank 0 does not see weights-00001-of-00002"), said
    assert "there is no earlier checkpoint" in said


def test_another_failure_is_not_called_lack_of_memory(tmp_path: Path) -> None:
    assert run_ranks(broken_copy, 1, str(tmp_path)) == ["an illegal memory access"]


def test_ranks_that_share_gpus_ask_deepspeed_for_those_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    from dnsp.engine import number_devices
    from dnsp.launch.environment import Environment
    from dnsp.watchdog import take_device

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    accelerator = CUDA_Accelerator()
    number_devices(accelerator)
    number_devices(accelerator)  # verify makes an engine for each stage
    names = [accelerator.device_name(rank) for rank in ("0", "1", "2", "7", 0, None)]
    assert names == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0", "cuda"]
    # stages 0 to 2 stay on the device that the rank has taken, ZeRO 3 asks for that of LOCAL_RANK
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    for rank in range(5):
        place = Environment("local", rank, 5, rank, 5, "127.0.0.1", 0)
        take_device(place)
        assert accelerator.device_name(place.variables()["LOCAL_RANK"]) == f"cuda:{taken[-1]}"
    assert taken == [0, 1, 0, 1, 0]
