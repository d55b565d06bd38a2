"""What NVIDIA's management library says of this rank's GPU, sampled beside the training, never by it.

A thread of its own asks once a second; :meth:`Sampler.latest` reads the last answer. Without the library, a driver or a
GPU there is a reason in words instead. What a GPU does not report is left out, and named once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pynvml

if TYPE_CHECKING:
    import torch  # not where a host is only asked how many GPUs it has: doctor --hostfile asks many

INTERVAL = 1.0  # seconds between samples
GIB = 2**30
EVERY_LINK = 2**32 - 1  # the scope of an NVLink counter that sums over links

# why a GPU's clock is below its highest; nvmlClocksEventReason*. Idle and the user's own settings are no trouble
THROTTLES = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


def count() -> int:
    """GPUs of this machine; 0 without a driver."""
    try:
        pynvml.nvmlInit()
        try:
            return int(pynvml.nvmlDeviceGetCount())
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return 0


def driver() -> str | None:
    """The version of this machine's driver; None without one."""
    try:
        pynvml.nvmlInit()
        try:
            return str(pynvml.nvmlSystemGetDriverVersion())
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None


def throttles(mask: int) -> str:
    """The reasons in a mask, in words; empty where nothing is wrong.

    >>> throttles(0x1 | 0x4 | 0x40)
    'power cap, hardware thermal slowdown'
    """
    return ", ".join(words for bit, words in THROTTLES.items() if mask & bit)


class Sampler:
    """Samples one GPU until :meth:`stop`.

    Figures (of :meth:`latest`): ``power_w``, ``sm_clock_mhz``, ``memory_clock_mhz``, ``throttle`` (a mask, see
    :func:`throttles`), ``temperature_c``, ``memory_gib`` in use by all processes, ``nvlink_tx_gb_s`` and
    ``nvlink_rx_gb_s`` (10^9 bytes a second since the last sample), ``ecc_corrected``, ``ecc_uncorrected`` (errors since
    the driver was loaded) and ``xid``, the code of the last fault that the driver reported since :meth:`start`.
    """

    def __init__(self, device: torch.device, interval: float = INTERVAL) -> None:
        self.device, self.interval = device, interval
        self.absent = ""  # why there is nothing to sample
        self.unsupported: list[str] = []
        self._latest: dict[str, float] = {}
        self._xid = 0.0
        self._links: tuple[float, int, int] | None = None  # time, KiB sent and received
        self._events: Any = None
        self._handle: Any = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> Sampler:
        """Begin; where there is nothing to sample ``absent`` says why."""
        if self.device.type != "cuda":
            self.absent = "the ranks run on the CPU"
            return self
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid_of(self.device))
        except (pynvml.NVMLError, RuntimeError, ValueError) as error:
            self.absent = f"{error}"
            return self
        self._register()
        self.sample()  # what is not supported is known from now on
        self._thread = threading.Thread(target=self._run, daemon=True, name="nvml")
        self._thread.start()
        return self

    def latest(self) -> dict[str, float]:
        """The newest figures; none where there is nothing to sample."""
        return self._latest

    def stop(self) -> None:
        """End the thread; the library is given back."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
            self._thread = None
            pynvml.nvmlShutdown()

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            self.sample()

    def sample(self) -> dict[str, float]:
        """The figures of now; none where there is nothing to sample."""
        if self._handle is None:
            return {}
        answers = {name: self._ask(name, ask) for name, ask in self._asks().items()}
        self._latest = {name: value for name, value in answers.items() if value is not None}
        return self._latest

    def _asks(self) -> dict[str, Callable[[], float]]:
        handle = self._handle
        volatile = pynvml.NVML_VOLATILE_ECC
        return {
            "power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "sm_clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "throttle": lambda: pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
            "temperature_c": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
            "memory_gib": lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used / GIB,
            "nvlink_tx_gb_s": lambda: self._nvlink()[0],
            "nvlink_rx_gb_s": lambda: self._nvlink_rx,
            "ecc_corrected": lambda: pynvml.nvmlDeviceGetTotalEccErrors(
                handle, pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, volatile
            ),
            "ecc_uncorrected": lambda: pynvml.nvmlDeviceGetTotalEccErrors(
                handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, volatile
            ),
            "xid": self._last_xid,
        }

    def _ask(self, name: str, ask: Callable[[], float]) -> float | None:
        """None where the GPU does not report it: not asked again then; or where it failed to this once."""
        if name in self.unsupported:
            return None
        try:
            return float(ask())
        except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_FunctionNotFound, pynvml.NVMLError_NoPermission):
            self.unsupported.append(name)
        except pynvml.NVMLError:
            pass
        return None

    _nvlink_rx = 0.0

    def _nvlink(self) -> tuple[float, float]:
        """GB/s sent and received since the last call."""
        wanted = (pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX)
        values = pynvml.nvmlDeviceGetFieldValues(self._handle, [(field, EVERY_LINK) for field in wanted])
        for value in values:
            if value.nvmlReturn != pynvml.NVML_SUCCESS:
                self.unsupported.append("nvlink_rx_gb_s")
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        now = time.monotonic()
        sent, received = (int(value.value.ullVal) for value in values)
        before, self._links = self._links, (now, sent, received)
        if before is None:
            return 0.0, 0.0
        seconds = max(now - before[0], 1e-9)
        rates = tuple((new - old) * 1024 / 1e9 / seconds for new, old in zip((sent, received), before[1:], strict=True))
        self._nvlink_rx = rates[1]
        return rates[0], rates[1]

    def _register(self) -> None:
        """Ask the driver to report Xid errors of this GPU."""
        try:
            self._events = pynvml.nvmlEventSetCreate()
            pynvml.nvmlDeviceRegisterEvents(self._handle, pynvml.nvmlEventTypeXidCriticalError, self._events)
        except pynvml.NVMLError:
            self._events = None
            self.unsupported.append("xid")

    def _last_xid(self) -> float:
        while True:
            try:
                self._xid = float(pynvml.nvmlEventSetWait_v2(self._events, 0).eventData)
            except pynvml.NVMLError_Timeout:  # nothing new
                return self._xid


def uuid_of(device: torch.device) -> str:
    """The library's name of a CUDA device, whatever CUDA_VISIBLE_DEVICES makes of the order."""
    import torch

    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
