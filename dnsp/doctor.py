"""``dnsp doctor``: what this machine can and cannot do, and the cure for each thing it cannot.

Every section asks on its own and imports what it asks about itself, so that the answer comes where torch, a driver or a
package is missing or broken too.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dnsp.config import Config
from dnsp.json_files import write_json

GIB = 2**30
MINIMUM_PYTHON = (3, 11)
LOW_MEMORY, LOW_DISK = 4 * GIB, 2 * GIB  # what the quickstart needs; a checkpoint and its successor

Status = Literal["ok", "info", "absent", "warn", "missing"]
EXTRAS = {"hf": "Hugging Face weights and tokenizers", "data": "Parquet and .zst", "flash": "FlashAttention 2"}
STYLES: dict[Status, str] = {"ok": "green", "info": "dim", "absent": "dim", "warn": "yellow", "missing": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One row. ``missing``: required, and not there; ``absent``: optional, and not there; ``warn``: works, but look."""

    section: str
    name: str
    status: Status
    found: str
    cure: str = ""


def run(
    json_path: Path | None = None,
    console: Console | None = None,
    config: Config | None = None,
    hostfile: Path | None = None,
    ranks: int | None = None,
    ssh_port: int | None = None,
) -> int:
    """Print the table (and write it as JSON). Returns the exit status: 1 when something required is missing.

    Args:
        config: also whether this configuration can run, on ``ranks`` ranks (None: as many as there is room for).
        hostfile: and whether deepspeed can start it on the hosts of this file, which ssh reaches on ``ssh_port``.

    Raises:
        UsageError: the hostfile cannot be read.
    """
    more: dict[str, Callable[[], Iterator[Row]]] = {}
    if config is not None:
        from dnsp import fits, hosts

        named = hosts.read_hostfile(hostfile) if hostfile is not None else []
        wanted = fits.ranks_of(config, ranks, sum(host.slots for host in named))
        if named:
            more["hosts"] = lambda: hosts.examine(named, wanted, ssh_port)
        more["configuration"] = lambda: fits.examine(config, wanted, here=not named)
    findings = examine({**SECTIONS, **more})
    missing = [f for f in findings if f.status == "missing"]
    (console or Console()).print(table(findings))
    write_json(json_path, {"ok": not missing, "findings": [asdict(f) for f in findings]})
    return 1 if missing else 0


def examine(sections: Mapping[str, Callable[[], Iterator[Row]]] | None = None) -> list[Finding]:
    """Everything that is known about this machine, section by section."""
    findings: list[Finding] = []
    for section, ask in (SECTIONS if sections is None else sections).items():
        try:
            findings += [Finding(section, *row) for row in ask()]
        except Exception as error:  # a broken driver or half an installation must not hide the other sections
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            findings.append(Finding(section, "could not be asked", "warn", why, "make what is named here importable"))
    return findings


def table(findings: list[Finding]) -> Table:
    """The findings for people; the cure stands only where something is not well."""
    rows = Table(title="dnsp doctor", title_justify="left", header_style="")
    rows.add_column("", no_wrap=True)
    rows.add_column("", no_wrap=True)
    rows.add_column("found", overflow="fold")
    rows.add_column("cure", overflow="fold")
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            rows.add_section()
            rows.add_row(f"[bold]{section}[/]")
        style = STYLES[finding.status]
        name, found = escape(finding.name), escape(finding.found)
        rows.add_row(f"  {name}", f"[{style}]{finding.status}[/]", found, escape(finding.cure))
    return rows


Row = tuple[str, Status, str, str]


def _system() -> Iterator[Row]:
    version = platform.python_version()
    good = sys.version_info >= MINIMUM_PYTHON
    yield "python", "ok" if good else "missing", version, "" if good else "install Python 3.11 or later"
    linux = sys.platform == "linux"
    cure = "" if linux else "training is tested on Linux alone"
    yield "system", "ok" if linux else "warn", f"{platform.system()} {platform.release()} {platform.machine()}", cure
    try:
        address = socket.gethostbyname(socket.gethostname())
        yield "host name", "ok", f"{socket.gethostname()} is {address}", ""
    except OSError as error:
        cure = "add it to /etc/hosts, or set GLOO_SOCKET_IFNAME to this machine's interface"
        yield "host name", "warn", f"{socket.gethostname()} does not resolve ({error})", cure


def requirements() -> list[Requirement]:
    """What dnsp asks for, extras with their marker: of the installed distribution, else of the source tree's file."""
    try:
        return [Requirement(line) for line in importlib.metadata.requires("dnsp") or []]
    except importlib.metadata.PackageNotFoundError:
        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for extra, wanted in project["optional-dependencies"].items():
        for line in wanted:
            name, _, marker = line.partition(";")
            lines.append(f"{name}; ({marker}) and extra == '{extra}'" if marker else f"{name}; extra == '{extra}'")
    return [Requirement(line) for line in lines]


def _packages() -> Iterator[Row]:
    for requirement in requirements():
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement, "missing", f'pip install "{requirement.name}{requirement.specifier}"')


def _optional_packages() -> Iterator[Row]:
    for extra, use in EXTRAS.items():
        for requirement in requirements():
            marker = requirement.marker
            if marker and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
                flags = " --no-build-isolation" if extra == "flash" else ""
                yield _package(requirement, "absent", f'{use}: pip install{flags} "dnsp[{extra}]"')


def _package(requirement: Requirement, if_not: Status, cure: str) -> Row:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return requirement.name, if_not, "not installed", cure
    if not requirement.specifier.contains(version, prereleases=True):
        return requirement.name, if_not, f"{version}, wanted {requirement.specifier}", cure
    return requirement.name, "ok", version, ""


def _devices() -> Iterator[Row]:
    import torch

    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    counts = [f"{count} {what}{'' if count == 1 else 's'}" for count, what in ((cores, "core"), (threads, "thread"))]
    yield "cpu", "ok", f"{counts[0]}, torch uses {counts[1]}", ""
    names = _nvml_devices()
    if isinstance(names, str):
        yield "gpu", "absent", names, "training runs on the CPU; for a GPU install NVIDIA's driver"
        return
    for index, name in enumerate(names):
        yield f"gpu {index}", "ok", name, ""
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU alone"
        cure = "install a torch built for CUDA, no newer than the driver; look at CUDA_VISIBLE_DEVICES"
        yield "torch and CUDA", "warn", f"torch is built {built} and sees no GPU", cure
    else:
        seen = [".".join(map(str, torch.cuda.get_device_capability(i))) for i in range(torch.cuda.device_count())]
        yield "torch and CUDA", "ok", f"CUDA {torch.version.cuda}, capabilities {', '.join(seen)}", ""
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        cure = "" if compiler else "Triton compiles its launchers with a C compiler; on Debian: apt install gcc"
        yield "C compiler", "ok" if compiler else "missing", compiler or "none", cure


def _nvml_devices() -> list[str] | str:
    """A line for each GPU, or why there is none."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"no NVIDIA driver ({error})"
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        lines = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            free, total = memory.free / GIB, memory.total / GIB
            lines.append(f"{pynvml.nvmlDeviceGetName(handle)}, {free:.0f} of {total:.0f} GiB free, driver {driver}")
        return lines or "NVIDIA's driver is there, but no GPU"
    finally:
        pynvml.nvmlShutdown()


def _backends() -> Iterator[Row]:
    import torch

    from dnsp.parallel.probe import backends

    cures = {
        "gloo": "set GLOO_SOCKET_IFNAME to an interface that is up (lo for one machine), or install another torch",
        "nccl": "GPU ranks need it: install a torch built for CUDA",
        "symmetric memory": "the scan then goes through NCCL",
    }
    for backend in backends():
        needed = backend.name == "gloo" or (backend.name == "nccl" and torch.cuda.is_available())
        status: Status = "ok" if backend.works else "missing" if needed else "absent"
        yield backend.name, status, backend.found, "" if backend.works else cures[backend.name]
        if backend.name == "symmetric memory" and backend.works:
            yield _symmetric_budget()


def _symmetric_budget() -> Row:
    """What the scan's share of it takes, for the state of a layer such as Qwen3.5's."""
    import torch

    from dnsp.parallel.symmetric import budget

    need, free = budget(1, 32, 128), torch.cuda.mem_get_info()[0]
    found = f"{need / 2**20:.0f} MiB a rank and row of 32 value heads of 128 x 128, {free / 2**20:,.0f} MiB free"
    cure = "" if need < free else "make room on the GPU, or parallel.transport=p2p"
    return "its budget", "ok" if need < free else "warn", found, cure


def _attention() -> Iterator[Row]:
    import torch

    fused = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    cure = "" if fused else "attention falls back to plain matrix products; install torch 2.11 or later"
    yield "cpu flash", "ok" if fused else "warn", "in torch" if fused else "not in this torch", cure
    if not torch.cuda.is_available():
        yield "cuDNN, flash", "absent", "no CUDA device", ""
        return
    cudnn = torch.backends.cudnn.is_available() and torch.backends.cuda.cudnn_sdp_enabled()
    found = str(torch.backends.cudnn.version()) if cudnn else "not available"
    cure = "" if cudnn else "install a torch with cuDNN: half the time of flash"
    yield "cuDNN", "ok" if cudnn else "warn", found, cure
    flash = torch.backends.cuda.is_flash_attention_available()
    yield "flash in torch", "ok" if flash else "absent", "there" if flash else "not built in", ""


def _launcher() -> Iterator[Row]:
    from dnsp.launch.environment import LaunchError, find_environment

    try:
        place = find_environment()
        found = f"rank {place.rank} of {place.world_size}, {place.launcher}" if place.launcher != "none" else "none"
        yield "launcher", "ok", found, ""
    except LaunchError as error:
        yield "launcher", "warn", str(error), "unset these variables, or start with deepspeed, torchrun or srun"
    for name in LAUNCHER_VARIABLES:
        if name in os.environ:
            yield name, "info", os.environ[name], ""


LAUNCHER_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_NODELIST"),
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_DEBUG"),
)


def _memory() -> Iterator[Row]:
    import psutil

    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and limit.read_text().strip().isdigit():  # a container's share is smaller than the machine
        total = min(total, int(limit.read_text()))
        available = min(available, total)
    low = available < LOW_MEMORY
    cure = "the quickstart may need up to 4 GiB: close something, or lower data.sequence_length" if low else ""
    yield "memory", "warn" if low else "ok", f"{available / GIB:.1f} of {total / GIB:.1f} GiB available", cure
    shared = Path("/dev/shm")
    if shared.exists():
        free = shutil.disk_usage(shared).free
        cure = "NCCL's ranks share memory there; in Docker: --shm-size=1g" if free < GIB else ""
        yield "/dev/shm", "warn" if free < GIB else "ok", f"{free / GIB:.1f} GiB free", cure


def _disk() -> Iterator[Row]:
    for name, folder in _folders().items():
        there = folder
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free
        if not os.access(there, os.W_OK):
            yield name, "warn", f"{folder} cannot be written", "change its owner, or run from a folder that can"
        elif free < LOW_DISK:
            yield name, "warn", f"{folder}: {free / GIB:.1f} GiB free", "make room: a full disk stops a run"
        else:
            yield name, "ok", f"{folder}: {free / GIB:.0f} GiB free", ""


def _folders() -> Mapping[str, Path]:
    from dnsp.data.prepare import default_cache

    return {"runs": Path("runs").absolute(), "data cache": default_cache(), "temporary": Path(tempfile.gettempdir())}


def _data() -> Iterator[Row]:
    from dnsp.data.prepare import default_cache

    prepared = sorted(index.stem for index in default_cache().glob("*.idx"))
    if prepared:
        yield "prepared", "ok", "\n".join(prepared), ""
    else:
        yield "prepared", "absent", "nothing yet", "none needed: what uses python-stdlib prepares it"


SECTIONS: Mapping[str, Callable[[], Iterator[Row]]] = {
    "system": _system,
    "packages": _packages,
    "optional packages": _optional_packages,
    "devices": _devices,
    "backends": _backends,
    "attention": _attention,
    "launcher": _launcher,
    "memory": _memory,
    "disk": _disk,
    "data": _data,
}
