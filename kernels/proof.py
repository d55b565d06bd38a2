"""Which binaries of the Triton kernels may run: those that computed the right numbers on this kind of device.

Triton compiles some launch configurations to wrong code, without a word. So the passes ask before they launch, and
every launch is looked at after:

    launches = proof.require(device, signature)     once a call, before its first launch: the table of launches that is
                                                    proven for these inputs (in chunk_triton: prepare, kept in Prepared)
    proof.require_kernels(x.device, Conv(...))      the same for kernels that have one launch, by what decides a binary
    proof.launch(kernel, grid, *args, **constants)  in place of kernel[grid](*args, **constants): raises where the
                                                    binary it ran is not among the proven ones (by :mod:`.launcher`)

What decides the binaries of a call is its signature (:mod:`.signatures`). One that this process has not met is looked
up in a folder of verdicts, one file for each signature, toolchain (GPU, Triton, ptxas, settings of the compiler) and
text of the kernels: anything else there is another file. Where there is none the signature is proven, forward and
backward, in a child process (:mod:`.proof_run`), because a kernel that goes astray takes its process' CUDA context with
it. The child's binaries stay in Triton's cache, from which the parent loads them. The delta rule's tables are tried in
the order of :func:`candidates`; the first whose every number is right is taken. Ranks that start together wait for the
one that proves. Environment: DNSP_PROOFS, the folder (else ``dnsp/proofs`` in XDG_CACHE_HOME or ``~/.cache``).
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from . import assembler, launcher, verdicts
from .launches import Launches, candidates
from .signatures import AnySignature, Fold, Signature, to_json
from .verdicts import Toolchain, Verdict, to_try, toolchain

CHILD_SECONDS = 1200  # at most, for compiling (fp32 takes minutes) and proving one table
_log = logging.getLogger(__name__)


class UnprovenError(RuntimeError):
    """A kernel computes wrong numbers here, or could not be proven; names which, and the way out."""

    exit_status = 2  # of a command that ends by it: it comes up in the first forward pass

    def __init__(self, message: str, verdict: Verdict | None = None) -> None:
        super().__init__(message)
        self.verdict = verdict


class Mode(Protocol):
    """What launches do instead, while a proof runs."""

    table: Launches

    def meet(self, signature: AnySignature) -> None: ...

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None: ...


_mode: Mode | None = None  # of the process, not of the thread: autograd's backward runs in its own
_lock = threading.Lock()
_proven: set[str] = set()  # hashes of binaries
# Of each kind apart, since tuples of two kinds may be equal; the table is the delta rule's alone.
_tables: dict[tuple[torch.device, type[AnySignature], AnySignature], Launches] = {}


@contextmanager
def mode(how: Mode) -> Iterator[None]:
    """Nothing is asked for and nothing is checked: for proofs, and for tests that are proofs themselves."""
    global _mode
    before, _mode = _mode, how
    try:
        yield
    finally:
        _mode = before


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)``, of a binary that is proven.

    Raises: UnprovenError, where :func:`require` was not asked, or its signature left out what decides a binary.
    """
    if _mode is not None:
        _mode.launch(kernel, grid, args, constants)
        return
    launcher.launch(kernel, grid, args, constants, _check)


def _check(kernel: Any, binary: Any, constants: dict[str, Any]) -> None:
    if binary is not None and binary.hash not in _proven:  # None: interpreted
        raise UnprovenError(
            f"{kernel.__name__} was launched as a binary that is not proven ({binary.hash[:16]}, {constants}). Inputs "
            f"laid out in an unusual way (addresses that are no multiples of 16) can do this: make them contiguous, or "
            f"take the (much slower) path in torch operations: backend='torch', DNSP_DELTA_RULE=torch"
        )


def require(device: torch.device, signature: Signature) -> Launches:
    """The launches that are proven for inputs of this signature, as the kernels get them; proves them where need be.

    Raises: UnprovenError, where no table is right on this device, or a first call comes while a graph is captured.
    """
    if _mode is not None:
        _mode.meet(signature)
        return _mode.table
    if device.type != "cuda":  # interpreted
        return candidates()["as tuned"]
    return _tables.get((device, Signature, signature)) or _first_time(device, signature)


def require_kernels(device: torch.device, signature: AnySignature) -> None:
    """The same for kernels that have one launch; their arguments are laid out as the signature's kind says.

    Raises: UnprovenError, as :func:`require`.
    """
    if _mode is not None:
        _mode.meet(signature)
    elif device.type == "cuda" and (device, type(signature), signature) not in _tables:
        _first_time(device, signature)


def require_fold(U_NBHKV: Tensor) -> None:
    """The same for the fold of states like these; a proof of the delta rule is one of its fold too."""
    if _mode is None:
        require_kernels(U_NBHKV.device, Fold(*U_NBHKV.shape[-2:]))


def _first_time(device: torch.device, signature: AnySignature) -> Launches:
    with _lock:
        if (device, type(signature), signature) not in _tables:
            if torch.cuda.is_current_stream_capturing():
                raise UnprovenError(
                    f"first call with {signature} while a CUDA graph is captured: kernels are proven in a process of "
                    f"their own, which takes seconds; call it once before the capture"
                )
            establish(device, signature)
        return _tables[device, type(signature), signature]


def establish(device: torch.device, signature: AnySignature, again: bool = False) -> Verdict:
    """The verdict on a signature, kept or made now (``again``: made now whatever is kept); its binaries may run.

    Raises: UnprovenError, where no table is right (its ``verdict`` says why), or none could be tried.
    """
    where = toolchain(device)
    file = verdicts.file_of(where, signature)
    with verdicts.alone(file):
        verdict = None if again else verdicts.read(file, signature)
        if verdict is None:
            verdict = _prove(device, signature, where, file)
    if verdict.table is None:
        tried = "\n".join(f"  {table}: {why}" for table, why in verdict.refused.items())
        raise UnprovenError(
            f"Triton kernels cannot be used here: on {where}\n  with {signature}\n"
            f"every launch table failed its proof:\n{tried}\n"
            f"Take the (much slower) path in torch operations: backend='torch', DNSP_DELTA_RULE=torch; or install "
            f"another Triton. 'dnsp doctor --prove' tries again.",
            verdict,
        )
    _proven.update(binary["hash"] for binary in verdict.binaries)
    _tables[device, type(signature), signature] = table = candidates()[verdict.table]
    if isinstance(signature, Signature):  # its proof folds its states too
        _tables[device, Fold, Fold(signature.K, signature.V)] = table
    return verdict


def _prove(device: torch.device, signature: AnySignature, where: Toolchain, file: Path) -> Verdict:
    """Tables one after another, each in a child, until one is right. The verdict is kept."""
    _log.warning("proving the Triton kernels once for %s, on %s", signature, where)
    verdict = Verdict(signature, None)
    for table in to_try(signature):
        report = _child(device, signature, table, where)
        if not report["wrong"]:
            verdict = replace(verdict, table=table, errors=report["errors"], binaries=report["binaries"])
            break
        verdict.refused[table] = report["wrong"]
        _log.warning("launches %s are refused: %s", table, report["wrong"])
    if verdict.table is not None and verdict.refused:
        _log.warning("launches %s are proven, and used", verdict.table)
    verdicts.write(file, verdict, where)
    return verdict


def _child(device: torch.device, signature: AnySignature, table: str, where: Toolchain) -> dict[str, Any]:
    """One table's proof in a process of its own: its ``errors`` and ``binaries``, and what is ``wrong``, None if
    nothing is. A process that crashes or hangs once it has the device is a wrong table, one that never gets it not."""
    task = {"device": str(device), "signature": to_json(signature), "table": table, "parent": os.getpid()}
    paths = [ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    ptxas, path = assembler.variable(10 * where.capability[0] + where.capability[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), ptxas: path}
    try:
        run = subprocess.run(
            child_command(), input=json.dumps(task), capture_output=True, text=True, env=environment,
            timeout=CHILD_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise _unable(signature, f"it did not end within {CHILD_SECONDS} s") from None
    said = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    if said and "wrong" in said[-1]:
        return said[-1]
    last = ([line.strip() for line in run.stderr.splitlines() if line.strip()] or ["nothing on stderr"])[-1]
    if not said or "unable" in said[-1]:
        raise _unable(signature, said[-1]["unable"] if said else last)
    if -run.returncode in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        raise _unable(signature, f"someone ended it with signal {-run.returncode}")
    if -run.returncode == signal.SIGALRM:
        return {"wrong": "the kernels did not end"}
    how = f"signal {-run.returncode}" if run.returncode < 0 else f"status {run.returncode}"
    return {"wrong": f"the process that ran it ended with {how}: {last}"}


def _unable(signature: AnySignature, why: str) -> UnprovenError:
    return UnprovenError(
        f"the Triton kernels could not be proven for {signature}: {why}\nThe proof runs in a process of its own, which "
        f"needs a gigabyte of the GPU's memory and the right to share it: make room, or run 'dnsp doctor --prove' "
        f"while it is free; or take the (much slower) path in torch operations: backend='torch', DNSP_DELTA_RULE=torch"
    )


ROOT = str(Path(__file__).absolute().parents[2])  # what holds the package, installed or not


def child_command() -> list[str]:
    return [sys.executable, "-c", f"from {__package__}.proof_run import child; child()"]
