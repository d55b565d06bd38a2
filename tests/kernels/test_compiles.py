"""What would be launched on a GPU that need not be there, compiled: spills, matrix instructions, and which binaries.

Whole calls are compiled by a driver that stands in for CUDA's, in a process of its own (this file, ``python -m
tests.kernels.test_compiles NAME ...``).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from dnsp.kernels import (
    chunk_triton,
    proof,
    proof_layers,
    proof_run,
    triton_conv,
    triton_decode,
    triton_norm,
    triton_scan,
)
from dnsp.kernels.launches import IN_GLUON, LAUNCHES, candidates
from dnsp.kernels.reference import Rule
from dnsp.kernels.segments import Inputs, Segments
from dnsp.kernels.signatures import AnySignature, Conv, Norm, Post, Signature
from dnsp.kernels.triton_post import RING
from tests.kernels.proofs import BF16, CPU, DELTA, FP32
from tests.kernels.triton_compile import Compiled, compiled

ROOT = Path(__file__).parents[2]

# The delta rule's passes, one by one.

# Bytes of local memory a thread, the more of Triton 3.6's and 3.7's; still more means that a change spills registers.
SPILLED = {
    100: {"summarise": 48, "apply": 552, "keep": 256, "reverse_summary": 32, "reverse": 504, "pairs": 48},
    90: {"prepare_pairs": 8, "reverse": 64, "queries": 56, "backward": 72},
    80: {"apply": 408, "reverse_summary": 448, "reverse": 6176, "queries": 176},  # reverse with 3.6: 616
}
SPILLED_FOR_DOCUMENTS = {"prepare_pairs": 32, "backward": 88}  # of the kernels for Hopper
# The tensor cores' instructions; blocks of 16 rows, which *invert* multiplies, are below a warp group's size.
MATRIX = {100: "UTCHMMA", 90: "HGMMA", 80: "HMMA"}


@pytest.mark.parametrize("use", ["apply", "invert"])
def test_compiles(use):
    check_compiled(use, 90)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SPILLED)
@pytest.mark.parametrize("use", [*LAUNCHES, "gates"])
def test_compiles_everywhere(use, capability):
    check_compiled(use, capability)


@pytest.mark.slow
@pytest.mark.parametrize("use", IN_GLUON)
def test_compiles_for_documents(use):
    check_compiled(use, 90, documents=True)


def check_compiled(use: str, capability: int, documents: bool = False) -> None:
    if use in IN_GLUON and capability != 90:
        pytest.skip("written for Hopper")
    binary = compiled(use, capability, documents=documents)
    assert binary.spilled <= (SPILLED_FOR_DOCUMENTS if documents else SPILLED[capability]).get(use, 0)
    matrix = "HMMA" if use == "invert" else MATRIX[capability]
    assert binary.matrix == (set() if use == "gates" else {matrix})


# Whole calls.


class Driver:
    """Of a GPU with this capability."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # so that Triton keeps the binaries of each apart

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiling(proof_run.Compiling):
    """A mode that notes what is compiled, by hashes, and what is asked for."""

    def __init__(self) -> None:
        super().__init__(candidates()["as tuned"])
        self.binaries: dict[str, tuple[str, Any]] = {}  # a kernel's name, and its binary
        self.met: list[AnySignature] = []

    def meet(self, signature: AnySignature) -> None:
        self.met.append(signature)

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        binary = kernel.warmup(*args, grid=grid, **constants)
        self.binaries.setdefault(binary.hash, (kernel.__name__, binary))


def in_a_process(*names: str) -> Any:
    command = [sys.executable, "-m", "tests.kernels.test_compiles", *names]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


# As wide as models have them. (Those of decoding are in test_triton_decode, the fold in tests/parallel.)
LAYERS: dict[str, AnySignature] = {
    "conv": Conv(BF16, FP32, None, None, torch.int32, 8192, 4, True),
    "conv, everything": Conv(BF16, BF16, BF16, BF16, torch.int32, 2048, 4, True),
    "norm": Norm(BF16, BF16, FP32, 128, 1),
    "norm, widest": Norm(BF16, BF16, FP32, 8192, 1),
    "post": Post(RING),
}


# Bytes, as SPILLED.
SPILLED_BY_LAYERS: dict[int, dict[tuple[str, str], int]] = {
    100: {("norm, widest", "gated_norm_gradients_kernel"): 128, ("post", "wait_kernel"): 8},
    90: {("norm, widest", "gated_norm_gradients_kernel"): 48},
    80: {("norm, widest", "gated_norm_gradients_kernel"): 40},
}


def spills_of_layers(capability: str) -> dict[str, dict[str, int]]:
    """Bytes of local memory a thread of each kernel, by signature."""
    driver.set_active(Driver(int(capability)))
    proof_layers.TOKENS, proof_layers.NORM = (6,), ((5, None),)
    found: dict[str, dict[str, int]] = {}
    for name, signature in LAYERS.items():
        cases, kernels, _ = proof_layers.FAMILIES[type(signature)]
        mode = Compiling()
        with proof.mode(mode):
            for tensors in cases(signature, CPU):
                kernels(signature, tensors)
        found[name] = {kernel: Compiled.of(binary.asm["cubin"]).spilled for kernel, binary in mode.binaries.values()}
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize("capability", [90, *(pytest.param(n, marks=pytest.mark.slow) for n in (80, 100))])
def test_layers_compile(capability: int) -> None:
    found = in_a_process("spills_of_layers", str(capability))
    launched = {kernel for kernels in found.values() for kernel in kernels}
    assert launched == {
        *("conv_kernel", "conv_gradients_kernel", "gated_norm_kernel", "gated_norm_gradients_kernel"),
        *("wait_kernel", "post_kernel", "take_kernel", "taken_kernel"),
    }
    spilled = {(name, kernel): spilled for name, kernels in found.items() for kernel, spilled in kernels.items()}
    assert {of: more for of, more in spilled.items() if more > SPILLED_BY_LAYERS[capability].get(of, 0)} == {}


def delta_rule_binaries(name: str) -> list[Any]:
    """The kernels of a call, and how many binaries there are for calls that differ in what a signature leaves out."""
    driver.set_active(Driver(90))
    s = DELTA[name]
    chunk_triton.is_hopper = lambda device: s.K == 128  # type: ignore[assignment]
    found: list[set[str]] = []
    for B, T, tokens, off in ((2, 436, 128, 0), (1, 1000, 1024, 1), (3, 64, 64, 1)):
        wide = torch.zeros(B, T, s.q[0], dtype=s.dtype)
        q, k, v = wide.split([s.K, s.K, s.HV * s.V], -1)
        odd = torch.zeros(2, B * T * 2 + 1)[:, off:]  # addresses that are no multiples of 16
        g, beta = (x[: B * T * 2].view(B, T, 2) for x in odd)
        doc = torch.zeros(B * T + 1, dtype=torch.int32)[off:][: B * T].view(B, T)
        if B == 1:  # a batch's stride beyond 2^31
            q, k, v, g = (x.as_strided(x.shape, (2**33, *x.stride()[1:])) for x in (q, k, v, g))
        part = Segments(tokens, tuple(range(0, T, tokens)), T)
        heads = q.unflatten(-1, (1, s.K)), k.unflatten(-1, (1, s.K)), v.unflatten(-1, (s.HV, s.V))
        x = Inputs(*heads, g, beta, doc, part, 1, s.rule, s.normalise)
        assert Signature.of(x) == s
        mode = Compiling()
        with proof.mode(mode):
            p = chunk_triton.prepare(x)
            yes = (True,) * len(part)
            M, U, _ = chunk_triton.summarise(p, yes, yes)
            do = torch.zeros(B, s.HV, T, s.V, dtype=s.dtype).transpose(1, 2)
            D = chunk_triton.summarise_backward(p, do, yes)
            chunk_triton.apply(p, U)
            chunk_triton.apply_backward(p, U, do, D.clone)
            passes = torch.ones(len(part) * B + 1, dtype=torch.bool)[off:][: len(part) * B].view(len(part), B)
            forgets = torch.ones(U.shape[:3].numel() + 1, dtype=torch.int32)[off:][: U.shape[:3].numel()]
            triton_scan.fold(M, U, None, passes, forgets.view(U.shape[:3]), 1, False)
        found.append({hash: kernel for hash, (kernel, _) in mode.binaries.items()})
    return [sorted(found[0].values()), len(set().union(*found))]


OF_TRITON = ["gates", "invert", "keys", "pairs", "prepare", "queries", *["reverse"] * 2, *["states"] * 3]
OF_HOPPER = ["gates", "prepare_pairs", "whole_reverse", *["backward"] * 2, *["whole_states"] * 3]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "kernels"), [("model", OF_TRITON), ("of a Hopper's widths", OF_HOPPER)])
def test_the_signature_decides_the_delta_rules_binaries(name: str, kernels: list[str]) -> None:
    """Lengths, batches, segments, addresses and the layout of the output's gradient do not."""
    launched, binaries = in_a_process("delta_rule_binaries", name)
    assert launched == sorted(f"{kernel}_kernel" for kernel in (*kernels, "fold")) and binaries == len(launched)


def layers_binaries() -> list[Any]:
    """Signatures and binaries of :func:`calls`, and the kernels whose binaries no proof has seen."""
    driver.set_active(Driver(90))
    proof_layers.TOKENS, proof_layers.NORM = (6,), ((5, None),)
    asked, proven = Compiling(), Compiling()
    with proof.mode(asked):
        for call in calls():
            call()
    signatures = dict.fromkeys(asked.met)
    with proof.mode(proven):
        for signature in signatures:
            for _ in proof_layers.results(CPU, signature):
                pass
    missing = [name for hash, (name, _) in asked.binaries.items() if hash not in proven.binaries]
    return [len(signatures), len(asked.binaries), missing]


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
def test_the_signature_decides_the_layers_binaries() -> None:
    """Lengths, batches, addresses and the layout of gradients do not: what is launched was in the proof."""
    assert in_a_process("layers_binaries") == [5, 8, []]


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, *arguments = sys.argv[1:]
    print(json.dumps(globals()[name](*arguments)))
