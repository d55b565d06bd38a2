"""What is known of the kernels' binaries on this machine, in memory and on disk; :mod:`.proof` has the story."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from .launches import candidates
from .signatures import MODULES, AnySignature, Signature, to_json

FORMAT = 3  # of the files; another number where a proof asks for more than it did
_log = logging.getLogger(__name__)


class Toolchain(NamedTuple):
    """Where binaries are made and run; ``identity`` holds every version and setting that Triton's own cache knows."""

    gpu: str
    capability: tuple[int, int]
    triton: str
    ptxas: str
    identity: str

    def __str__(self) -> str:
        capability = ".".join(map(str, self.capability))
        return f"{self.gpu} (capability {capability}), Triton {self.triton}, ptxas {self.ptxas}"


@dataclass(frozen=True)
class Verdict:
    """What is known of a signature: the table that is proven for it, None where none is, and what was refused."""

    signature: AnySignature
    table: str | None
    errors: dict[str, float] = field(default_factory=dict)  # |error| / |truth| of each result
    binaries: list[dict[str, Any]] = field(default_factory=list)  # hash, kernel, constants, warps, stages, ...
    refused: dict[str, str] = field(default_factory=dict)  # table: why


def to_try(signature: AnySignature) -> list[str]:
    """The tables that a signature has; all but the delta rule's passes have one launch, whatever the table."""
    tables = list(candidates())
    return tables if isinstance(signature, Signature) else tables[:1]


def folder() -> Path:
    if chosen := os.environ.get("DNSP_PROOFS"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "dnsp" / "proofs"


@functools.cache
def toolchain(device: torch.device) -> Toolchain:
    """What compiles for this device, in the words and by the keys of Triton's own cache."""
    from triton import knobs
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler.compiler import make_backend
    from triton.runtime.cache import get_cache_key

    class _NoSource:
        def hash(self) -> str:
            return ""

    with torch.cuda.device(device):
        backend = make_backend(triton.runtime.driver.active.get_current_target())
    options = {"debug": knobs.runtime.debug, "instrumentation_mode": knobs.compilation.instrumentation_mode}
    identity = get_cache_key(_NoSource(), backend, backend.parse_options(options), get_cache_invalidating_env_vars())
    assembler = re.search(r"V(\d[\w.]*)", backend.hash())
    return Toolchain(
        torch.cuda.get_device_name(device),
        torch.cuda.get_device_capability(device),
        triton.__version__,
        assembler[1] if assembler else hashlib.sha256(backend.hash().encode()).hexdigest()[:8],
        hashlib.sha256(identity.encode()).hexdigest(),
    )


def file_of(where: Toolchain, signature: AnySignature) -> Path:
    """Where the verdict is kept."""
    return folder() / _name(where) / f"{_key(where, signature)}.json"


def _name(where: Toolchain) -> str:
    gpu = re.sub(r"[^\w.]+", "-", where.gpu)
    return f"{gpu}-{where.capability[0]}.{where.capability[1]}-triton-{where.triton}-ptxas-{where.ptxas}"


def _key(where: Toolchain, signature: AnySignature) -> str:
    """Of everything that decides a verdict: a changed kernel, compiler, setting or table is another key."""
    tables = {name: {use: asdict(how) for use, how in candidates()[name].items()} for name in to_try(signature)}
    launches = tables if isinstance(signature, Signature) else {}
    text = json.dumps([FORMAT, where, to_json(signature), launches, _sources(type(signature).__name__)])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@functools.cache
def _sources(kind: str) -> dict[str, str]:
    """The kernels of a kind with all that they call, by Triton's hashes (interpreted ones have none), and the texts of
    the modules that launch them or say which binary a call has."""
    modules = [importlib.import_module(f".{name}", __package__) for name in MODULES[kind]]
    found = {name: x for module in modules for name, x in vars(module).items()}
    kernels = {name: kernel for name, kernel in found.items() if isinstance(kernel, triton.JITFunction)}
    hashes = {name: kernels[name].cache_key for name in sorted(kernels)}
    return hashes | {name: hashlib.sha256(_text(name)).hexdigest() for name in (*MODULES[kind], "signatures")}


def _text(module: str) -> bytes:
    return Path(__file__).with_name(f"{module}.py").read_bytes()


@contextmanager
def alone(file: Path) -> Iterator[None]:
    """One process at a time for each signature; where files cannot be locked, each proves for itself."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.with_suffix(".lock").open("w")
    except OSError:
        yield
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            _log.debug("%s: cannot be locked (%s)", file, error)
        yield


def read(file: Path, signature: AnySignature) -> Verdict | None:
    try:
        kept = json.loads(file.read_text())
        table, binaries, tables = kept["table"], kept["binaries"], to_try(signature)
        good = table in tables if table is not None else kept["refused"].keys() >= set(tables)
        if not good or not all(isinstance(binary["hash"], str) for binary in binaries):
            raise ValueError("it names no table of these")
        return Verdict(signature, table, kept["errors"], binaries, kept["refused"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("the verdict in %s cannot be read (%s): the kernels are proven anew", file, error)
        return None


def write(file: Path, verdict: Verdict, where: Toolchain) -> None:
    """Whole or not at all. Without it every process proves for itself."""
    kept = {
        **{"gpu": where.gpu, "capability": where.capability, "triton": where.triton, "ptxas": where.ptxas},
        **{"torch": torch.__version__, "date": time.strftime("%Y-%m-%d %H:%M:%S"), "what": str(verdict.signature)},
        **{"signature": to_json(verdict.signature), "table": verdict.table, "errors": verdict.errors},
        **{"refused": verdict.refused, "binaries": verdict.binaries},
    }
    scratch = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        scratch.write_text(json.dumps(kept, indent=1) + "\n")
        os.replace(scratch, file)
    except OSError as error:
        _log.warning(
            "the verdict cannot be kept in %s (%s), and every process will prove for itself: set DNSP_PROOFS to a "
            "folder that you can write to",
            file.parent,
            error.strerror or error,
        )
