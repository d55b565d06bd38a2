"""The proofs of the delta rule's kernels: right ones pass, wrong ones do not, and nothing runs unproven.

What computes runs under Triton's interpreter (:mod:`tests.kernels.interpreter`), and on a GPU.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from dnsp.kernels import chunk_triton, proof, proof_run
from dnsp.kernels.conv import causal_conv1d
from dnsp.kernels.delta_rule import chunk_gated_delta_rule
from dnsp.kernels.launches import Launch, Launches, candidates
from dnsp.kernels.reference import Rule
from dnsp.kernels.segments import Inputs
from dnsp.kernels.signatures import Fold, Signature, from_json, to_json
from tests.kernels.interpreter import Interpreter
from tests.kernels.proofs import CPU, DELTA, H200, make_signature, wrong
from tests.kernels.triton_compile import another_ptxas

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", DELTA)
def test_inputs_are_laid_out_as_the_signature_says(name: str) -> None:
    signature = DELTA[name]
    assert from_json(json.loads(json.dumps(to_json(signature)))) == signature
    for case in proof_run.CASES:
        made = proof_run.make_inputs(signature, case, CPU)
        x = Inputs(
            *(made.get(n) for n in ("q", "k", "v", "g", "beta", "doc_start")),  # type: ignore[arg-type]
            proof_run._segments(case, made.get("doc_start")), 0.25, signature.rule, signature.normalise,
        )  # fmt: skip
        assert Signature.of(x) == signature
        assert all(t.data_ptr() % 16 == 0 and t.stride(0) % 16 == 0 for t in made.values() if t.is_floating_point())


def test_a_fold_is_a_signature_too() -> None:
    fold = Fold(64, 128)
    assert from_json(json.loads(json.dumps(to_json(fold)))) == fold


# Kernels that compute.

OTHER = itertools.count()  # never the same again: a run may launch a kernel once or twice
WRONG: dict[str, tuple[str, str, Callable[[Tensor], Any], str]] = {
    "a column": ("keys_kernel", "dk", lambda x: x[..., 3].mul_(1.5), "dk is off by .* look at pairs or keys"),
    "a chunk": ("queries_kernel", "dq", lambda x: x[1, 64:128].zero_(), "dq is off by .* look at pairs or queries"),
    "not a number": ("reverse_kernel", "dv", lambda x: x[0, 5].fill_(torch.nan), "dv is off by inf"),
    "other bits": ("gates_kernel", "dbeta", lambda x: x.mul_(1 + 1e-6 * next(OTHER)), "two runs give dbeta"),
    "nothing": ("keys_kernel", "dk", lambda x: None, "None"),
}


def what_is_wrong(name: str, device: torch.device, signature: Signature, table: str = "passes apart") -> str:
    """What the prover says of kernels of which one computes wrong numbers."""
    kernel, output, change, _ = WRONG[name]
    with wrong(chunk_triton, kernel, output, change):
        return str(proof_run.prove(device, signature, candidates()[table])["wrong"])


def said_interpreted(name: str) -> str:
    logging.disable()
    proof_run.TOKENS = 72  # enough for a segment and a tail, and quickly interpreted
    proof_run.CASES = (proof_run.Case(64, ("mild", "mixed"), ((0, 30, 31, 66), (0,)), True),)
    return what_is_wrong(name, CPU, make_signature(HV=1))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels_are_found(interpreter: Interpreter, name: str) -> None:
    assert_said(name, interpreter("test_proof:said_interpreted", name))


def assert_said(name: str, said: str) -> None:
    assert re.match(WRONG[name][3], said), (name, said)


LEFT_ALONE = """
import os, subprocess, sys
child = "import os, time; from dnsp.kernels.proof_run import end_with; end_with(%d); print(os.getpid(), flush=True)"
waiting = [sys.executable, "-c", child % os.getpid() + "; time.sleep(60)"]
print(subprocess.Popen(waiting, stdout=subprocess.PIPE, text=True).stdout.readline(), flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_child_whose_parent_was_killed_ends() -> None:
    killed = subprocess.run(
        [sys.executable, "-c", LEFT_ALONE], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert killed.stdout.strip().isdigit(), killed.stderr
    deadline = time.monotonic() + 20
    while runs(int(killed.stdout)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not runs(int(killed.stdout))


def runs(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_child_proves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, memory: Callable[[], None]) -> None:
    """The real one, interpreted: from the task on its stdin to the verdict on disk."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("DNSP_PROOFS", str(tmp_path))
    monkeypatch.setattr(proof, "toolchain", lambda device: H200)
    verdict = proof.establish(CPU, make_signature(HV=1))
    assert verdict.table == "as tuned" and verdict.errors.keys() >= {"o", "final", "dq", "dk", "dv", "dg", "dbeta"}
    assert max(verdict.errors.values()) < 1e-5


# On a GPU.

GPU = {
    "model": make_signature(torch.bfloat16, H=2, HV=4, K=128, V=128),
    "no documents": make_signature(torch.bfloat16, H=2, HV=4, K=128, V=128, documents=None),
    "narrow": make_signature(torch.bfloat16, H=2, HV=4, K=32, V=32),
    "wide": make_signature(torch.bfloat16, H=1, HV=1, K=256, V=256),
    "previous": make_signature(torch.bfloat16, H=2, HV=2, K=64, V=128, rule=Rule(error_decay="previous")),
    "no erase": make_signature(torch.bfloat16, H=2, HV=2, K=64, V=16, g=False, rule=Rule(erase=False)),
    "fp16": make_signature(torch.float16, H=2, HV=4, K=128, V=128),
}
# Launches that are known to compute wrong numbers: the capability and Triton where they do, the signature, the table.
# Each was right in the interpreter, and with 4 warps or 64 columns.
KNOWN_WRONG: dict[str, tuple[tuple[int, int], str, Signature, Launches]] = {
    "pairs by 32 columns in 8 warps": (
        (9, 0), "3.6.0", GPU["no documents"],
        {**candidates()["passes apart"], "pairs": Launch(32, 8, 3, 128)},
    ),
    "pairs in 16 warps": (
        (9, 0), "3.6.0", GPU["no documents"],
        {**candidates()["passes apart"], "pairs": Launch(64, 16, 2)},
    ),
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", GPU)
def test_right_kernels_are_proven_on_gpu(name: str) -> None:
    found = proof_run.prove(torch.device("cuda:0"), GPU[name], candidates()["as tuned"])
    assert found["wrong"] is None and len(found["binaries"]) >= 9, found
    one = torch.cuda.get_device_capability()[0] == 9 and name in ("model", "no documents", "fp16")
    assert one == ("backward_kernel" in {binary["kernel"] for binary in found["binaries"]})


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_passes_apart_are_proven_on_gpu() -> None:
    found = proof_run.prove(torch.device("cuda:0"), GPU["model"], candidates()["passes apart"])
    assert found["wrong"] is None, found
    assert "backward_kernel" not in {binary["kernel"] for binary in found["binaries"]}


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels_are_found_on_gpu(name: str) -> None:
    # Every time another factor of an fp32 result shows in its bits; in bf16's it may not.
    assert_said(name, what_is_wrong(name, torch.device("cuda:0"), GPU["model"]))


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", KNOWN_WRONG)
def test_known_wrong_launches_are_refused_on_gpu(name: str) -> None:
    capability, version, signature, table = KNOWN_WRONG[name]
    if (capability, version) != (torch.cuda.get_device_capability(), sys.modules["triton"].__version__):
        pytest.skip(f"known of capability {capability} with Triton {version}")
    said = proof_run.prove(torch.device("cuda:0"), signature, table)["wrong"]
    assert said is not None and "pairs" in said, said


CALL = """
import time
import torch
from tests.kernels.test_proof import call, leaves
inputs = leaves()
torch.cuda.synchronize()
began = time.perf_counter()
call(inputs)
torch.cuda.synchronize()
print(time.perf_counter() - began)
"""


def leaves() -> list[Tensor]:
    """Inputs of 8 key and 16 value heads."""
    draw = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, 700, h, 128, device="cuda", generator=draw).bfloat16() for h in (8, 8, 16))
    g, beta = (torch.rand(1, 700, 16, device="cuda", generator=draw) for _ in range(2))
    return [x.detach().requires_grad_() for x in (q, k, v, -g, beta)]


def call(inputs: list[Tensor]) -> Tensor:
    """Forward and backward of the public op, by the real way."""
    o, _ = chunk_gated_delta_rule(*inputs, use_qk_l2norm_in_kernel=True)  # type: ignore[arg-type]
    return torch.autograd.grad(o.float().square().sum(), inputs)[1]


@pytest.mark.gpu
@pytest.mark.timeout(900)
def test_first_and_second_process_on_gpu(tmp_path: Path) -> None:
    """A cold cache, a process that finds the verdict, and one that finds Triton's binaries gone; seconds of each."""
    environment = os.environ | {
        "DNSP_PROOFS": str(tmp_path / "proofs"),
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        "DNSP_DELTA_RULE": "triton",
    }
    seconds = []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", CALL], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
        )
        assert run.returncode == 0, run.stderr[-2000:]
        seconds.append(float(run.stdout.splitlines()[-1]))
        assert ("proving" in run.stderr) == (len(seconds) == 1), run.stderr
    print(f"first call {seconds[0]:.1f} s, second process {seconds[1]:.2f} s")
    assert seconds[0] < 30 and seconds[1] < 3, seconds


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_capture_and_waiting_on_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: Callable[[], None]
) -> None:
    """Unproven, a capture is refused; proven, nothing waits for the device."""
    monkeypatch.setenv("DNSP_PROOFS", str(tmp_path))
    monkeypatch.setenv("DNSP_DELTA_RULE", "triton")
    inputs = leaves()
    with pytest.raises(proof.UnprovenError, match="once before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        call(inputs)
    torch.cuda.synchronize()
    expected = call(inputs)
    began = time.perf_counter()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = call(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert time.perf_counter() - began < 1
    assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_a_proof_holds_behind_inductor_on_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: Callable[[], None]
) -> None:
    """torch.compile points Triton to another ptxas in the middle of a process: what is proven then is what runs."""
    monkeypatch.setenv("DNSP_PROOFS", str(tmp_path / "proofs"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    x, weight = torch.randn(1, 300, 64, device="cuda"), torch.randn(64, 4, device="cuda")
    causal_conv1d(x, weight, backend="triton")
    monkeypatch.setenv("TRITON_PTXAS_PATH", another_ptxas(tmp_path))
    found = causal_conv1d(x.bfloat16(), weight, activation=None, backend="triton")
    assert not (tmp_path / "asked").exists()
    want = causal_conv1d(x.bfloat16().double(), weight.double(), activation=None, backend="torch")
    assert float((found - want).norm() / want.norm()) < 5e-3
