"""A small run of every kernel, each launched once or a few times, for compute-sanitizer to look at:

    compute-sanitizer --tool memcheck --report-api-errors no python -m tests.kernels.sanitize

The inputs are those of the proofs (:mod:`dnsp.kernels.proof_run`), of few tokens. Every tensor has an allocation of its
own: behind torch's caching allocator, what lies beyond a tensor's end is most often another's. No proof is asked for,
so that no process is started. Without the sanitizer it takes a few seconds, and what compiling takes.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # before torch is imported

import importlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton

from dnsp.kernels import proof, proof_layers, proof_run
from dnsp.kernels.launches import candidates
from dnsp.kernels.proof_run import Case, Compiling, Recording
from dnsp.kernels.reference import Rule
from dnsp.kernels.signatures import MODULES, AnySignature, Conv, ConvStep, DeltaStep, Norm, Post, Signature
from dnsp.kernels.triton_post import RING
from tests.kernels.proofs import make_signature

TOKENS = 150  # two chunks and a tail
WITH_STATES = Case(64, ("mild", "mixed"), ((0, 30, 31, 100), (0,)), True)
ONE_SEGMENT = Case(192, ("mixed", "mild"), ((0,), (0, 64)), False)
FP32, BF16, FP16, INT = torch.float32, torch.bfloat16, torch.float16, torch.int32
TUNED, APART = "as tuned", "passes apart"

# The delta rule: a signature, a case, a table of launches.
DELTA: dict[str, tuple[Signature, Case, str]] = {
    "bf16, documents": (make_signature(BF16, H=1, HV=2, K=128, V=128), WITH_STATES, TUNED),
    "bf16": (make_signature(BF16, H=1, HV=2, K=128, V=128, documents=None), ONE_SEGMENT, TUNED),
    "bf16, passes apart": (make_signature(BF16, H=1, HV=2, K=128, V=128), WITH_STATES, APART),
    "fp16, K below V": (make_signature(FP16, H=2, HV=2, K=32, V=64, documents=None), ONE_SEGMENT, TUNED),
    "fp32": (make_signature(FP32), WITH_STATES, TUNED),
    "error from the undecayed state": (make_signature(BF16, rule=Rule(error_decay="previous")), WITH_STATES, TUNED),
    "no erase, no decay": (
        make_signature(BF16, g=False, documents=None, rule=Rule(erase=False), normalise=False), WITH_STATES, TUNED,
    ),
}  # fmt: skip
AROUND: tuple[AnySignature, ...] = (
    Conv(BF16, FP32, None, None, INT, 80, 4, True),
    Conv(FP32, FP32, FP32, FP32, INT, 20, 3, False),
    Conv(FP16, FP16, None, FP16, None, 520, 2, True),
    Norm(BF16, BF16, FP32, 128, 1),
    Norm(FP16, FP16, FP16, 24, 3),
    Norm(FP32, FP32, FP32, 300, 1),
    ConvStep(BF16, BF16, BF16, None, None, 300, 4, True, True),
    ConvStep(FP32, FP32, FP32, FP32, torch.int64, 20, 3, False, False),
    DeltaStep(*(BF16,) * 5, FP32, FP32, torch.int64, 1, 2, 128, 128, Rule(), True, True),
    DeltaStep(*(FP32,) * 5, None, None, None, 1, 3, 12, 20, Rule(error_decay="previous"), True, False),
    DeltaStep(*(FP32,) * 4, None, None, None, None, 1, 1, 3, 5, Rule(erase=False), False, True),
    Post(RING),
)


def delta(signature: Signature, case: Case, device: torch.device) -> None:
    """Forward, backward, and the fold of its states with mail and without."""
    inputs = proof_run.make_inputs(signature, case, device)
    proof_run._differentiated(inputs, case, signature, "triton", None)
    for how in proof_run.FOLDS[::3]:
        proof_run._folded(signature.K, signature.V, device, how, FP32)


def around(signature: AnySignature, device: torch.device) -> None:
    cases, kernels, _ = proof_layers.FAMILIES[type(signature)]
    for tensors in cases(signature, device):
        kernels(signature, tensors)


def run(device: torch.device) -> set[str]:
    """The names of the kernels that were launched."""
    proof_run.TOKENS, proof_layers.TOKENS, proof_layers.NORM = TOKENS, (70, 2), ((37, 2),)
    compiling, recordings = {}, {}
    for table in (TUNED, APART):
        compiling[table], recordings[table] = Compiling(candidates()[table]), Recording(candidates()[table])
    if device.type == "cuda":
        with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool):
            for signature, _, table in DELTA.values():
                with proof.mode(compiling[table]):
                    proof_run._compile(device, signature)
            with proof.mode(compiling[TUNED]):
                for other in AROUND:
                    around(other, device)
    for name, (signature, case, table) in DELTA.items():
        print(name, flush=True)
        with proof.mode(recordings[table]):
            delta(signature, case, device)
    with proof.mode(recordings[TUNED]):
        for other in AROUND:
            print(other, flush=True)
            around(other, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    binaries = [binary for recording in recordings.values() for binary in recording.binaries.values()]
    return {binary["kernel"] for binary in binaries}


def kernels() -> set[str]:
    """The names of all that there are."""
    modules = [importlib.import_module(f"dnsp.kernels.{name}") for names in MODULES.values() for name in names]
    found: dict[str, Any] = {name: x for module in modules for name, x in vars(module).items()}
    return {name for name, x in found.items() if name.endswith("_kernel") and hasattr(x, "arg_names")}


if __name__ == "__main__":
    launched = run(torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda:0"))
    print(json.dumps({"launched": sorted(launched), "missing": sorted(kernels() - launched)}))
