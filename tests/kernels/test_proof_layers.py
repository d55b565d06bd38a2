"""The proofs of the kernels around the delta rule: right kernels pass, wrong ones do not, and each launch is asked for.

What computes runs under Triton's interpreter (:mod:`tests.kernels.interpreter`), and on a GPU.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dnsp.kernels import proof, proof_layers, proof_run, triton_conv, triton_decode, triton_norm, triton_post, verdicts
from dnsp.kernels.conv import causal_conv1d
from dnsp.kernels.decode import gated_delta_step
from dnsp.kernels.launches import candidates
from dnsp.kernels.norm import gated_rms_norm
from dnsp.kernels.reference import Rule
from dnsp.kernels.signatures import (
    AnySignature,
    Conv,
    ConvStep,
    DeltaStep,
    Fold,
    Norm,
    Post,
    aligned,
    from_json,
    is_stepped,
    stepped,
    to_json,
)
from tests.kernels.interpreter import Interpreter
from tests.kernels.proofs import BF16, CPU, FP16, FP32, H200, LAYERS, wrong

ROOT = Path(__file__).parents[2]

# Signatures.


@pytest.mark.parametrize("name", LAYERS)
def test_a_signature_is_kept_as_it_is(name: str) -> None:
    signature = LAYERS[name]
    read = from_json(json.loads(json.dumps(to_json(signature))))
    assert read == signature and type(read) is type(signature)


def test_kinds_are_not_taken_for_each_other() -> None:
    """Their tuples may be equal; what is known of one is not known of the other."""
    assert tuple(Fold(8, 8)) == (8, 8)
    files = {verdicts.file_of(H200, s) for s in (Fold(8, 8), Post(8), LAYERS["norm"], LAYERS["conv step"])}
    assert len(files) == 4


def test_rows_are_laid_in_steps() -> None:
    wide = torch.randn(2, 5, 50)
    for x in (wide[..., :20], wide[..., 1:33], wide[:1, ::2, 2:18], torch.randn(32, 2, 5).mT.transpose(0, 1)):
        y = stepped(x)
        assert is_stepped(y) and torch.equal(x, y)
    there = torch.randn(2, 5, 96)[..., 32:64]
    assert stepped(there) is there
    flat = torch.randn(33)
    assert aligned(flat[:32]).data_ptr() == flat.data_ptr()
    odd = aligned(flat[1:])
    assert odd.data_ptr() % 16 == 0 and torch.equal(odd, flat[1:])


# Verdicts, with children that compute nothing.


@pytest.fixture
def children(memory: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[AnySignature]:
    """Nothing is known, and the proofs are written down here instead of run; all succeed."""
    asked: list[AnySignature] = []

    def child(device: torch.device, signature: AnySignature, table: str, where: verdicts.Toolchain) -> dict[str, Any]:
        asked.append(signature)
        return {"wrong": None, "errors": {"y": 0.001}, "binaries": [{"hash": str(signature)}]}

    monkeypatch.setenv("DNSP_PROOFS", str(tmp_path))
    monkeypatch.setattr(proof, "toolchain", lambda device: H200)
    monkeypatch.setattr(proof, "_child", child)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return asked


def test_each_kind_is_proven_once(children: list[AnySignature], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda:0")
    for _ in range(2):
        for signature in LAYERS.values():
            proof.require_kernels(gpu, signature)
            proof.require_kernels(CPU, signature)  # interpreted: nothing to prove
    assert children == list(LAYERS.values()) and proof._proven == {str(s) for s in LAYERS.values()}
    monkeypatch.setattr(proof, "_tables", {})
    for signature in LAYERS.values():  # from the disk
        proof.require_kernels(gpu, signature)
    assert len(children) == len(LAYERS)


def test_another_text_of_a_kind_is_proven_anew(children: list[AnySignature], monkeypatch: pytest.MonkeyPatch) -> None:
    right = verdicts._text
    verdicts._sources.cache_clear()
    before = {name: verdicts.file_of(H200, s) for name, s in LAYERS.items()}
    try:
        monkeypatch.setattr(verdicts, "_text", lambda module: right(module) + b"#" * (module == "triton_conv"))
        verdicts._sources.cache_clear()
        changed = [name for name, s in LAYERS.items() if verdicts.file_of(H200, s) != before[name]]
        # how a call becomes a signature is every kind's
        monkeypatch.setattr(verdicts, "_text", lambda module: right(module) + b"#" * (module == "signatures"))
        verdicts._sources.cache_clear()
        same = [name for name, s in LAYERS.items() if verdicts.file_of(H200, s) == before[name]]
    finally:
        verdicts._sources.cache_clear()
    assert changed == ["conv", "conv, everything"] and not same


def test_what_is_refused_names_the_kernel_and_the_way_out(
    children: list[AnySignature], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "_child", lambda *asked: {"wrong": "y is off by 8.8e-01"})
    with pytest.raises(proof.UnprovenError) as error:
        proof.require_kernels(torch.device("cuda:0"), LAYERS["conv"])
    for part in ("NVIDIA H200", "Triton 3.6.0", "convolution, float32, 32 channels", "as tuned: y is off by 8.8e-01"):
        assert part in str(error.value)
    assert "backend='torch', DNSP_DELTA_RULE=torch" in str(error.value)


# Kernels that compute.

OTHER = itertools.cycle((1.0, 1 + 1e-6))
WRONG: dict[str, tuple[ModuleType, str, str, Callable[[Tensor], Any], str]] = {
    "conv": (triton_conv, "conv_kernel", "y", lambda x: x[1, -1].mul_(1.5), "y is off by"),
    "conv, everything": (triton_conv, "conv_gradients_kernel", "dhalo", lambda x: x[0, 0].zero_(), "dhalo is off by"),
    "norm": (triton_norm, "gated_norm_kernel", "y", lambda x: x[-1, 3:].zero_(), "y is off by"),
    "norm, heads apart": (
        triton_norm, "gated_norm_gradients_kernel", "parts",
        lambda x: x.mul_(next(OTHER)), "two runs give dweight",
    ),
    "conv step": (triton_decode, "conv_step_kernel", "tail", lambda x: x[1].mul_(1.1), "tail is off by"),
    "delta step": (triton_decode, "delta_step_kernel", "state", lambda x: x[1, 0, 3].add_(0.1), "state is off by"),
    "delta step, no erase": (triton_decode, "delta_step_kernel", "o", lambda x: x.fill_(torch.nan), "o is off by inf"),
    "post": (triton_post, "take_kernel", "out", lambda x: x[-1].add_(1), "message is off by"),
}  # fmt: skip


def what_is_wrong(signature: AnySignature, device: torch.device, change: str | None = None) -> str | None:
    """What the prover says of the kernels, or of kernels of which one computes wrong numbers."""
    if change is None:
        return proof_run.prove(device, signature, candidates()["as tuned"])["wrong"]
    module, kernel, output, how, _ = WRONG[change]
    with wrong(module, kernel, output, how):
        return proof_run.prove(device, signature, candidates()["as tuned"])["wrong"]


def said_interpreted(name: str) -> list[str | None]:
    proof_layers.TOKENS, proof_layers.NORM = (9,), ((5, None), (9, 2))  # quickly interpreted
    return [what_is_wrong(LAYERS[name], CPU), what_is_wrong(LAYERS[name], CPU, name)]


@pytest.mark.parametrize("name", LAYERS)
def test_right_and_wrong_kernels(interpreter: Interpreter, name: str) -> None:
    of_right, of_wrong = interpreter("test_proof_layers:said_interpreted", name)
    assert of_right is None and of_wrong.startswith(WRONG[name][-1]), (of_right, of_wrong)


# On a GPU.

GPU: dict[str, AnySignature] = {
    "conv, model": Conv(BF16, FP32, None, None, torch.int32, 8192, 4, True),
    "conv, halo": Conv(BF16, BF16, BF16, BF16, torch.int32, 2048, 4, True),
    "conv, fp16": Conv(FP16, FP16, None, None, None, 96, 2, False),
    "norm, model": Norm(BF16, BF16, FP32, 128, 1),
    "norm, fp16, heads apart": Norm(FP16, FP16, FP16, 64, 4),
    "norm, narrow": Norm(BF16, BF16, BF16, 24, 1),
    "norm, widest": Norm(BF16, BF16, FP32, 8192, 1),
    "conv step, model": ConvStep(BF16, BF16, BF16, None, None, 8192, 4, True, True),
    "delta step, model": DeltaStep(*(BF16,) * 5, FP32, FP32, None, 16, 32, 128, 128, Rule(), True, True),
    "delta step, slots": DeltaStep(
        *(BF16,) * 3, FP32, FP32, None, None, torch.int64, 2, 4, 64, 256, Rule(error_decay="previous"), True, True
    ),
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "signature"), [*GPU.items(), *LAYERS.items()])
def test_right_kernels_are_proven_on_gpu(name: str, signature: AnySignature) -> None:
    assert what_is_wrong(signature, torch.device("cuda:0")) is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels_are_found_on_gpu(name: str) -> None:
    said = what_is_wrong(LAYERS[name], torch.device("cuda:0"), name)
    assert said is not None and said.startswith(WRONG[name][-1]), said


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_each_launch_is_asked_for_on_gpu(
    memory: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the public functions: unproven, a capture is refused; proven by processes of their own, none is started again,
    neither by this process nor by one that knows nothing, and a graph of them is captured."""
    monkeypatch.setenv("DNSP_PROOFS", str(tmp_path))
    draw = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.randn(*shape, generator=draw, device="cuda").to(dtype)

    x, filters, gain = (random(*shape).requires_grad_() for shape in ((1, 200, 128), (128, 4), (32,)))
    mixed, gates, heads = random(2, 128), random(2, 2), random(2, dtype=FP32)

    def work() -> list[Tensor]:
        y = causal_conv1d(x, filters).unflatten(-1, (4, 32))
        z = gated_rms_norm(y, y, gain)
        tail, state = torch.ones(2, 3, 128, device="cuda", dtype=BF16), torch.ones(2, 2, 32, 32, device="cuda")
        parameters = {"weight_DW": filters, "A_log_H": heads, "dt_bias_H": heads}
        o = gated_delta_step(mixed, gates, gates, tail, state, **parameters)
        return [o, state, z.detach(), *torch.autograd.grad(z.float().square().sum(), (x, filters, gain))]

    with pytest.raises(proof.UnprovenError, match="once before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        work()
    torch.cuda.synchronize()
    expected = work()
    kept = [json.loads(file.read_text())["signature"]["kind"] for file in tmp_path.rglob("*.json")]
    assert sorted(kept) == ["Conv", "ConvStep", "DeltaStep", "Norm"]
    monkeypatch.setattr(proof, "_child", None)
    for forget in (False, True):
        if forget:
            memory()
        assert all(torch.equal(a, b) for a, b in zip(work(), expected, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
def test_the_way_out_is_taken_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With DNSP_DELTA_RULE=torch nothing is asked for."""
    monkeypatch.setenv("DNSP_DELTA_RULE", "torch")
    monkeypatch.setattr(proof, "require_kernels", None)
    x, filters = torch.randn(1, 70, 64, device="cuda", dtype=BF16), torch.randn(64, 4, device="cuda")
    y = causal_conv1d(x, filters)
    assert torch.equal(y, causal_conv1d(x, filters, backend="torch"))
    assert torch.equal(gated_rms_norm(y, y, filters[:, 0]), gated_rms_norm(y, y, filters[:, 0], backend="torch"))
