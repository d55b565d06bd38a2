"""doctor CONFIG: whether a configuration can run here, and DeepSpeed's options that contradict it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dnsp import engine, fits
from dnsp.begin import check_kernels
from dnsp.cli import main
from dnsp.config import EngineConfig, load_config
from dnsp.errors import UsageError
from dnsp.memory import Held, model_bytes


def findings(workplace: Path, out: Path, *arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    status = main(["doctor", str(workplace / "tiny.yaml"), *arguments, "--json", str(out)])
    report = json.loads(out.read_text())
    assert report["ok"] == (status == 0)
    return status, {f["name"]: f for f in report["findings"] if f["section"] == "configuration"}


def test_a_configuration_that_fits(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = findings(workplace, tmp_path / "doctor.json", "--ranks", "2")
    assert status == 0
    assert rows["ranks"]["found"].startswith("1 x 2 (data x sequence)")
    assert {row["status"] for row in rows.values()} <= {"ok", "warn"}
    assert "configuration" in capsys.readouterr().out


HUGE = ("model.hidden_size=65536", "model.intermediate_size=65536", "model.num_hidden_layers=8")
# overrides, which row is missing, what it says, and the way out
CANNOT = [
    (("--ranks", "3", "parallel.sequence=2"), "ranks", "parallel.sequence=2 does not divide 3 ranks", "multiple of 2"),
    (("--ranks", "2", "parallel.sequence=1"), "ranks", "train.global_batch=1 is not a multiple", "use a multiple of 2"),
    (("data.sources=[{path: nowhere/at-all}]",), "data", "nowhere/at-all", ""),
    (("data.sequence_length=100000000",), "data", "100,000,000", ""),
    (("data.tokenizer=./nowhere",), "tokenizer", "./nowhere", ""),
    (("init_from=run:nowhere",), "settings", "nowhere", ""),
    (HUGE, "memory", "GiB", "take more ranks"),
    (HUGE, "disk", "checkpoints of", "make room"),
]


@pytest.mark.parametrize(("arguments", "row", "found", "cure"), CANNOT, ids=[f"{c[1]} {c[0][0]}" for c in CANNOT])
def test_what_cannot_run(
    workplace: Path, tmp_path: Path, arguments: tuple[str, ...], row: str, found: str, cure: str
) -> None:
    status, rows = findings(workplace, tmp_path / "doctor.json", *arguments)
    assert status == 1
    assert rows[row]["status"] == "missing"
    assert found in rows[row]["found"] + rows[row]["cure"] and cure in rows[row]["cure"] and rows[row]["cure"]


FOUR = ("parallel.sequence=2", "train.global_batch=2")
NEEDS = "it needs a GPU on every rank"
DEAF = "rank 1: ranks of a host write each other's memory, and GPU 1 cannot reach GPU 3's"
# ranks, settings, GPUs here, pairs of them that are deaf, and why peer cannot be had; None: it can, or it need not be
NOT_BY_PEER = [
    (2, ("parallel.transport=peer",), 0, (), f"parallel.transport=peer: rank 0: {NEEDS}"),
    (1, ("parallel.transport=peer",), 0, (), f"parallel.transport=peer: {NEEDS}"),
    (2, ("parallel.attention_transport=peer",), 0, (), f"parallel.attention_transport=peer: rank 0: {NEEDS}"),
    (2, (), 0, (), None),
    (4, ("parallel.transport=peer",), 4, ((1, 3),), f"parallel.transport=peer: {DEAF}"),
    (2, ("parallel.transport=peer",), 4, ((1, 3),), None),
    (4, ("parallel.transport=peer", *FOUR), 4, ((1, 3),), None),
    (4, ("parallel.transport=peer",), 2, (), None),  # two ranks a GPU
    (4, (), 4, ((1, 3),), None),
]


@pytest.mark.parametrize(("ranks", "settings", "gpus", "deaf", "said"), NOT_BY_PEER)
def test_peer_that_is_asked_for_and_cannot_be_had_is_missing(
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    ranks: int,
    settings: tuple[str, ...],
    gpus: int,
    deaf: tuple[tuple[int, int], ...],
    said: str | None,
) -> None:
    """In the words of ``dnsp train``."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *pair: pair not in deaf)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 2**30))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 * 2**30, 80 * 2**30))
    monkeypatch.setenv("DNSP_DELTA_RULE", "triton")
    monkeypatch.setenv("DNSP_LIGER", "0")
    config = load_config(workplace / "tiny.yaml", list(settings))
    rows = {name: row for name, *row in fits.examine(config, ranks, here=True)}
    row = rows.get("symmetric memory")
    if said:
        assert row is not None and row[:2] == ["missing", said] and row[2].startswith("use auto, ")
    elif settings:
        assert row is not None and row[0] == "ok" and "are free for it" in row[1], rows
    else:
        assert row is None  # by p2p
    elsewhere = [status for name, status, *_ in fits.examine(config, ranks, here=False) if name == "symmetric memory"]
    assert elsewhere in ([], ["info"])  # what other hosts have is not known


@pytest.mark.parametrize(
    ("settings", "status", "cure"),
    [
        ((), "warn", "none needed: the run takes p2p and ring"),
        (("parallel.attention_transport=peer",), "missing", "parallel.transport=p2p parallel.attention_transport=ring"),
    ],
)
def test_a_gpu_without_room_to_share(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...], status: str, cure: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**20, 80 * 2**30))
    monkeypatch.setenv("DNSP_DELTA_RULE", "triton")
    ((_, *row),) = fits._symmetric_memory(load_config(workplace / "tiny.yaml", list(settings)), 2, here=True)
    assert row[0] == status and row[1].endswith("; 0 are free for it") and row[2].startswith(cure)


LESS_GATHERED = "engine.deepspeed={zero_optimization: {stage3_max_live_parameters: 100000000}}"
# GiB that are free for four ranks together, settings: the status, and the way out. 1.6 billion parameters are 6.0 GiB:
# a rank keeps about 24 of them (weights, gradients, two moments), 16.9 at stage 1, 12.4 at 2, 11.6 at 3 (3.7 gathered)
ROOMS = [
    (110, (), "ok", ""),
    (80, (), "missing", "engine.zero_stage=1 would fit"),
    (60, (), "missing", "engine.zero_stage=2 would fit"),
    (60, ("engine.zero_stage=2",), "ok", ""),
    (53, ("engine.zero_stage=2",), "missing", "engine.zero_stage=3 would fit"),
    (40, ("engine.zero_stage=3",), "missing", "take more ranks"),
    (40, ("engine.zero_stage=3", LESS_GATHERED), "ok", ""),
]


@pytest.mark.parametrize(("free", "settings", "status", "cure"), ROOMS)
def test_memory_by_stage(
    workplace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    free: float,
    settings: tuple[str, ...],
    status: str,
    cure: str,
) -> None:
    monkeypatch.setattr(fits.psutil, "virtual_memory", lambda: SimpleNamespace(total=2**40, available=free * 2**30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    wide = ("model.hidden_size=1024", "model.intermediate_size=65536", "model.num_hidden_layers=8")
    four = ("--ranks", "4", "train.global_batch=4", "parallel.sequence=1")
    _, rows = findings(workplace, tmp_path / "doctor.json", *four, *wide, *settings)
    assert rows["memory"]["status"] == status and cure in rows["memory"]["cure"], rows["memory"]


def test_what_is_away_is_on_the_host() -> None:
    engine = EngineConfig(zero_stage=3, offload_optimizer=True, offload_parameters=True)
    held = model_bytes(10**9, engine, 8)
    assert held["parameters"] == held["gradients"] == Held(0, 0.5e9)
    assert held["moments and master weights"] == Held(0, 1.5e9)
    assert held["gathered layers"] == Held(4e9)  # what DeepSpeed leaves gathered, and that can be said to it
    fewer = engine.model_copy(update={"deepspeed": {"zero_optimization": {"stage3_max_live_parameters": 10**8}}})
    assert model_bytes(10**9, fewer, 8)["gathered layers"] == Held(0.4e9)


def test_a_folder_that_holds_a_run(workplace: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    status, rows = findings(workplace, tmp_path / "doctor.json", f"run.dir={run}")
    assert status == 1 and "holds a run already" in rows["run folder"]["found"]
    assert findings(workplace, tmp_path / "doctor.json", f"run.dir={run}", "resume=auto")[0] == 0


CONTRADICTIONS = [
    (["engine.deepspeed.gradient_clipping=0.5"], ["engine.deepspeed.gradient_clipping=0.5", "train.clip=1.0"]),
    (["engine.deepspeed.zero_optimization.stage=1"], ["zero_optimization.stage=1", "engine.zero_stage=0"]),
    (["engine.deepspeed.train_batch_size=8"], ["train_batch_size=8", "train.global_batch=1"]),
    (["engine.deepspeed.train_micro_batch_size_per_gpu=2"], ["micro_batch_size_per_gpu=2", "train.micro_batch=1"]),
    (["engine.deepspeed.bf16.enabled=true"], ["bf16={'enabled': True}", "engine.dtype='fp32'"]),
    (["engine.deepspeed.bfloat16.enabled=true"], ["bfloat16={'enabled': True}", "engine.dtype='fp32'"]),
    (["engine.deepspeed.zero_optimization.cpu_offload=true"], ["cpu_offload=True", "engine.offload_optimizer=False"]),
    (["engine.deepspeed.gradient_accumulation_steps=4"], ["gradient_accumulation_steps=4", "train.global_batch"]),
    (["engine.deepspeed.optimizer.type=Lamb"], ["optimizer={'type': 'Lamb'}", "train.lr"]),
    (
        ["engine.deepspeed.train_batch_size=1", "train.stages=[{sequence_length: 512, tokens: 9, global_batch: 2}]"],
        ["train_batch_size=1", "train.stages='batches of their own'"],
    ),
]


@pytest.mark.parametrize(("overrides", "said"), CONTRADICTIONS, ids=[c[0][0] for c in CONTRADICTIONS])
def test_deepspeed_options_that_contradict(
    workplace: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], said: list[str]
) -> None:
    for command in ("doctor", "train"):
        assert main([command, str(workplace / "tiny.yaml"), *overrides]) == 2
        text = capsys.readouterr().err
        assert all(word in text for word in said) and len(text.strip().splitlines()) == 1, text


def test_deepspeed_options_reach_deepspeed(workplace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are in the JSON that it is given."""
    given: list[dict[str, object]] = []
    initialize = engine.deepspeed.initialize

    def noted(**arguments: object) -> object:
        given.append(arguments["config"])  # type: ignore[arg-type]
        return initialize(**arguments)

    monkeypatch.setattr(engine.deepspeed, "initialize", noted)
    monkeypatch.chdir(tmp_path)
    options = ("engine.deepspeed.prescale_gradients=false", "engine.deepspeed.comms_logger.enabled=false")
    assert main(["train", str(workplace / "tiny.yaml"), *options, "train.steps=1"]) == 0
    (config,) = given
    assert config["prescale_gradients"] is False and config["comms_logger"] == {"enabled": False}


@pytest.mark.gpu
def test_more_ranks_than_gpus(workplace: Path, tmp_path: Path) -> None:
    ranks = 2 * torch.cuda.device_count()
    _, rows = findings(workplace, tmp_path / "doctor.json", "--ranks", str(ranks), "data.sequence_length=8192")
    missing = [row for row in rows.values() if row["section"] == "configuration" and row["status"] == "missing"]
    assert not missing and rows["ranks"]["status"] == "ok" and "for each" in rows["memory"]["found"], rows
    assert rows["shared GPUs"]["status"] == "warn" and rows["shared GPUs"]["found"].startswith("2 ranks share a GPU")


# ranks on two GPUs of 80 GiB, settings: how many share one, whether 1.6 billion parameters fit (ROOMS; 3.7 GiB of them
# are gathered at ZeRO 3, whatever the ranks), and the way out
SHARED = [
    (2, (), 1, "ok", ""),
    (4, (), 2, "ok", ""),
    (8, (), 4, "missing", "engine.zero_stage=1 would fit"),
    (8, ("engine.zero_stage=3",), 4, "ok", ""),
    (32, ("engine.zero_stage=3",), 16, "missing", "engine.offload_optimizer=true would fit"),
    (64, ("engine.zero_stage=3",), 32, "missing", "take a GPU for each rank, or a smaller model"),
]


@pytest.mark.parametrize(("ranks", "settings", "many", "status", "cure"), SHARED)
def test_ranks_that_share_gpus_run_where_their_memory_suffices(
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    ranks: int,
    settings: tuple[str, ...],
    many: int,
    status: str,
    cure: str,
) -> None:
    monkeypatch.setattr(fits.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**50))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 2**30))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 * 2**30, 80 * 2**30))
    monkeypatch.setenv("DNSP_LIGER", "0")
    wide = ("model.hidden_size=1024", "model.intermediate_size=65536", "model.num_hidden_layers=8")
    spread = (f"train.global_batch={ranks}", "parallel.sequence=1")
    config = load_config(workplace / "tiny.yaml", [*wide, *spread, *settings])
    rows = {name: row for name, *row in fits.examine(config, ranks, here=True)}
    assert rows["ranks"][0] == "ok" and rows["memory"][0] == status and cure in rows["memory"][2], rows
    assert ("for each" in rows["memory"][1]) == ("shared GPUs" in rows) == (many > 1)
    if many > 1:
        assert rows["shared GPUs"][0] == "warn"
        assert rows["shared GPUs"][1].startswith(f"{many} ranks share a GPU ({ranks} on 2): gloo"), rows
    assert "shared GPUs" not in {name for name, *_ in fits.examine(config, ranks, here=False)}


WIDTHS = [
    (("model.linear_key_head_dim=96",), r"model\.linear_key_head_dim=96: .* 16, 32, 64, 128, 256 wide"),
    (("model.linear_value_head_dim=24",), r"model\.linear_value_head_dim=24: "),
    (
        ("model.pattern=[deltanet]", "model.deltanet.num_heads=4"),
        r"model\.hidden_size / model\.deltanet\.num_heads=8: ",
    ),
    (("model.pattern=[linear_attention]", "model.deltanet.head_dim=48"), r"model\.deltanet\.head_dim=48: "),
    (
        ("model.pattern=[deltanet]", "model.deltanet={head_dim: 16, value_head_dim: 40}"),
        r"deltanet\.value_head_dim=40: ",
    ),
]


@pytest.mark.parametrize(("changed", "said"), WIDTHS, ids=[said for _, said in WIDTHS])
def test_heads_without_kernels_are_refused_before_the_first_step(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, changed: tuple[str, ...], said: str
) -> None:
    config = load_config(workplace / "tiny.yaml", list(changed))
    check_kernels(config.model)  # there is no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("DNSP_LIGER", "0")
    with pytest.raises(UsageError, match=said + ".*DNSP_DELTA_RULE=torch"):
        check_kernels(config.model)
    check_kernels(load_config(workplace / "tiny.yaml", ["model.pattern=[gated_delta]"]).model)
    monkeypatch.setenv("DNSP_DELTA_RULE", "torch")
    check_kernels(config.model)
