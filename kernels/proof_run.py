"""One proof of Triton kernels: small inputs of a signature, through the kernels and in fp64.

Those of the delta rule are here, those of what stands around it in :mod:`.proof_layers`. Segments, a last one that is
shorter, tails of chunks, initial and final states, documents that begin inside a segment and at none of its edges,
decays that are mild and strong: whatever a binary does in training it does here, twice, and the bits of both times are
the same. :mod:`.proof` runs this in a process of its own.

Long because what is drawn, run and compared is one proof.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from . import chunk_triton, proof_layers, triton_scan
from .delta_rule import delta_rule
from .launches import Launches, candidates
from .proof import mode
from .scan import LocalScan
from .segments import Inputs, Segments
from .signatures import AnySignature, Fold, Norm, Post, Signature, from_json

# |error| / |truth| of each result in the row of the batch where it is worst: of outputs and states, of gradients.
LIMITS = {torch.bfloat16: (5e-3, 1e-2), torch.float16: (5e-3, 1e-2), torch.float32: (1e-5, 1e-4)}
# Times the limits where K or V is below 64: without decay, K = V = 16 in bf16 came out at 5.1e-3 with every table on an
# H100. That few products average less of their rounding is our reading of it, not shown.
NARROW = 2.0
STATE_LIMIT = 1e-5  # of states that are changed in fp32: by the fold, and in decoding
RUN_SECONDS = 120  # after which kernels that were compiled before are taken to hang
POLL = 0.5  # seconds between looks at the parent
TOKENS, BATCH = 436, 2
# What a wrong result tells, the first in this order: all that came before it was right.
SUSPECTS = {
    "o": "prepare, invert, states (apply)",
    "final": "states (summarise) or fold",
    "dinitial": "reverse (reverse_summary) or fold",
    "dv": "states (keep), reverse or backward",
    "dq": "pairs or queries, or backward",
    "dk": "pairs or keys, or backward",
    "dbeta": "pairs or keys, or backward",
    "dg": "pairs, queries or keys, or backward",
}


class Case(NamedTuple):
    segment_tokens: int
    decays: tuple[str, str]  # of each row
    documents: tuple[tuple[int, ...], tuple[int, ...]]  # where each row's begin
    states: bool  # an initial state, and a final one with a gradient


CASES = (
    Case(128, ("mild", "mixed"), ((0, 100, 101, 300), (0,)), True),
    Case(192, ("mixed", "mild"), ((0,), (0, 64, 333)), False),
)
DECAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "mild": lambda u: -0.1 * u,
    # 32 tokens at -20 a token, 32 at -0.01
    "mixed": lambda u: torch.where((torch.arange(u.shape[0]) // 32 % 2 == 0)[:, None], -20.0, -0.01).expand_as(u),
}


class Recording:
    """A mode in which everything is launched, by one table, and each binary noted."""

    def __init__(self, table: Launches) -> None:
        self.table = table
        self.binaries: dict[str, dict[str, Any]] = {}

    def meet(self, signature: AnySignature) -> None:
        pass

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        binary = kernel[grid](*args, **constants)
        if binary is not None and binary.hash not in self.binaries:
            self.binaries[binary.hash] = _described(kernel, args, constants, binary)


class Compiling(Recording):
    """A mode in which everything is compiled and nothing launched."""

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        kernel.warmup(*args, grid=grid, **constants)


class Meeting(Recording):
    """A mode in which nothing is launched: it finds out which signatures a model would ask for."""

    def __init__(self) -> None:
        super().__init__(candidates()["as tuned"])
        self.signatures: list[AnySignature] = []

    def meet(self, signature: AnySignature) -> None:
        if all(type(other) is not type(signature) or other != signature for other in self.signatures):
            self.signatures.append(signature)

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        pass


def _described(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], binary: Any) -> dict[str, Any]:
    values = dict(zip(kernel.arg_names, args, strict=False)) | constants
    fixed = {p.name: values[p.name] for p in getattr(kernel, "params", ()) if p.is_constexpr and p.name in values}
    return {
        **{"hash": binary.hash, "kernel": kernel.__name__, "constants": fixed},
        **{"warps": binary.metadata.num_warps, "stages": binary.metadata.num_stages},
        **{"registers": getattr(binary, "n_regs", None), "spills": getattr(binary, "n_spills", None)},
    }


def prove(
    device: torch.device, signature: AnySignature, launches: Launches, ready: Callable[[], Any] = lambda: None
) -> dict[str, Any]:
    """``errors`` of every result, the ``binaries`` that ran, and what is ``wrong``, None if nothing is. ``ready`` is
    called when all is compiled and the rest takes seconds."""
    if device.type == "cuda":
        with mode(Compiling(launches)), ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool):
            _compile(device, signature)
    ready()
    recording = Recording(launches)
    errors: dict[str, float] = {}
    unequal: set[str] = set()
    with mode(recording):
        for found, again, exact in _results(device, signature):
            unequal |= {name for name in found if not torch.equal(found[name], again[name])}
            for name, error in _errors(found, exact, smallest(signature)).items():
                errors[name] = max(errors.get(name, 0.0), error)
    return {
        "errors": errors,
        "binaries": list(recording.binaries.values()),
        "wrong": _wrong(signature, errors, unequal),
    }


def _wrong(signature: AnySignature, errors: dict[str, float], unequal: set[str]) -> str | None:
    suspects = SUSPECTS if isinstance(signature, Signature) else {}
    for name in [*suspects, *sorted(errors.keys() - suspects.keys())]:
        limit = limit_of(signature, name)
        look = f"; look at {suspects[name]}" if name in suspects else ""
        if name in errors and not errors[name] <= limit:
            return f"{name} is off by {errors[name]:.1e}, {limit:.0e} is allowed{look}"
        if name in unequal:
            return f"two runs give {name} in different bits{look}"
    return None


def limit_of(signature: AnySignature, name: str) -> float:
    """What a result may be off by."""
    if name == "state" or name.startswith("fold"):
        return STATE_LIMIT
    if isinstance(signature, Post):
        return 0.0
    narrow = isinstance(signature, Signature) and min(signature.K, signature.V) < 64
    dtypes = _rounded(signature)
    limit = max(LIMITS[dtype][name.startswith("d")] for dtype in dtypes) * (NARROW if narrow else 1.0)
    if isinstance(signature, Norm):  # it rounds three times, as transformers' module does; a row may hang on one number
        limit = max(limit, *(1.5 * torch.finfo(dtype).eps for dtype in dtypes))
    return limit


def _rounded(signature: AnySignature) -> list[torch.dtype]:
    """The dtypes to which something is rounded on its way; of the delta rule, those of q, k and v alone."""
    fields = [signature.dtype] if isinstance(signature, Signature) else list(signature)
    return [field for field in fields if field in LIMITS]


def smallest(signature: AnySignature) -> float:
    """A truth that is smaller everywhere counts as this: fp16 operands hold no smaller ones."""
    return 2.0**-14 if torch.float16 in _rounded(signature) else 0.0


def _errors(found: dict[str, Tensor], exact: dict[str, Tensor], floor: float) -> dict[str, float]:
    worst = {}
    for name, b in exact.items():
        norms = b.flatten(1).norm(dim=1).clamp(min=floor * math.sqrt(b[0].numel()))
        errors = (found[name].double() - b).flatten(1).norm(dim=1) / norms.masked_fill(norms == 0, 1)
        worst[name] = errors.nan_to_num(nan=math.inf, posinf=math.inf).max().item()
    return worst


Results = dict[str, Tensor]


def _results(device: torch.device, signature: AnySignature) -> Iterator[tuple[Results, Results, Results]]:
    """What the kernels find, what they find again, and the truth."""
    if not isinstance(signature, Signature | Fold):
        yield from proof_layers.results(device, signature)
        return
    K, V = signature.K, signature.V
    if isinstance(signature, Signature):
        for case in CASES:
            inputs = make_inputs(signature, case, device)
            exact = _differentiated(inputs, case, signature, "torch", torch.float64)
            found, again = (_differentiated(inputs, case, signature, "triton", None) for _ in range(2))
            yield found, again, exact
    if triton_scan.takes(torch.empty(1, 1, 1, K, V, device=device)):
        for how in FOLDS:
            found, again = (_folded(K, V, device, how, torch.float32) for _ in range(2))
            yield found, again, _folded(K, V, device, how, torch.float64)


class Folding(NamedTuple):
    """What a fold is given, and which way it goes."""

    first: bool
    documents: bool
    forgets: bool
    reverse: bool


FOLDS = [Folding(*how) for how in product((False, True), repeat=4)]


def _folded(K: int, V: int, device: torch.device, how: Folding, dtype: torch.dtype) -> Results:
    """The fold over segments from either end, in fp32 by the kernel, in fp64 by matrix products."""
    draw = torch.Generator().manual_seed(0)
    N, B, HV = 4, BATCH, 3
    shapes = ((N, B, HV, K, K), (N, B, HV, K, V), (B, HV, K, V))
    M, U, first = (torch.randn(shape, generator=draw).to(device, dtype) for shape in shapes)
    M /= K**0.5
    continues = torch.tensor([[True, True], [True, False], [True, True], [False, True]], device=device)
    start, passes = first if how.first else None, continues if how.documents else None
    flags: Tensor | None = None
    if how.forgets:  # all segments in one head, some in another
        flags = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 0], [1, 0, 0]], dtype=torch.int32, device=device)
        flags = flags[:, None].expand(N, B, HV).contiguous()
        M[flags != 0] = 0
    last: Tensor | None
    mailed: tuple[Tensor, Tensor] | None = None
    if dtype == torch.float32:
        states, last = triton_scan.fold(M, U, start, passes, flags, N, how.reverse)
        mailed = _by_mail(M, U, start, passes, flags, how.reverse)
    elif how.reverse:
        states, last = LocalScan().reverse(M, U, passes, flags, start, True, True)()
    else:
        states, last = LocalScan().forward(M, U, passes, flags, start, True)()
    assert last is not None

    def row_by_row(states: Tensor, last: Tensor) -> Tensor:
        # The state before the first segment is a copy: rows of zeros would have no relative error.
        inner = states[:-1] if how.reverse else states[1:]
        return torch.cat([inner.transpose(0, 1).flatten(1), last.flatten(1)], 1)

    found = row_by_row(states, last)
    return {"fold": found, "fold by mail": found if mailed is None else row_by_row(*mailed)}


def _by_mail(
    M: Tensor, U: Tensor, start: Tensor | None, passes: Tensor | None, flags: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The state before each segment and the last one where every segment's goes through an outbox into the next one's
    inbox, in two parts, more often than the inbox has slots."""
    tiles, heads = triton_scan.tiles_of(U), U.shape[1] * U.shape[2]
    inbox, outbox, clock = triton_scan.loopback(tiles, U.device)
    states, last, N, each = torch.empty_like(U), torch.empty_like(U[0]), len(U), tiles // heads
    for _ in range(3):
        for i in range(N):
            n = N - 1 - i if reverse else i
            come, go = (inbox if i else None), (outbox if i + 1 < N else None)
            for part in (slice(0, heads // 2 + 1), slice(heads // 2 + 1, heads)):
                triton_scan.wait((part.stop - part.start) * each, come, go, clock, first_tile=part.start * each)
                triton_scan.fold(
                    M[n : n + 1], U[n : n + 1], None if come else start, None if passes is None else passes[n : n + 1],
                    None if flags is None else flags[n : n + 1], 1, reverse,
                    inbox=come, outbox=go, clock=clock, states_NBHKV=states[n : n + 1], last_BHKV=last, rows=part,
                )  # fmt: skip
    return states, last


def make_inputs(signature: Signature, case: Case, device: torch.device) -> dict[str, Tensor]:
    """The case's tensors by name, laid out in memory as the signature says; ``doc_start`` if it has documents."""
    s, B, T = signature, BATCH, TOKENS
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(B, T, s.H, s.K, generator=draw)
    uniform = torch.rand(B, T, s.HV, generator=draw)
    decays = torch.stack([DECAYS[name](u) for name, u in zip(case.decays, uniform, strict=True)])
    values = {
        "q": (torch.randn(B, T, s.H, s.K, generator=draw), s.dtype, (*s.q, 1)),
        "k": (keys if s.normalise else F.normalize(keys, dim=-1), s.dtype, (*s.k, 1)),
        "v": (torch.randn(B, T, s.HV, s.V, generator=draw), s.dtype, (*s.v, 1)),
        "beta": (torch.rand(B, T, s.HV, generator=draw), s.beta_dtype, s.beta),
    }
    if s.g is not None:
        assert s.g_dtype is not None
        values["g"] = (decays, s.g_dtype, s.g)
    inputs = {name: laid_out(x.to(device, dtype), strides) for name, (x, dtype, strides) in values.items()}
    if case.states:
        inputs["initial"] = torch.randn(B, s.HV, s.K, s.V, generator=draw).to(device)
    if s.documents is not None:
        doc_start = torch.zeros(B, T, dtype=torch.int64)
        for row, starts in enumerate(case.documents):
            for start in starts:
                doc_start[row, start:] = start
        doc_start = torch.where(doc_start == 0, -1 if case.states else 0, doc_start)
        inputs["doc_start"] = doc_start.to(device, s.documents)
    inputs["do"] = torch.randn(B, T, s.HV, s.V, generator=draw).to(device, s.dtype)
    inputs["dfinal"] = torch.randn(B, s.HV, s.K, s.V, generator=draw).to(device)
    return inputs


def laid_out(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A copy of x ``[B, ...]`` with these strides behind the batch; along a stride of 0, of index 0 alone."""
    alone = x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in (1, *strides))]
    row = 1 + sum((size - 1) * stride for size, stride in zip(alone.shape[1:], strides, strict=True))
    y = torch.empty_strided(alone.shape, (-(-row // 16) * 16, *strides), dtype=x.dtype, device=x.device)
    return y.copy_(alone).expand(x.shape)


def _segments(case: Case, doc_start: Tensor | None) -> Segments:
    starts = tuple(range(0, TOKENS, case.segment_tokens))
    if doc_start is None:
        return Segments(case.segment_tokens, starts, TOKENS)
    first = torch.tensor(starts, device=doc_start.device)
    last = (first + case.segment_tokens).clamp(max=TOKENS) - 1
    return Segments(case.segment_tokens, starts, TOKENS, (doc_start[:, last] < first).T.contiguous())


def _differentiated(
    inputs: dict[str, Tensor], case: Case, signature: Signature, backend: Any, dtype: torch.dtype | None
) -> Results:
    """Outputs, final state, and the gradient of every input; the tensors as they are unless a dtype is given."""
    names = [name for name in ("q", "k", "v", "g", "beta", "initial") if name in inputs]
    leaves = {name: inputs[name].to(dtype or inputs[name].dtype).detach().requires_grad_() for name in names}
    doc_start = inputs.get("doc_start")
    o, final = delta_rule(
        leaves["q"], leaves["k"], leaves["v"], leaves.get("g"), leaves["beta"],
        scale=signature.K**-0.5,
        segments=_segments(case, doc_start),
        scan=LocalScan(),
        doc_start_BT=doc_start,
        initial_state_BHKV=leaves.get("initial"),
        output_final_state=case.states,
        rule=signature.rule,
        normalise_qk=signature.normalise,
        backend=backend,
    )  # fmt: skip
    wanted, given = [o], [inputs["do"].to(o.dtype)]
    if final is not None:
        wanted, given = [o, final], [*given, inputs["dfinal"].to(final.dtype)]
    grads = torch.autograd.grad(wanted, list(leaves.values()), given)
    found = {"o": o.detach()} | {"d" + name: grad for name, grad in zip(leaves, grads, strict=True)}
    return found if final is None else found | {"final": final.detach()}


def _compile(device: torch.device, signature: AnySignature) -> None:
    """Every launch of a proof once, in a mode that compiles; here and not in autograd's thread, where Triton would
    compile one after another."""
    if isinstance(signature, Signature):
        t = make_inputs(signature, CASES[0], device)
        part = _segments(CASES[0], t.get("doc_start"))
        q, k, v, beta, do = (t[name] for name in ("q", "k", "v", "beta", "do"))
        scale = signature.K**-0.5
        x = Inputs(q, k, v, t.get("g"), beta, t.get("doc_start"), part, scale, signature.rule, signature.normalise)
        p = chunk_triton.prepare(x)
        yes = (True,) * len(part)
        _, U, _ = chunk_triton.summarise(p, yes, yes)
        chunk_triton.apply(p, U)
        D = chunk_triton.summarise_backward(p, do, yes)
        chunk_triton.apply_backward(p, U, do, D.clone)
        signature = Fold(signature.K, signature.V)
    for _ in _results(device, signature):
        pass


def end_with(parent: int) -> None:
    """End this process when the one that waits for it was killed: whoever stops a job wants the GPU back."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent").start()


def child() -> None:
    """The process that :mod:`.proof` starts: a task on stdin, a report on stdout. What others print goes to stderr."""
    out = os.dup(1)
    os.dup2(2, 1)

    def say(report: dict[str, Any]) -> None:
        os.write(out, (json.dumps(report) + "\n").encode())

    task = json.load(sys.stdin)
    end_with(task["parent"])
    device = torch.device(task["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    say({"began": True})
    try:
        # The alarm ends the process by itself, from inside a call that waits for the device too.
        launches, signature = candidates()[task["table"]], from_json(task["signature"])
        say(prove(device, signature, launches, lambda: signal.alarm(RUN_SECONDS)))
    except torch.OutOfMemoryError as error:
        say({"unable": str(error).splitlines()[0]})
    except Exception as error:
        say({"wrong": f"{type(error).__name__}: {str(error).strip() or 'no more is said'}".splitlines()[0]})
    os._exit(0)  # no destructors: they would wait for a device whose context may be lost
