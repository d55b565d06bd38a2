"""What doctor says on this machine, and on machines that lack something."""

from __future__ import annotations

import importlib.metadata
import io
import json
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from dnsp import doctor
from dnsp.cli import main


def examine(section: str) -> dict[str, doctor.Finding]:
    return {f.name: f for f in doctor.examine() if f.section == section}


def silent() -> Console:
    return Console(file=io.StringIO(), width=120)


def test_this_machine_is_well_enough_to_run_the_suite(tmp_path: Path) -> None:
    console, file = silent(), tmp_path / "doctor.json"
    assert doctor.run(file, console) == 0
    report = json.loads(file.read_text())
    assert report["ok"] is True
    by_name = {f["name"]: f for f in report["findings"]}
    assert by_name["torch"]["found"] == importlib.metadata.version("torch")
    assert by_name["gloo"]["status"] == "ok"
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(section in shown for section in doctor.SECTIONS)


def test_whatever_is_not_well_has_a_cure() -> None:
    unwell = [f for f in doctor.examine() if f.status in ("missing", "warn")]
    assert all(f.cure for f in unwell), unwell


@pytest.mark.parametrize(
    ("asked", "found"),
    [("no-such-package-of-dnsp>=2", "not installed"), ("pydantic<1", "wanted <1")],
)
def test_a_required_package_that_is_missing_or_too_old_fails_with_its_cure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: str, found: str
) -> None:
    monkeypatch.setattr(doctor, "requirements", lambda: [Requirement(asked)])
    file = tmp_path / "doctor.json"
    assert doctor.run(file, silent()) == 1
    (missing,) = [f for f in json.loads(file.read_text())["findings"] if f["status"] == "missing"]
    assert found in missing["found"]
    assert asked in missing["cure"]


def test_requirements_are_known_without_an_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    def required(which: list[Requirement]) -> set[tuple[str, str]]:
        return {(r.name, str(r.specifier)) for r in which if not (r.marker and "extra" in str(r.marker))}

    def none(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", none)
    wanted = doctor.requirements()
    assert ("torch", "<2.14,>=2.11") in required(wanted)
    extra = [r for r in wanted if r.name == "transformers" and r.marker and r.marker.evaluate({"extra": "hf"})]
    assert extra and not extra[0].marker.evaluate({"extra": ""})  # type: ignore[union-attr]


def test_no_driver_is_said_and_is_not_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def no_driver() -> None:
        raise pynvml.NVMLError_LibraryNotFound()

    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    gpu = examine("devices")["gpu"]
    assert gpu.status == "absent" and "driver" in gpu.found


def test_a_section_that_breaks_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it raises
    monkeypatch.setitem(sys.modules, "torch", None)
    findings = doctor.examine()
    assert any(f.section == "devices" and f.status == "warn" and "torch" in f.found for f in findings)
    assert {f.section for f in findings} == set(doctor.SECTIONS)


def test_launcher_variables_that_contradict_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    rows = examine("launcher")
    assert rows["launcher"].status == "warn" and "WORLD_SIZE" in rows["launcher"].found
    assert rows["RANK"].found == "3"


def test_a_gpu_that_torch_cannot_use_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml
    import torch

    class Memory:
        free, total = 140 * 2**30, 141 * 2**30

    for name, value in {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlSystemGetDriverVersion": "580.1",
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": 0,
        "nvmlDeviceGetMemoryInfo": Memory,
        "nvmlDeviceGetName": "NVIDIA H200",
    }.items():
        monkeypatch.setattr(pynvml, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = examine("devices")
    assert rows["gpu 0"].status == "ok" and rows["gpu 0"].found == "NVIDIA H200, 140 of 141 GiB free, driver 580.1"
    assert rows["torch and CUDA"].status == "warn" and "CUDA_VISIBLE_DEVICES" in rows["torch and CUDA"].cure


def test_a_file_that_cannot_be_written_is_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (tmp_path, tmp_path / "no folder" / "doctor.json"):
        assert main(["doctor", "--json", str(file)]) == 2
        output = capsys.readouterr()
        assert str(file) in output.err and not output.out
