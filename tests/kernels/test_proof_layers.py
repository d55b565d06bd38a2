"""The proofs of the kernels around the delta rule: right kernels pass, wrong ones do not, and each launch is asked for.

What computes runs under Triton's interpreter in a process of its own (this file, ``python -m
tests.kernels.test_proof_layers``), and on a GPU.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
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
from dnsp.kernels.verdicts import Toolchain, candidates

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
H200 = Toolchain("NVIDIA H200", (9, 0), "3.6.0", "12.8.93", "of the tests")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

SIGNATURES: dict[str, AnySignature] = {
    "conv": Conv(FP32, FP32, None, None, None, 32, 4, True),
    "conv, everything": Conv(FP32, FP32, FP32, FP32, torch.int32, 20, 3, False),
    "norm": Norm(FP32, FP32, FP32, 24, 1),
    "norm, heads apart": Norm(FP32, FP32, FP32, 40, 3),
    "conv step": ConvStep(FP32, FP32, FP32, FP32, torch.int64, 20, 3, False, False),
    "delta step": DeltaStep(FP32, FP32, FP32, FP32, FP32, FP32, FP32, torch.int32, 1, 3, 12, 20, Rule(), True, False),
    "delta step, no erase": DeltaStep(
        *(FP32,) * 4, *(None,) * 4, 1, 1, 3, 5, Rule(erase=False), False, True
    ),
    "post": Post(triton_post.RING),
}  # fmt: skip


# Signatures.


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_signature_is_kept_as_it_is(name: str) -> None:
    signature = SIGNATURES[name]
    read = from_json(json.loads(json.dumps(to_json(signature))))
    assert read == signature and type(read) is type(signature)


def test_kinds_are_not_taken_for_each_other() -> None:
    """Their tuples may be equal; what is known of one is not known of the other."""
    assert tuple(Fold(8, 8)) == (8, 8)
    files = {verdicts.file_of(H200, s) for s in (Fold(8, 8), Post(8), SIGNATURES["norm"], SIGNATURES["conv step"])}
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
def children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[AnySignature]:
    """Nothing is known, and the proofs are written down here instead of run; all succeed."""
    asked: list[AnySignature] = []

    def child(device: torch.device, signature: AnySignature, table: str) -> dict[str, Any]:
        asked.append(signature)
        return {"wrong": None, "errors": {"y": 0.001}, "binaries": [{"hash": str(signature)}]}

    monkeypatch.setenv("DNSP_PROOFS", str(tmp_path))
    monkeypatch.setattr(proof, "toolchain", lambda device: H200)
    monkeypatch.setattr(proof, "_child", child)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(proof, "_proven", set())
    monkeypatch.setattr(proof, "_tables", {})
    return asked


def test_each_kind_is_proven_once(children: list[AnySignature], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda:0")
    for _ in range(2):
        for signature in SIGNATURES.values():
            proof.require_kernels(gpu, signature)
            proof.require_kernels(CPU, signature)  # interpreted: nothing to prove
    assert children == list(SIGNATURES.values()) and proof._proven == {str(s) for s in SIGNATURES.values()}
    monkeypatch.setattr(proof, "_tables", {})
    for signature in SIGNATURES.values():  # from the disk
        proof.require_kernels(gpu, signature)
    assert len(children) == len(SIGNATURES)


def test_another_text_of_a_kind_is_proven_anew(children: list[AnySignature], monkeypatch: pytest.MonkeyPatch) -> None:
    right = verdicts._text
    verdicts._sources.cache_clear()
    before = {name: verdicts.file_of(H200, s) for name, s in SIGNATURES.items()}
    try:
        monkeypatch.setattr(verdicts, "_text", lambda module: right(module) + b"#" * (module == "triton_conv"))
        verdicts._sources.cache_clear()
        changed = [name for name, s in SIGNATURES.items() if verdicts.file_of(H200, s) != before[name]]
    finally:
        verdicts._sources.cache_clear()
    assert changed == ["conv", "conv, everything"]


def test_what_is_refused_names_the_kernel_and_the_way_out(
    children: list[AnySignature], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "_child", lambda *asked: {"wrong": "y is off by 8.8e-01"})
    with pytest.raises(proof.UnprovenError) as error:
        proof.require_kernels(torch.device("cuda:0"), SIGNATURES["conv"])
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


class Wrong:
    """A kernel that is right but for one of its outputs, which it changes."""

    def __init__(self, kernel: Any, output: str, change: Callable[[Tensor], Any]) -> None:
        self.kernel, self.change = kernel, change
        self.__name__, self.at = kernel.__name__, kernel.arg_names.index(output)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(*args: Any, **constants: Any) -> Any:
            binary = self.kernel[grid](*args, **constants)
            self.change(args[self.at])
            return binary

        return run


def what_is_wrong(signature: AnySignature, device: torch.device, change: str | None = None) -> str | None:
    """What the prover says of the kernels, or of kernels of which one computes wrong numbers."""
    if change is None:
        return proof_run.prove(device, signature, candidates()["as tuned"])["wrong"]
    module, kernel, output, how, _ = WRONG[change]
    right = getattr(module, kernel)
    setattr(module, kernel, Wrong(right, output, how))
    try:
        return proof_run.prove(device, signature, candidates()["as tuned"])["wrong"]
    finally:
        setattr(module, kernel, right)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, tuple[str | None, str]]:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.kernels.test_proof_layers"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", SIGNATURES)
def test_right_and_wrong_kernels(interpreted: dict[str, tuple[str | None, str]], name: str) -> None:
    right, wrong = interpreted[name]
    assert right is None and wrong.startswith(WRONG[name][-1]), (right, wrong)


# Compiled for a GPU that need not be there, in a process with a driver of its own.

COMPILED = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from dnsp.kernels import proof, proof_layers, proof_run, triton_conv, triton_decode, triton_norm
from dnsp.kernels.signatures import Post
from dnsp.kernels.verdicts import candidates
from tests.kernels.test_proof_layers import calls


class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)


class Compiling(proof_run.Compiling):
    def __init__(self):
        super().__init__(candidates()["as tuned"])
        self.launched, self.met = {}, []

    def meet(self, signature):
        self.met.append(signature)

    def launch(self, kernel, grid, args, constants):
        self.launched.setdefault(kernel.warmup(*args, grid=grid, **constants).hash, kernel.__name__)


driver.set_active(Driver())
proof_layers.TOKENS, proof_layers.NORM = (6,), ((5, None),)
asked = Compiling()
with proof.mode(asked):
    for call in calls():
        call()
proven, signatures = Compiling(), dict.fromkeys(asked.met)
with proof.mode(proven):
    for signature in signatures:
        for _ in proof_layers.results(torch.device("cpu"), signature):
            pass
missing = {h: name for h, name in asked.launched.items() if h not in proven.launched}
print(len(signatures), len(asked.launched), sorted(missing.values()))
"""


def calls() -> list[Callable[[], Any]]:
    """The same calls of each kind, laid out in memory as they may be."""
    found: list[Callable[[], Any]] = []
    for B, T, off in ((1, 70, 0), (2, 33, 1), (3, 64, 16), (2, 1, 3)):
        flat = torch.zeros(B * T * 3 * 64 + 64, dtype=BF16)
        x = flat[off:][: B * T * 192].view(B, T, 192)[..., 64:128]
        if off == 16:  # a stride beyond 2^31, over memory that nobody touches
            B, x = 2, torch.empty(2**31 + 2**16, dtype=BF16).as_strided((2, T, 64), (2**31, 192, 1))
        weight = torch.zeros(64 * 4 + off)[off:].view(64, 4)
        doc = torch.zeros(B * T + off, dtype=torch.int32)[off:].view(B, T)
        dy = torch.zeros(B, 64, T, dtype=BF16).mT
        conv: Any = (weight, None, None, doc, 5 * off, True)
        found += [lambda x=x, a=conv: triton_conv.forward(x, *a)]
        found += [lambda x=x, dy=dy, a=conv: triton_conv.backward(dy, x, *a)]
        o, gate = x.unflatten(-1, (4, 16)), torch.zeros(B, T, 4, 16, dtype=BF16)
        norm: Any = (gate, torch.zeros(16 + off)[off:], 1e-6)
        found += [lambda o=o, a=norm: triton_norm.forward(o, *a)]
        found += [lambda o=o, a=norm: triton_norm.backward(torch.zeros(()).to(BF16).expand(o.shape), o, *a)]
        tail, state = torch.zeros(B, 3, 64, dtype=BF16), torch.zeros(B, 2, 16, 16)
        found += [lambda x=x, t=tail, w=weight: triton_decode.conv_step(x[:, 0], t, w, None, True, None)]
        token = x[:, 0].split([16, 16, 32], -1)
        q, k, v = token[0].unflatten(-1, (1, 16)), token[1].unflatten(-1, (1, 16)), token[2].unflatten(-1, (2, 16))
        g, slots = torch.zeros(B * 2 + off)[off:].view(B, 2), torch.arange(B + off)[off:]
        step: Any = (1, Rule(), True, slots, (g[0], g[0]))  # a scale that is no float
        found += [lambda q=q, k=k, v=v, g=g, s=state, a=step: triton_decode.delta_step(q, k, v, g, g, s, *a)]
    return found


@pytest.mark.timeout(300)
def test_the_signature_decides_the_binaries() -> None:
    """Lengths, batches, addresses and the layout of gradients do not: what is launched was in the proof."""
    command = [sys.executable, "-c", COMPILED]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split(maxsplit=2) == ["5", "8", "[]\n"], run.stdout


# On a GPU.

GPU: dict[str, AnySignature] = {
    "conv": Conv(BF16, FP32, None, None, torch.int32, 8192, 4, True),
    "conv, halo": Conv(BF16, BF16, BF16, BF16, torch.int32, 2048, 4, True),
    "conv, fp16": Conv(FP16, FP16, None, None, None, 96, 2, False),
    "norm": Norm(BF16, BF16, FP32, 128, 1),
    "norm, heads apart": Norm(FP16, FP16, FP16, 64, 4),
    "norm, narrow": Norm(BF16, BF16, BF16, 24, 1),
    "norm, widest": Norm(BF16, BF16, FP32, 8192, 1),
    "conv step": ConvStep(BF16, BF16, BF16, None, None, 8192, 4, True, True),
    "delta step": DeltaStep(*(BF16,) * 5, FP32, FP32, None, 16, 32, 128, 128, Rule(), True, True),
    "delta step, slots": DeltaStep(
        *(BF16,) * 3, FP32, FP32, None, None, torch.int64, 2, 4, 64, 256, Rule(error_decay="previous"), True, True
    ),
} | SIGNATURES  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU)
def test_right_kernels_are_proven_on_gpu(name: str) -> None:
    assert what_is_wrong(GPU[name], torch.device("cuda:0")) is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels_are_found_on_gpu(name: str) -> None:
    said = what_is_wrong(SIGNATURES[name], torch.device("cuda:0"), name)
    assert said is not None and said.startswith(WRONG[name][-1]), said


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_each_launch_is_asked_for_on_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the public functions: unproven, a capture is refused; proven by processes of their own, none is started again,
    neither by this process nor by one that knows nothing, and a graph of them is captured."""
    monkeypatch.setenv("DNSP_PROOFS", str(tmp_path))
    monkeypatch.setattr(proof, "_proven", set())
    monkeypatch.setattr(proof, "_tables", {})
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
            monkeypatch.setattr(proof, "_proven", set())
            monkeypatch.setattr(proof, "_tables", {})
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    proof_layers.TOKENS, proof_layers.NORM = (9,), ((5, None), (9, 2))  # quickly interpreted
    said = {name: (what_is_wrong(s, CPU), what_is_wrong(s, CPU, name)) for name, s in SIGNATURES.items()}
    print(json.dumps(said))
