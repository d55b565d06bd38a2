"""NVML: its absence for real, what a GPU may refuse to say, and on a GPU that the figures are there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

from dnsp import nvml
from dnsp.nvml import Sampler, throttles

GPU = torch.device("cuda", 0)


def test_no_library_and_no_gpu_are_words() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    sampler = Sampler(GPU).start()
    with pytest.raises(pynvml.NVMLError) as real:
        pynvml.nvmlInit()
    assert sampler.absent == str(real.value) and sampler.latest() == sampler.sample() == {}
    sampler.stop()
    assert nvml.count() == 0
    assert Sampler(torch.device("cpu")).start().absent == "the ranks run on the CPU"


def test_a_run_without_is_a_line(reference: Path) -> None:
    said = (reference.parent / "said.txt").read_text()
    if torch.cuda.is_available():
        assert "what MFU is of" in said
    else:
        assert said.count("no figures of GPUs: the ranks run on the CPU\n") == 1


class Gpu:
    """What a GPU answers, put into the library's place; a value that is an error is raised."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: dict[str, Any] = {
            "nvmlInit": None,
            "nvmlShutdown": None,
            "nvmlDeviceGetHandleByUUID": "handle",
            "nvmlDeviceGetPowerUsage": 612_500,
            "nvmlDeviceGetClockInfo": 1980,
            "nvmlDeviceGetCurrentClocksThrottleReasons": 0x4,
            "nvmlDeviceGetTemperature": 61,
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=3 * 2**30),
            "nvmlDeviceGetTotalEccErrors": 0,
            "nvmlDeviceGetFieldValues": [counter(0), counter(0)],
            "nvmlEventSetCreate": "events",
            "nvmlDeviceRegisterEvents": None,
            "nvmlEventSetWait_v2": pynvml.NVMLError_Timeout(),
        }
        for name in self.answers:
            monkeypatch.setattr(pynvml, name, lambda *_, name=name: self._answer(name))
        monkeypatch.setattr(nvml, "uuid_of", lambda device: "GPU-0")

    def _answer(self, name: str) -> Any:
        answer = self.answers[name]
        if isinstance(answer, list) and name == "nvmlEventSetWait_v2":
            answer = answer.pop(0) if answer else pynvml.NVMLError_Timeout()
        if isinstance(answer, Exception):
            raise answer
        return answer


def counter(kib: int, status: int = pynvml.NVML_SUCCESS) -> SimpleNamespace:
    return SimpleNamespace(nvmlReturn=status, value=SimpleNamespace(ullVal=kib))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def test_units(gpu: Gpu) -> None:
    sampler = Sampler(GPU, interval=100).start()
    try:
        assert not sampler.absent and not sampler.unsupported
        first = sampler.latest()
        assert (first["power_w"], first["memory_gib"], first["xid"]) == (612.5, 3.0, 0.0)
        assert first["nvlink_tx_gb_s"] == first["nvlink_rx_gb_s"] == 0.0
        began = sampler._links[0]  # type: ignore[index]
        gpu.answers["nvmlDeviceGetFieldValues"] = [counter(2_000_000), counter(500_000)]
        time.sleep(0.05)
        sampler.sample()
        seconds = sampler._links[0] - began  # type: ignore[index]
        latest = sampler.latest()
        assert latest["nvlink_tx_gb_s"] == pytest.approx(2.048 / seconds)
        assert latest["nvlink_rx_gb_s"] == pytest.approx(0.512 / seconds)
    finally:
        sampler.stop()


def test_what_is_not_supported_is_left_out_and_not_asked_again(gpu: Gpu) -> None:
    gpu.answers["nvmlDeviceGetPowerUsage"] = pynvml.NVMLError_NotSupported()
    gpu.answers["nvmlDeviceRegisterEvents"] = pynvml.NVMLError_NotSupported()
    gpu.answers["nvmlDeviceGetFieldValues"] = [counter(0, pynvml.NVML_ERROR_NOT_SUPPORTED)] * 2
    sampler = Sampler(GPU, interval=100).start()
    try:
        assert sorted(sampler.unsupported) == ["nvlink_rx_gb_s", "nvlink_tx_gb_s", "power_w", "xid"]
        gpu.answers["nvmlDeviceGetPowerUsage"] = 1000
        sampler.sample()
        assert "power_w" not in sampler.latest() and sampler.latest()["temperature_c"] == 61
    finally:
        sampler.stop()


def test_a_failure_of_a_moment_is_a_gap(gpu: Gpu) -> None:
    sampler = Sampler(GPU, interval=100).start()
    try:
        gpu.answers["nvmlDeviceGetTemperature"] = pynvml.NVMLError_GpuIsLost()
        sampler.sample()
        assert "temperature_c" not in sampler.latest() and not sampler.unsupported
        gpu.answers["nvmlDeviceGetTemperature"] = 70
        sampler.sample()
        assert sampler.latest()["temperature_c"] == 70
    finally:
        sampler.stop()


def test_xid_errors_are_kept(gpu: Gpu) -> None:
    sampler = Sampler(GPU, interval=100).start()
    try:
        gpu.answers["nvmlEventSetWait_v2"] = [SimpleNamespace(eventData=31), SimpleNamespace(eventData=79)]
        sampler.sample()
        assert sampler.latest()["xid"] == 79
        sampler.sample()
        assert sampler.latest()["xid"] == 79
    finally:
        sampler.stop()


def test_a_gpu_that_the_library_does_not_know(gpu: Gpu) -> None:
    gpu.answers["nvmlDeviceGetHandleByUUID"] = pynvml.NVMLError_NotFound()
    assert "Not Found" in Sampler(GPU).start().absent


def test_it_samples_by_itself(gpu: Gpu) -> None:
    sampler = Sampler(GPU, interval=0.01).start()
    try:
        gpu.answers["nvmlDeviceGetTemperature"] = 80
        deadline = time.monotonic() + 10
        while sampler.latest().get("temperature_c") != 80:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        sampler.stop()
    assert sampler._thread is None


def test_only_what_slows_a_clock_down_is_named() -> None:
    assert throttles(0x1 | 0x2 | 0x100) == ""  # idle, the user's own clocks, the display's
    assert throttles(0x8 | 0x20 | 0x80) == "hardware slowdown, software thermal slowdown, power brake"


@pytest.mark.gpu
@pytest.mark.timeout(400)
def test_the_figures_of_a_gpu(workplace: Path, dnsp: Callable[..., Any]) -> None:
    """Read on a real GPU, and written by a run: power, clocks, memory, phases that add up, an MFU of less than one."""
    sampler = Sampler(GPU, interval=0.1).start()
    try:
        assert not sampler.absent
        latest = sampler.latest()
        assert 10 < latest["power_w"] < 2000 and latest["sm_clock_mhz"] > 100 and latest["memory_gib"] > 0
        assert 10 < latest["temperature_c"] < 110
        assert latest.get("xid", 0.0) == 0.0
    finally:
        sampler.stop()
    widths = ("model.head_dim=64", "model.linear_key_head_dim=64", "model.linear_value_head_dim=64")
    options = ("data.sequence_length=1024", "engine.dtype=bf16", "run.timeout=200", "train.steps=8", "run.dir=figures")
    done = dnsp("train", "tiny.yaml", *widths, *options, cwd=workplace, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "what MFU is of" in done.stdout and " MFU 0." in done.stdout
    records = [json.loads(line) for line in (workplace / "figures" / "metrics.jsonl").read_text().splitlines()]
    for record in records[1:]:
        assert 0 < record["mfu"] < 1
        assert record["power_w"] > 10 and record["sm_clock_mhz"] > 100 and record["temperature_c"] > 10
        phases = ("data_s", "forward_s", "backward_s", "communication_s", "optimizer_s")
        assert all(record[phase] >= 0 for phase in phases) and record["forward_s"] > 0 and record["backward_s"] > 0
        inside = [phase for phase in phases if phase != "optimizer_s"]  # which is that of the step before
        assert sum(record[phase] for phase in inside) < 1.5 * record["step_s"]
