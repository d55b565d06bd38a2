"""Which binaries may run: verdicts, how they are made and kept, children that crash. Nothing is computed here."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from triton import knobs
from triton.backends.nvidia.compiler import get_ptxas_version

from dnsp.kernels import assembler, launches, proof, verdicts
from dnsp.kernels.launches import candidates
from dnsp.kernels.signatures import AnySignature, Signature
from tests.kernels.proofs import CPU, DELTA, H200, make_signature
from tests.kernels.triton_compile import another_ptxas

TABLES = list(candidates())


class FakeKernel:
    """Runs nothing; its binary has a hash."""

    __name__ = "fake_kernel"

    def __init__(self, hash: str | None) -> None:
        self.binary = None if hash is None else type("Binary", (), {"hash": hash})

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return lambda *args, **constants: self.binary


def test_a_binary_that_is_not_proven_is_an_error(memory: Callable[[], None]) -> None:
    proof._proven.add("good")
    proof.launch(FakeKernel("good"), (1,), 1, BV=64)
    proof.launch(FakeKernel(None), (1,))  # interpreted
    with pytest.raises(proof.UnprovenError, match=r"fake_kernel.*'BV': 64.*backend='torch'"):
        proof.launch(FakeKernel("other"), (1,), 1, BV=64)


# Children that compute nothing.

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


def establish(signature: AnySignature = DELTA["model"], **options: bool) -> verdicts.Verdict:
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


def test_a_child_takes_the_assembler_that_triton_has_noted(
    children: Children, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Inductor sets the variable while a process runs, and children inherit it."""
    noted = knobs.nvidia.ptxas.path
    get_ptxas_version(90)
    monkeypatch.setenv("TRITON_PTXAS_PATH", another_ptxas(tmp_path))
    assembler.variable.cache_clear()  # it is looked for now
    children.otherwise = report(binary="PTXAS")[:-1] + ".replace('PTXAS', os.environ['TRITON_PTXAS_PATH']))"
    assert Path(establish().binaries[0]["hash"]).samefile(noted)


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
        lambda: monkeypatch.setitem(launches.LAUNCHES, "keys", replace(launches.LAUNCHES["keys"], warps=2)),
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
    assert proof._tables[CPU, Signature, DELTA["model"]] == candidates()[TABLES[2]]
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
        proof._first_time(CPU, DELTA["model"])
    establish()
    assert proof._first_time(CPU, DELTA["model"]) == candidates()["as tuned"]
