"""What the benchmarks share: this machine and its ceilings, measuring by turns, kernels' times, tables.

A call's time on a GPU is what the device takes for it: CUDA events around the call, behind a kernel that keeps the
device busy for as long as the host needs to launch everything, as the host is ahead in training. What a call takes on
a device that was idle, its launches included, is its time *alone*. On a CPU both are the wall's.

    copy ceiling     bytes read and written a second by a copy within the device's memory, the best of 20
    matmul ceiling   FLOP/s of square bf16 matrix products, the best of 25
"""

from __future__ import annotations

import difflib
import functools
import gc
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from statistics import median, quantiles
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dnsp.errors import UsageError
from dnsp.flops import matmul_ceiling

GIB, MIB = 2**30, 2**20
CEILING_BYTES = GIB  # that the copy reads
CLOCK = 2e9  # cycles a second of a GPU, about: what the kernel that keeps it busy counts
MOST_BUSY = 0.05  # seconds of it: a call that waits for the device would ask for ever more
L2_TIMES = 4  # what is to come from memory takes turns over this many times the L2 cache
PROFILED_CALLS = 3
WIDTH = 170  # of what is printed where that is not a terminal


def find_device() -> torch.device:
    """The current GPU, or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def make_console() -> Console:
    console = Console(highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=WIDTH)


def make_table(title: str, *columns: str) -> Table:
    """The first column names the row, the others hold numbers."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def package_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def describe(device: torch.device, packages: Sequence[str]) -> dict[str, Any]:
    """The machine and the versions, as every report begins."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "driver": driver_version() if device.type == "cuda" else None,
        "versions": {name: package_version(name) for name in packages},
    }


def driver_version() -> str:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"unknown ({error})"
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()


def say_what(report: dict[str, Any], console: Console) -> None:
    """The machine, the versions, the ceilings and the peers that are not there."""
    versions = ", ".join(f"{name} {v}" for name, v in report["versions"].items() if v != "not installed")
    kernels = f", our delta rule by {report['kernels']}" if "kernels" in report else ""
    console.print(f"{report['device']}, {versions}{kernels}", markup=False)
    if report["copy_ceiling_tb_per_s"] is not None:
        copy, matmul = report["copy_ceiling_tb_per_s"], report["matmul_ceiling_tflops"]
        console.print(f"ceilings: copy {copy:.2f} TB/s, bf16 matrix products {matmul:.0f} TFLOP/s")
    for name, why in report["peers_missing"].items():
        console.print(f"{name}: {why}", markup=False)


def goal(figures: dict[str, Any], what: str, found: float, at_most: float) -> dict[str, Any]:
    """A figure that is to be reached at a shape."""
    return {"shape": figures["name"], "what": what, "found": found, "at_most": at_most, "holds": found <= at_most}


def goals_table(found: list[dict[str, Any]]) -> Table:
    table = make_table("to reach", "found", "at most", "")
    for line in found:
        said = "[green]yes[/]" if line["holds"] else "[red]no[/]"
        table.add_row(f"{line['shape']}: {line['what']}", f"{line['found']:.3f}", f"{line['at_most']:.3f}", said)
    return table


def cell(value: float | str | None, form: str) -> str:
    return "" if value is None else value if isinstance(value, str) else format(value, form)


@dataclass(frozen=True)
class Ceilings:
    """Bytes and FLOP a second; None on a CPU."""

    copy: float | None = None
    matmul: float | None = None

    @staticmethod
    def of(device: torch.device) -> Ceilings:
        return Ceilings(copy_ceiling(device), matmul_ceiling(device)) if device.type == "cuda" else Ceilings()

    def fractions(self, seconds: float, byte_count: float, flops: float | None = None) -> dict[str, float]:
        """What work done in this time is of either."""
        found = {}
        if self.copy is not None:
            found["copy_fraction"] = byte_count / seconds / self.copy
        if self.matmul is not None and flops is not None:
            found["matmul_fraction"] = flops / seconds / self.matmul
        return found

    def to_json(self) -> dict[str, float | None]:
        return {
            "copy_ceiling_tb_per_s": None if self.copy is None else self.copy / 1e12,
            "matmul_ceiling_tflops": None if self.matmul is None else self.matmul / 1e12,
        }


def copy_ceiling(device: torch.device) -> float:
    """Bytes a second, read and written: the best of 20."""
    a, b = (torch.empty(CEILING_BYTES, device=device, dtype=torch.uint8) for _ in range(2))
    return 2 * CEILING_BYTES / _best(lambda: b.copy_(a))


def _best(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of 20, behind 5 that warm up."""
    return min([device_seconds(work) for _ in range(25)][5:])


def device_seconds(work: Callable[[], Any], busy: float = 0.0) -> float:
    """What the current GPU takes for a call, the host ``busy`` seconds ahead of it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if busy:
        torch.cuda._sleep(int(busy * CLOCK))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def alone_seconds(work: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """``(seconds of the call on an idle device, of which the host's)``."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    host = time.perf_counter() - began
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, host


@dataclass
class Runs:
    """One kind of call: its times in seconds, or why there are none."""

    seconds: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    failure: str = ""

    @property
    def median(self) -> float | None:
        return median(self.seconds) if self.seconds else None

    def to_json(self) -> dict[str, Any]:
        if self.failure or not self.seconds:
            return {"failure": self.failure or "not measured"}
        low, _, high = quantiles(self.seconds, n=4) if len(self.seconds) > 1 else self.seconds * 3
        return {
            "ms": 1e3 * median(self.seconds),
            "min_ms": 1e3 * min(self.seconds),
            "max_ms": 1e3 * max(self.seconds),
            "spread": (high - low) / median(self.seconds),  # the middle half of the runs, of their median
            "alone_ms": 1e3 * median(self.alone),
            "runs_ms": [1e3 * t for t in self.seconds],
        }


def take_turns(
    calls: Sequence[tuple[Runs, Callable[[int], Any]]],
    runs: int,
    warmup: int,
    device: torch.device,
    ahead: bool = True,
) -> None:
    """One run of each, again and again; what fails is left out from there on.

    A call is told how many calls there were before it, of whichever kind, so that it can take other inputs than they.
    ``ahead`` False: what counts is a call's time alone.
    """
    before = itertools.count()
    for n in range(warmup + runs):
        for record, call in calls:
            if record.failure:
                continue
            try:
                alone, host = alone_seconds(functools.partial(call, next(before)), device)
                queued = alone
                if device.type == "cuda" and ahead:
                    queued = device_seconds(functools.partial(call, next(before)), min(1.5 * host, MOST_BUSY))
            except Exception as error:  # a peer may fail in any way
                record.failure = reason(error)
            if record.failure:
                give_back_memory(device)  # it may have run out of it
                continue
            if n >= warmup:
                record.seconds.append(queued)
                record.alone.append(alone)


def reason(error: BaseException) -> str:
    """An error in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    name = "out of memory" if "OutOfMemory" in type(error).__name__ else type(error).__name__
    return f"{name}: {lines[0][:300]}" if lines else name


def give_back_memory(device: torch.device) -> None:
    """What torch keeps for later, back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int | None:
    """Of allocated memory in a call, above what was allocated before it; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copies_beyond_cache(byte_count: int, device: torch.device, at_least: int = 1) -> int:
    """How many sets of this size must take turns, so that none is found in the L2 cache."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return max(at_least, -(-L2_TIMES * cache // byte_count))


def kernel_times(work: Callable[[], Any], device: torch.device) -> list[dict[str, Any]]:
    """Every kernel of a call, the longest first: its name, microseconds and launches a call. On a CPU: operations."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(PROFILED_CALLS):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize()
    found = []
    for event in profile.key_averages():
        on_gpu = "CUDA" in str(event.device_type)
        if on_gpu != (device.type == "cuda"):
            continue
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if microseconds:
            times = {"us": microseconds / PROFILED_CALLS, "launches": event.count / PROFILED_CALLS}
            found.append({"kernel": event.key, **times})
    return sorted(found, key=lambda kernel: -kernel["us"])


def parse_settings(text: str, keys: Sequence[str], command: str) -> dict[str, str]:
    """``key=value,key=value`` of a shape.

    Raises: UsageError for what is not of that form, or a key that is not known or given twice.
    """
    found: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise UsageError(f"{command} {text}: {part!r} is not KEY=VALUE; write {keys[0]}=1024,{keys[1]}=4/8")
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(keys)}"
            raise UsageError(f"{command} {text}: unknown key {key!r}; {hint}")
        if key in found:
            raise UsageError(f"{command} {text}: {key} is given twice; give a shape of its own for each")
        found[key] = value
    return found


def whole_number(what: str, text: str, least: int = 1) -> int:
    """Raises: UsageError for what is not a whole number, or too small."""
    try:
        value = int(text.replace("_", ""))
    except ValueError:
        value = least - 1
    if value < least:
        raise UsageError(f"{what}={text}: must be a whole number of at least {least}")
    return value


def parse_heads(text: str) -> tuple[int, int]:
    """``16/32``: key and value heads; ``16``: as many of both.

    Raises: UsageError where the value heads are no multiple of the key heads.
    """
    first, slash, second = text.partition("/")
    keys = whole_number("heads", first)
    values = whole_number("heads", second) if slash else keys
    if values % keys:
        raise UsageError(
            f"heads={text}: {values} value heads for {keys} key heads; make them a multiple of the key heads, as in "
            f"heads={keys}/{2 * keys}"
        )
    return keys, values


def parse_dtype(text: str) -> torch.dtype:
    if text not in DTYPES:
        raise UsageError(f"dtype={text}: must be one of {', '.join(DTYPES)}")
    return DTYPES[text]


def check_runs(runs: int, warmup: int) -> None:
    if runs < 1:
        raise UsageError(f"--runs {runs}: at least one run is measured; the median of 20 is steady")
    if warmup < 1:
        raise UsageError(f"--warmup {warmup}: the first run compiles; give at least 1")


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
