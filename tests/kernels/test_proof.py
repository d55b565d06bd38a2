"""Which binaries may run: verdicts and how they are kept, children that crash, wrong kernels that are found.

What computes runs under Triton's interpreter in a process of its own (this file, ``python -m tests.kernels.test_proof
NAME``), and on a GPU. Long because verdicts, children and kernels share the stand-ins that make them fail.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from dnsp.kernels import chunk_triton, proof, proof_run, verdicts
from dnsp.kernels.delta_rule import chunk_gated_delta_rule
from dnsp.kernels.reference import Rule
from dnsp.kernels.segments import Inputs
from dnsp.kernels.signatures import AnySignature, Fold, Signature, from_json, to_json
from dnsp.kernels.verdicts import Launches, Toolchain, candidates

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
H200 = Toolchain("NVIDIA H200", (9, 0), "3.6.0", "12.8.93", "of the tests")
TABLES = list(candidates())


def make_signature(
    dtype: torch.dtype = torch.float32,
    H: int = 1,
    HV: int = 2,
    K: int = 16,
    V: int = 16,
    g: bool = True,
    documents: torch.dtype | None = torch.int32,
    rule: Rule = Rule(),  # noqa: B008 (frozen)
    normalise: bool = True,
) -> Signature:
    """Of q, k and v as a model splits them from one tensor."""
    width = 2 * H * K + HV * V
    qk = width, K if H > 1 else 0
    gates = HV, 1 if HV > 1 else 0
    return Signature(
        dtype, H, HV, K, V, qk, qk, (width, V if HV > 1 else 0), gates, torch.float32,
        gates if g else None, torch.float32 if g else None, documents, rule, normalise,
    )  # fmt: skip


SIGNATURES = {
    "model": make_signature(),
    "no decay": make_signature(torch.bfloat16, H=2, HV=4, g=False, documents=None, rule=Rule(erase=False)),
    "expanded": make_signature(HV=4, documents=torch.int64)._replace(beta=(0, 1), g=(1, 0), normalise=False),
}


# Launches.


class FakeKernel:
    """Runs nothing; its binary has a hash."""

    __name__ = "fake_kernel"

    def __init__(self, hash: str | None) -> None:
        self.binary = None if hash is None else type("Binary", (), {"hash": hash})

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return lambda *args, **constants: self.binary


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Nothing is known; called, it makes this process forget, as another one would know nothing."""

    def forget() -> None:
        monkeypatch.setattr(proof, "_proven", set())
        monkeypatch.setattr(proof, "_tables", {})

    forget()
    return forget


def test_a_binary_that_is_not_proven_is_an_error(memory: Callable[[], None]) -> None:
    proof._proven.add("good")
    proof.launch(FakeKernel("good"), (1,), 1, BV=64)
    proof.launch(FakeKernel(None), (1,))  # interpreted
    with pytest.raises(proof.UnprovenError, match=r"fake_kernel.*'BV': 64.*backend='torch'"):
        proof.launch(FakeKernel("other"), (1,), 1, BV=64)


# Signatures and inputs.


@pytest.mark.parametrize("name", SIGNATURES)
def test_inputs_are_laid_out_as_the_signature_says(name: str) -> None:
    signature = SIGNATURES[name]
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


# Verdicts, with children that compute nothing.

BEGAN = "print('{\"began\": true}', flush=True)"


def report(wrong: str | None = None, binary: str = "abc") -> str:
    said = {
        "wrong": wrong,
        "errors": {"o": 0.003},
        "binaries": [{"hash": binary, "kernel": "keys_kernel", "constants": {}, "warps": 4, "stages": 1}],
    }
    return f"{BEGAN}; print({json.dumps(said)!r})"


class Children:
    """What a child does is told by the table that it is given; ``asked`` are the tables in their order."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "asked"
        self.does: dict[str, str] = {}
        self.otherwise = report()

    @property
    def asked(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def command(self) -> list[str]:
        code = [
            "import json, os, signal, sys, time",
            "table = json.load(sys.stdin)['table']",
            f"print(table, file=open({str(self.log)!r}, 'a'))",
            f"exec({self.does!r}.get(table, {self.otherwise!r}))",
        ]
        return [sys.executable, "-c", "\n".join(code)]


@pytest.fixture
def children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: Callable[[], None]) -> Children:
    made = Children(tmp_path)
    monkeypatch.setenv("DNSP_PROOFS", str(tmp_path / "proofs"))
    monkeypatch.setattr(proof, "toolchain", lambda device: H200)
    monkeypatch.setattr(proof, "child_command", made.command)
    return made


def establish(signature: AnySignature = SIGNATURES["model"], **options: bool) -> verdicts.Verdict:
    return proof.establish(CPU, signature, **options)


def test_a_verdict_is_made_once_and_kept(children: Children, memory: Callable[[], None]) -> None:
    assert establish().table == "as tuned" and "abc" in proof._proven
    memory()
    assert establish().errors == {"o": 0.003}
    assert children.asked == ["as tuned"] and "abc" in proof._proven
    (file,) = verdicts.folder().glob("NVIDIA-H200-9.0-triton-3.6.0-ptxas-12.8.93/*.json")
    kept = json.loads(file.read_text())
    assert kept["gpu"] == "NVIDIA H200" and kept["binaries"][0]["kernel"] == "keys_kernel" and kept["date"]
    assert "normalised q and k" in kept["what"]
    assert not list(verdicts.folder().rglob("*.tmp"))


def test_asked_again_it_is_made_again(children: Children) -> None:
    establish()
    establish(again=True)
    assert children.asked == ["as tuned"] * 2


def test_whatever_decides_the_binaries_is_proven_anew(
    children: Children, memory: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: list[Callable[[], Any]] = [
        lambda: None,
        lambda: monkeypatch.setattr(proof, "toolchain", lambda device: H200._replace(identity="another Triton")),
        lambda: monkeypatch.setattr(verdicts, "_sources", lambda kind: {"keys_kernel": "another text"}),
        lambda: monkeypatch.setitem(chunk_triton.LAUNCHES, "keys", replace(chunk_triton.LAUNCHES["keys"], warps=2)),
    ]
    for n, change in enumerate(changes, 1):
        change()
        memory()
        establish()
        assert len(children.asked) == n
    memory()
    establish(make_signature(V=32))
    assert len(children.asked) == len(changes) + 1


CORRUPT = ["", "{", "[]", '{"table": "of another program", "binaries": []}', '{"table": null}']


@pytest.mark.parametrize("content", CORRUPT)
def test_a_corrupt_verdict_is_survived(
    children: Children, memory: Callable[[], None], caplog: pytest.LogCaptureFixture, content: str
) -> None:
    establish()
    (file,) = verdicts.folder().rglob("*.json")
    file.write_text(content)
    memory()
    assert establish().table == "as tuned"
    assert len(children.asked) == 2 and "proven anew" in caplog.text
    memory()
    establish()
    assert len(children.asked) == 2


def test_a_folder_that_cannot_be_written_is_survived_with_a_word(
    children: Children, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DNSP_PROOFS", str(tmp_path / "file" / "proofs"))
    assert establish().table == "as tuned"
    assert "DNSP_PROOFS" in caplog.text and str(tmp_path / "file") in caplog.text


def test_tables_are_tried_in_their_order_and_the_first_right_one_is_used(
    children: Children, memory: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    children.does = {TABLES[0]: report("dk is off by 8.8e-01"), TABLES[1]: f"{BEGAN}; os.abort()"}
    verdict = establish()
    assert children.asked == TABLES[:3] and verdict.table == TABLES[2]
    assert verdict.refused[TABLES[0]] == "dk is off by 8.8e-01" and "signal 6" in verdict.refused[TABLES[1]]
    assert proof._tables[CPU, Signature, SIGNATURES["model"]] == candidates()[TABLES[2]]
    assert "refused: dk is off by 8.8e-01" in caplog.text and f"{TABLES[2]} are proven" in caplog.text
    memory()
    assert establish().refused == verdict.refused and len(children.asked) == 3


def test_where_no_table_is_right_the_error_says_what_was_wrong_where(
    children: Children, memory: Callable[[], None]
) -> None:
    children.otherwise = report("dq is off by 1.0e+00")
    for _ in range(2):
        with pytest.raises(proof.UnprovenError) as error:
            establish()
        for part in ("NVIDIA H200", "Triton 3.6.0", "K=16", "as tuned: dq is off", "backend='torch'", *TABLES):
            assert part in str(error.value)
        memory()
    assert children.asked == TABLES  # the second time from the disk
    assert not proof._proven


CRASHES = {
    "abort": ("print('illegal memory access', file=sys.stderr); os.abort()", "signal 6: illegal memory access"),
    "exit": ("sys.exit(3)", "status 3: nothing on stderr"),
    "hang": ("signal.alarm(1); time.sleep(60)", "the kernels did not end"),
}


@pytest.mark.parametrize("name", CRASHES)
def test_a_child_that_crashes_or_hangs_refuses_its_table(children: Children, name: str) -> None:
    does, said = CRASHES[name]
    children.does = {"as tuned": f"{BEGAN}; {does}"}
    assert said in establish().refused["as tuned"]


UNABLE = {
    "no device": "print('CUDA error: all devices are busy', file=sys.stderr); sys.exit(1)",
    "no memory": f"""{BEGAN}; print('{{"unable": "out of memory, and the devices are busy"}}')""",
    "ended": f"print('the devices are busy', file=sys.stderr); {BEGAN}; os.kill(os.getpid(), signal.SIGTERM)",
}


@pytest.mark.parametrize("name", UNABLE)
def test_a_child_that_never_had_its_chance_is_no_verdict(children: Children, name: str) -> None:
    children.otherwise = UNABLE[name]
    for n in (1, 2):
        with pytest.raises(proof.UnprovenError, match="devices are busy|signal 15") as error:
            establish()
        assert error.value.verdict is None and "dnsp doctor --prove" in str(error.value)
        assert children.asked == ["as tuned"] * n


def test_ranks_that_start_together_prove_once(children: Children) -> None:
    children.otherwise = f"time.sleep(0.5); {report()}"
    ranks = [threading.Thread(target=establish) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert children.asked == ["as tuned"]


def test_a_first_call_in_a_capture_is_refused(children: Children, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(proof.UnprovenError, match="once before the capture"):
        proof._first_time(CPU, SIGNATURES["model"])
    establish()
    assert proof._first_time(CPU, SIGNATURES["model"]) == candidates()["as tuned"]


# Kernels that compute.


class Wrong:
    """A kernel that is right but for the last of its outputs of a name, which it changes."""

    def __init__(self, kernel: Any, output: str, change: Callable[[Tensor], Any]) -> None:
        self.kernel, self.change = kernel, change
        self.__name__, self.at = kernel.__name__, kernel.arg_names.index(output)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(*args: Any, **constants: Any) -> Any:
            binary = self.kernel[grid](*args, **constants)
            if not constants.get("SUMMARY"):  # there an output may be unused, and one of the inputs stand in its place
                self.change(args[self.at])
            return binary

        return run


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
    right = getattr(chunk_triton, kernel)
    setattr(chunk_triton, kernel, Wrong(right, output, change))
    try:
        return str(proof_run.prove(device, signature, candidates()[table])["wrong"])
    finally:
        setattr(chunk_triton, kernel, right)


def interpret(names: list[str]) -> dict[str, str]:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.kernels.test_proof", *names]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.timeout(300)
def test_wrong_kernels_are_found() -> None:
    for name, said in interpret(list(WRONG)).items():
        assert_said(name, said)


def assert_said(name: str, said: str) -> None:
    import re

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
    verdict = establish(make_signature(HV=1))
    assert verdict.table == "as tuned" and verdict.errors.keys() >= {"o", "final", "dq", "dk", "dv", "dg", "dbeta"}
    assert max(verdict.errors.values()) < 1e-5


# Compiled for a GPU that need not be there, in a process with a driver of its own.

COMPILED = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from dnsp.kernels import chunk_triton, proof, proof_run, triton_scan
from dnsp.kernels.segments import Inputs, Segments
from dnsp.kernels.signatures import Signature
from dnsp.kernels.verdicts import candidates
from tests.kernels.test_proof import SIGNATURES


class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)


class Compiling(proof_run.Compiling):
    hashes = set()

    def launch(self, kernel, grid, args, constants):
        self.hashes.add(kernel.warmup(*args, grid=grid, **constants).hash)


driver.set_active(Driver())
s = SIGNATURES["model"]
found = []
for B, T, tokens, off in ((2, 436, 128, 0), (1, 1000, 1024, 1), (3, 64, 64, 1)):
    mode = Compiling(candidates()["as tuned"])
    mode.hashes = set()
    wide = torch.zeros(B, T, s.q[0], dtype=s.dtype)
    q, k, v = wide.split([16, 16, 32], -1)
    odd = torch.zeros(2, B * T * 2 + 1)[:, off:]  # addresses that are no multiples of 16
    g, beta = (x[: B * T * 2].view(B, T, 2) for x in odd)
    doc = torch.zeros(B * T + 1, dtype=torch.int32)[off:][: B * T].view(B, T)
    if B == 1:  # a batch's stride beyond 2^31
        q, k, v, g = (x.as_strided(x.shape, (2**33, *x.stride()[1:])) for x in (q, k, v, g))
    part = Segments(tokens, tuple(range(0, T, tokens)), T)
    x = Inputs(q.unflatten(-1, (1, 16)), k.unflatten(-1, (1, 16)), v.unflatten(-1, (2, 16)), g, beta, doc, part, 1,
               s.rule, s.normalise)
    assert Signature.of(x) == s
    with proof.mode(mode):
        p = chunk_triton.prepare(x)
        yes = (True,) * len(part)
        M, U = chunk_triton.summarise(p, yes, yes)
        do = torch.zeros(B, 2, T, 16, dtype=s.dtype).transpose(1, 2)
        D = chunk_triton.summarise_backward(p, do, yes)
        chunk_triton.apply(p, U), chunk_triton.apply_backward(p, U, do, lambda: D)
        passes = torch.ones(len(part) * B + 1, dtype=torch.bool)[off:][: len(part) * B].view(len(part), B)
        triton_scan.fold(M, U, None, passes, 1, False)
    found.append(mode.hashes)
print(len(found[0]), len(set.union(*found)))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_signature_decides_the_binaries() -> None:
    """Lengths, batches, segments, addresses and the layout of the output's gradient do not."""
    command = [sys.executable, "-c", COMPILED]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    first, all_of_them = map(int, run.stdout.split())
    assert first == all_of_them == 12


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
        {**candidates()["passes apart"], "pairs": chunk_triton.Launch(32, 8, 3, 128)},
    ),
    "pairs in 16 warps": (
        (9, 0), "3.6.0", GPU["no documents"],
        {**candidates()["passes apart"], "pairs": chunk_triton.Launch(64, 16, 2)},
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
    wrong = proof_run.prove(torch.device("cuda:0"), signature, table)["wrong"]
    assert wrong is not None and "pairs" in wrong, wrong


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


if __name__ == "__main__":
    logging.disable()
    torch.set_num_threads(1)
    proof_run.TOKENS = 136  # enough for two segments and a tail, and quickly interpreted
    proof_run.CASES = (proof_run.Case(64, ("mild", "mixed"), ((0, 30, 31, 90), (0,)), True),)
    print(json.dumps({name: what_is_wrong(name, CPU, make_signature(HV=1)) for name in sys.argv[1:]}))
