"""``dnsp bench delta`` and ``decode`` at small shapes: formulas against counts, errors against planted ones.

Long because one file holds what both share, and each formula is counted by hand.
"""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dnsp.bench import decode, delta
from dnsp.bench import delta_shapes as shapes
from dnsp.bench.common import Runs, take_turns
from dnsp.bench.peers import PEERS, Peer, find_peers
from dnsp.cli import main
from dnsp.kernels import chunk_triton
from dnsp.kernels.delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

SMALL = "tokens=128,heads=2/4,K=16,V=32"
FP32 = SMALL + ",dtype=fp32"
CPU = torch.device("cpu")


def measured(file: Path, *asked: str, **options: Any) -> tuple[int, dict[str, Any]]:
    status = delta.run(asked or (SMALL,), runs=2, warmup=1, json_path=file, **options)
    return status, json.loads(file.read_text())


def peers_that(monkeypatch: pytest.MonkeyPatch, **ops: Any) -> None:
    """Peers by name, an op each, as if they were installed."""
    made = [Peer(name.replace("_", "-"), SimpleNamespace(chunk_gated_delta_rule=op)) for name, op in ops.items()]
    monkeypatch.setattr(delta, "find_peers", lambda names, device: made)


# The formulas of the modules' first lines.


def test_forward_flops_are_those_of_the_chunked_form() -> None:
    """With as many key heads as value heads: our torch path repeats the key heads' products for each value head."""
    shape = shapes.parse_shape("tokens=256,heads=3,K=32,V=16,batch=2,dtype=fp32")
    inputs = shapes.make_inputs(shape, CPU)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shapes.compute(shape, inputs, "torch")
    assert counter.get_total_flops() == shape.flops("forward") == shape.flops("inference")


def test_both_passes_flops_are_those_of_the_algebra() -> None:
    """docs/how-it-works.md's equations for one chunk between two states, and what autograd makes of them."""
    C, K, V = 64, 32, 16
    shape = shapes.parse_shape(f"tokens={C},heads=1,K={K},V={V}")
    q, k, S = (torch.randn(*size, requires_grad=True) for size in ((C, K), (C, K), (K, V)))
    v = torch.randn(C, V, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        L = (k @ k.T).tril(-1) + torch.eye(C)
        A = torch.linalg.solve_triangular(L, torch.eye(C), upper=False, unitriangular=True)
        new = A @ (v - k @ S)
        o = q @ S + (q @ k.T).tril() @ new
        out = S + k.T @ new
        forward = counter.get_total_flops()
        torch.autograd.grad((o, out), (q, k, v, S), (torch.randn_like(o), torch.randn_like(out)))
    of_inverse = 2 * C**3  # its gradient's product; the formula leaves the inverse out
    assert forward == shape.flops("forward")
    assert counter.get_total_flops() - of_inverse == shape.flops("training")


def test_flops_by_hand_with_grouped_heads() -> None:
    shape = shapes.Shape(tokens=1000, key_heads=2, value_heads=6, K=16, V=32, batch=3)
    of_chunk_values = 3 * (2 * 64 * 16 * 32) + 2 * (2 * 64 * 64 * 32)  # K S, Q S, K^T V'; A R, P V'
    of_chunk_keys = 2 * (2 * 64 * 64 * 16)  # K K^T, Q K^T
    assert shape.flops("forward") == 3000 * (6 * of_chunk_values + 2 * of_chunk_keys) / 64
    assert shape.flops("training") == 3 * shape.flops("forward")


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_bytes_are_those_of_the_tensors(dtype: str) -> None:
    shape = shapes.parse_shape(f"{SMALL},batch=2,dtype={dtype}")
    x = shapes.make_inputs(shape, CPU)
    o = shapes.compute(shape, x)
    grads = torch.autograd.grad(o, x.leaves, x.do)
    forward = sum(y.nbytes for y in (*x.leaves, o))
    assert shape.bytes("forward") == shape.bytes("inference") == forward
    assert shape.bytes("training") == forward + x.bytes + sum(y.nbytes for y in grads)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_bytes_of_a_decode_step_are_those_of_the_tensors(dtype: str) -> None:
    shape = decode.parse_shape(f"batch=3,heads=2/4,K=16,V=32,W=3,dtype={dtype}")
    x, memories = decode.make_inputs(shape, CPU), decode.Memories.make(shape, 1, CPU)
    state, tail = memories.states[0], memories.tails[0]
    o, _ = decode.TRUTH["delta"](x, state, tail)
    assert shape.bytes("delta") == 2 * state.nbytes + sum(y.nbytes for y in (x.q, x.k, x.v, x.g, x.beta, o))
    read = (x.mixed, x.a, x.b, *x.parameters)
    assert shape.bytes("layer") == 2 * state.nbytes + 2 * tail.nbytes + sum(y.nbytes for y in (*read, o))


# Errors.


def test_a_planted_error_is_what_the_columns_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer whose outputs are 1 % too large: so are all of its gradients."""

    def one_percent_off(**arguments: Any) -> tuple[Tensor, None]:
        arguments.pop("use_qk_l2norm_in_kernel")
        o, _ = chunk_gated_delta_rule(**arguments, use_qk_l2norm_in_kernel=True)
        return 1.01 * o, None

    peers_that(monkeypatch, fla=one_percent_off)
    status, report = measured(tmp_path / "d.json", FP32)
    ours, peer = report["shapes"][0]["sides"]
    assert status == 0 and not report["wrong"] and peer["name"] == "fla"
    assert list(peer["errors"]) == list(shapes.RESULTS) == list(ours["errors"])
    assert list(peer["errors"].values()) == pytest.approx([0.01] * 6, rel=1e-3)
    assert max(ours["errors"].values()) < 1e-5
    assert peer["ours_over_this"]["worst_error"] < 1e-3
    goals = {goal["what"]: goal for goal in delta.goals(report["shapes"][0])}
    assert goals["worst error / the better peer's"]["holds"]
    for what, label in (("forward", "forward"), ("training", "forward + backward")):
        goal, ratio = goals[f"{label} / the fastest peer's"], peer["ours_over_this"][what]
        assert goal["found"] == ratio and goal["holds"] == (ratio <= 1)


def test_ours_is_held_to_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = delta.compute

    def wrong_values(shape: shapes.Shape, x: shapes.Inputs, backend: Any = None) -> Tensor:
        return right(shape, x, backend) + 0.02 * x.v

    monkeypatch.setattr(delta, "compute", wrong_values)  # truth keeps the right one
    status, report = measured(tmp_path / "d.json", FP32)
    assert status == 1
    assert any("dnsp: o is off by" in line and "more than 1e-05" in line for line in report["wrong"])
    assert any("dnsp: dv is off by" in line and "more than 0.0001" in line for line in report["wrong"])
    assert not any("dbeta" in line for line in report["wrong"])
    assert "wrong: " in capsys.readouterr().out


def test_not_a_number_is_wrong_and_still_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = delta.compute

    def broken(shape: shapes.Shape, x: shapes.Inputs, backend: Any = None) -> Tensor:
        return right(shape, x, backend) * float("nan")

    monkeypatch.setattr(delta, "compute", broken)
    status, report = measured(tmp_path / "d.json")
    assert status == 1 and report["shapes"][0]["sides"][0]["errors"]["o"] == "nan"
    assert "NaN" not in (tmp_path / "d.json").read_text()


@pytest.mark.parametrize("shape", [SMALL + ",documents=7", SMALL + ",batch=2", SMALL + ",l2norm=no,decay=-20"])
def test_truth_is_the_same_by_any_number_of_heads(shape: str) -> None:
    wanted = shapes.parse_shape(shape)
    inputs = shapes.make_inputs(wanted, CPU)
    found = [delta.Side("dnsp", lambda x: shapes.compute(wanted, x)).results(inputs)]
    one, both = (shapes.errors_of(wanted, inputs, found, at_once)[0] for at_once in (1, 2))
    assert list(one.values()) == pytest.approx(list(both.values()), rel=1e-9)
    assert 1e-4 < one["o"] < 5e-3


# Peers.


def test_a_peer_that_fails_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, o: Tensor) -> Tensor:
            return o.clone()

        @staticmethod
        def backward(ctx: Any, do: Tensor) -> Tensor:
            raise RuntimeError("this Triton produces incorrect results\nand a second line")

    def forward_alone(**arguments: Any) -> tuple[Tensor, None]:
        return NoBackward.apply(chunk_gated_delta_rule(**arguments)[0]), None

    def nothing(**arguments: Any) -> tuple[Tensor, None]:
        raise ValueError("FlashQLA requires K=128")

    peers_that(monkeypatch, fla=forward_alone, flash_qla=nothing)
    status, report = measured(tmp_path / "d.json", profile=tmp_path / "p.json")
    _, fla, flash_qla = report["shapes"][0]["sides"]
    assert status == 0
    assert fla["passes"]["training"] == {"failure": "RuntimeError: this Triton produces incorrect results"}
    assert fla["passes"]["forward"]["ms"] > 0 and list(fla["errors"]) == ["o"]
    assert set(fla["ours_over_this"]) == {"inference", "forward", "worst_error"}
    assert all(record == {"failure": "ValueError: FlashQLA requires K=128"} for record in flash_qla["passes"].values())
    said = capsys.readouterr().out
    assert "fla: forward + backward: RuntimeError: this Triton" in said
    assert "flash-qla: no grad, forward, forward + backward: ValueError: FlashQLA" in said


def test_peers_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    found = find_peers("all", CPU)
    assert [peer.name for peer in found] == list(PEERS) and all(peer.missing for peer in found)
    assert find_peers("none", CPU) == []
    assert [peer.name for peer in find_peers("fla", CPU)] == ["fla"]


def test_turns() -> None:
    """One of each, each time with a number of its own; what fails once is not asked again."""
    order: list[tuple[str, int]] = []

    def call(name: str, n: int) -> None:
        order.append((name, n))
        if name == "b" and n > 3:
            raise RuntimeError("enough")

    records = {name: Runs() for name in "abc"}
    take_turns([(records[name], partial(call, name)) for name in "abc"], runs=2, warmup=1, device=CPU)
    assert order == list(zip("abcabcac", range(8), strict=True))
    assert [record.failure for record in records.values()] == ["", "RuntimeError: enough", ""]
    assert [len(records[name].seconds) for name in "abc"] == [2, 0, 2]


# What comes out.


def test_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = measured(
        tmp_path / "d.json", SMALL + ",segment_tokens=64", SMALL + ",documents=3", profile=tmp_path / "p.json"
    )
    assert status == 0
    assert {"dnsp", "torch", "triton", "fla-core", "flash-qla"} <= report["versions"].keys()
    assert report["device"] == "cpu" and report["versions"]["torch"] == torch.__version__
    assert report["runs"] == 2 and set(report["peers_missing"]) == set(PEERS)
    by_segment, packed = report["shapes"]
    assert [row["name"] for row in by_segment["sides"]] == ["dnsp", delta.OWN_SEGMENTS]
    assert [row["name"] for row in packed["sides"]] == ["dnsp", delta.ONE_DOCUMENT]
    assert by_segment["shape"]["segment_tokens"] == 64 and packed["shape"]["documents"] == 3
    assert packed["sides"][1]["errors"] == {}  # another truth
    assert by_segment["work"]["forward"]["flops"] == shapes.parse_shape(SMALL).flops("forward")
    for shape in report["shapes"]:
        ours, other = shape["sides"]
        for what in delta.PASSES:
            times = ours["passes"][what]
            assert len(times["runs_ms"]) == 2
            assert times["min_ms"] <= times["ms"] <= times["max_ms"] and times["spread"] >= 0
            ratio = times["ms"] / other["passes"][what]["ms"]
            assert other["ours_over_this"][what] == pytest.approx(ratio)
    profile = json.loads((tmp_path / "p.json").read_text())
    kernels = profile["shapes"][0]["sides"]["dnsp"]
    for what in ("forward", "backward"):
        assert kernels[what][0]["us"] >= kernels[what][-1]["us"] > 0
        assert any(kernel["kernel"] == "aten::bmm" and kernel["launches"] >= 1 for kernel in kernels[what])
    said = capsys.readouterr().out
    assert "128 tokens, 2/4 heads" in said and "dnsp / it" in said and "aten::bmm" in said


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["dnsp"])
    file = f"--json={tmp_path / 'd.json'}"
    options = ["--deterministic", "--runs=1", "--warmup=1", "--peers=none", "--no-errors", file]
    assert main(["bench", "delta", SMALL, SMALL + ",segment_tokens=auto", *options]) == 0
    report = json.loads((tmp_path / "d.json").read_text())
    assert [figures["shape"]["segment_tokens"] for figures in report["shapes"]] == [128, None]
    assert report["peers_missing"] == {} and report["runs"] == 1
    for figures in report["shapes"]:
        assert figures["truth"] == "not asked for" and figures["sides"][0]["errors"] == {}


def test_what_is_measured_unasked() -> None:
    asked = [shapes.parse_shape(text) for text in shapes.SHAPES]
    assert len(set(asked)) == len(asked)
    heads = {(shape.batch * shape.tokens, shape.key_heads, shape.value_heads) for shape in asked}
    assert heads == {(32768, 16, 32), (32768, 16, 16), (131072, 16, 32), (131072, 4, 8)}
    assert [shape.segment_tokens for shape in asked if shape.segment_tokens] == [4096]
    assert all(shape.K == shape.V == 128 and shape.dtype == "bf16" for shape in asked)


@pytest.mark.slow
def test_first_calls(tmp_path: Path) -> None:
    status, report = measured(tmp_path / "d.json", SMALL, cold=True)
    assert status == 0 and "shapes" not in report
    cold, filled = report["first_calls"][0]["processes"]
    assert (cold["caches"], cold["at_most_s"], filled["caches"], filled["at_most_s"]) == ("cold", 30, "filled", 3)
    assert cold["first_call_s"] == pytest.approx(cold["forward_s"] + cold["backward_s"])


def test_decode_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "d.json"
    assert decode.run(["batch=2,heads=1/2,K=16,V=16,dtype=fp32"], runs=2, warmup=1, json_path=file) == 0
    report = json.loads(file.read_text())
    step, layer = report["shapes"][0]["sides"]
    assert (step["step"], layer["step"]) == ("delta", "layer")
    for row in (step, layer):
        assert row["ways"]["eager"]["ms"] > 0 and "failure" in row["ways"]["graph"]
        assert 0 < row["errors"]["o"] < 1e-5 and row["errors"]["state"] < 1e-5
        assert row["peak_mib"] is None  # of a CPU
    assert report["shapes"][0]["bytes"]["delta"] == decode.Shape(2, 1, 2, 16, 16, dtype="fp32").bytes("delta")
    assert "delta step" in capsys.readouterr().out


def test_a_peer_beside_the_decode_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both layouts of its states are held against the same truth; the layer's kernels are not there."""

    def recurrent(*token: Tensor, initial_state: Tensor, state_v_first: bool, **arguments: Any) -> Any:
        state = initial_state.mT if state_v_first else initial_state
        o, new = fused_recurrent_gated_delta_rule(*token, initial_state=state, **arguments)
        assert new is not None
        return o, 1.01 * (new.mT if state_v_first else new)

    monkeypatch.setitem(sys.modules, "fla", None)
    peer = Peer("fla", SimpleNamespace(fused_recurrent_gated_delta_rule=recurrent))
    monkeypatch.setattr(decode, "find_peers", lambda names, device, among: [peer])
    file = tmp_path / "d.json"
    assert decode.run(["batch=2,heads=1/2,K=16,V=32,dtype=fp32"], runs=2, warmup=1, json_path=file) == 0
    ours, _, keys_first, values_first, layer = json.loads(file.read_text())["shapes"][0]["sides"]
    for row in (keys_first, values_first):
        assert row["errors"]["o"] < 1e-5 and row["errors"]["state"] == pytest.approx(0.01, rel=1e-3)
        assert row["ours_over_this"]["eager"] == pytest.approx(ours["ways"]["eager"]["ms"] / row["ways"]["eager"]["ms"])
    assert "ModuleNotFoundError" in layer["ways"]["eager"]["failure"]
    assert "fla, layer step: eager: ModuleNotFoundError" in capsys.readouterr().out


def test_decode_is_judged_by_the_faster_layout_of_states() -> None:
    def row(name: str, step: str, **ratios: float) -> dict[str, Any]:
        return {"name": name, "step": step, "ways": {"eager": {}, "graph": {}}, "ours_over_this": ratios}

    rows = [row("dnsp, delta step", "delta"), row("dnsp, layer step", "layer")]
    rows += [row("fla", "delta", eager=0.5, graph=0.9), row("fla, states [V, K]", "delta", eager=0.6, graph=1.1)]
    found = decode.goals({"name": "one", "shape": {"batch": 1}, "sides": rows})
    assert [(goal["found"], goal["holds"]) for goal in found] == [(0.6, True), (1.1, False)]


def test_a_wrong_decode_step_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = decode._delta

    def wrong(x: decode.Inputs, state: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        o, state = right(x, state, tail)
        return o, state + 1e-3

    monkeypatch.setattr(decode, "_delta", wrong)  # TRUTH keeps the right one
    file = tmp_path / "d.json"
    assert decode.run(["batch=1,heads=1,K=16,V=16"], runs=1, warmup=1, json_path=file) == 1
    assert "delta step: state is off by" in json.loads(file.read_text())["wrong"][0]


# Slips.

SLIPS = {
    ("delta", "heads=3/4"): r"heads=3/4: 4 value heads for 3 key heads; make them a multiple",
    ("delta", "heads=0/4"): r"heads=0: must be a whole number of at least 1",
    ("delta", "token=4"): r"unknown key 'token'; did you mean 'tokens'\?",
    ("delta", "32768"): r"'32768' is not KEY=VALUE; write tokens=",
    ("delta", "tokens=1,tokens=2"): r"tokens is given twice",
    ("delta", "tokens=many"): r"tokens=many: must be a whole number",
    ("delta", "dtype=fp8"): r"dtype=fp8: must be one of bf16, fp16, fp32",
    ("delta", "decay=0.1"): r"decay=0.1: must be logsigmoid, or .* at most 0",
    ("delta", "decay=nan"): r"decay=nan: must be logsigmoid",
    ("delta", "documents=9,batch=2"): r"documents=9 with batch=2: .* give batch=1, tokens=65536",
    ("delta", "documents=9,tokens=8"): r"documents=9: 8 tokens hold no more",
    ("delta", "segment_tokens=100"): r"segment_tokens=100: .* multiple of 64, or auto, or deterministic",
    ("delta", "l2norm=maybe"): r"l2norm=maybe: must be yes",
    ("delta", "--runs=0"): r"--runs 0: at least one run",
    ("delta", "--warmup=0"): r"--warmup 0: the first run compiles",
    ("delta", "--peers=flash"): r"--peers flash: 'flash' is not known; name any of flash-qla, fla, or all, or none",
    ("delta", "--profile=/nowhere/at/all"): r"--profile /nowhere/at/all: cannot be written",
    ("delta", "--json=/nowhere/at/all"): r"--json /nowhere/at/all: cannot be written",
    ("decode", "heads=3/4"): r"heads=3/4: 4 value heads for 3 key heads",
    ("decode", "tokens=4"): r"unknown key 'tokens'; the keys are batch, heads",
    ("decode", "--peers=flash-qla"): r"--peers flash-qla: 'flash-qla' is not known; name any of fla",
    ("decode", "--runs=0"): r"--runs 0: at least one run",
    ("train", "--steps=0"): r"--steps 0: at least one step",
    ("train", "model.num_hiden_layers=3"): r"did you mean 'model.num_hidden_layers'",
}


@pytest.mark.parametrize(("command", "slip"), SLIPS)
def test_slips(command: str, slip: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["dnsp"])
    assert main(["bench", command, slip]) == 2
    assert re.search(SLIPS[command, slip], capsys.readouterr().err)


# On a GPU.


@pytest.mark.gpu
def test_delta_on_a_gpu(tmp_path: Path) -> None:
    shape = "tokens=2048,heads=2/4"
    status, report = measured(tmp_path / "d.json", shape, shape + ",documents=9", profile=tmp_path / "p.json")
    assert status == 0 and report["driver"] and report["copy_ceiling_tb_per_s"] > 0.1
    for figures in report["shapes"]:
        ours = figures["sides"][0]
        assert ours["peak_mib"] > 0 and figures["input_sets"] > 1  # they would lie in the L2 cache
        for what in delta.PASSES:
            times = ours["passes"][what]
            assert 0 < times["copy_fraction"] < 1 and 0 < times["matmul_fraction"] < 1
            assert times["ms"] < times["alone_ms"]
    kernels = json.loads((tmp_path / "p.json").read_text())["shapes"][0]["sides"]["dnsp"]
    ours = {name for name in vars(chunk_triton) if name.endswith("_kernel")}
    for what in ("forward", "backward"):
        found = {kernel["kernel"] for kernel in kernels[what] if kernel["launches"] >= 1 and kernel["us"] > 0}
        assert ours & found, (what, found)


@pytest.mark.gpu
def test_decode_on_a_gpu(tmp_path: Path) -> None:
    file = tmp_path / "d.json"
    assert decode.run(["batch=2"], runs=3, json_path=file) == 0
    for row in json.loads(file.read_text())["shapes"][0]["sides"][:2]:
        graph = row["ways"]["graph"]
        assert 0 < graph["copy_fraction"] < 1 and graph["ms"] < row["ways"]["eager"]["ms"]
        assert 0 < row["peak_mib"] < 1  # the states of a step, 2 MiB a sequence, are not copied
