"""One call of softmax attention, forward and backward. A backend is two functions:

    forward(q, k, v, edges, scale) -> (o, lse)
    backward(do, q, k, v, o, lse, edges, scale) -> (dq, dk, dv)

``q_BHSD``, ``k_BGUD``, ``v_BGUD`` with H a multiple of G (query head h reads key head h // (H // G)). ``edges`` says
which keys a query sees: ``()``, all of them, a full rectangle; ``(0, S)``, those up to itself, a causal square;
``(0, a, b, S)``, those of its own document up to itself, squares side by side (B = 1). ``lse_BHS`` is the log of the
sum of exponentials, fp32 (fp64 for fp64). Results are in q's dtype, or wider where a backend has them so: what is
merged or summed is then rounded once. The backward is given the *merged* output and lse of all calls of a query; its
dq, dk, dv are then the call's share of the whole gradient (Dao 2023, FlashAttention-2, section 3.1: P = exp(S - lse),
delta = rowsum(dO * O)).

    cudnn       cuDNN through torch, bf16 and fp16. A plan is built, and kept, for every pair of lengths (a second or
                so): lengths that are no multiple of 512, and several documents in one call, go to flash instead.
                Sums dq with atomics: two runs differ in the last bits.
    flash       FlashAttention, bf16 and fp16: torch's, and the flash-attn packages' where they are installed, as
                flash_attn_2, flash_attn_3 and flash_attn_4 (see flash.py). With ``_deterministic`` behind its name each
                sums dq in a fixed order.
    flash_cpu   torch's own for the CPU.        plain   matrix products of any dtype on any device, by tiles of queries.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .errors import PlanError, first_line
from .flash import VERSIONS, Edges

aten = torch.ops.aten

TILE = 512  # queries that the plain backend works on at a time
CUDNN_TOKENS = 512  # cuDNN is asked for lengths that are multiples of this
PROOF_ERROR = 2e-2  # |got - plain| / |plain|, of bf16 operands; a wrong kernel is off by far more
TIMES = 3  # that a backend is timed
DETERMINISTIC = "_deterministic"
FASTER = 1.1  # times: another backend must be this much faster than one before it to be taken instead
LONGEST = {"cpu": 256, "cuda": 16384}  # tokens of the block that they are timed on


@dataclass(frozen=True)
class Backend:
    name: str
    forward: Callable[[Tensor, Tensor, Tensor, Edges, float], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Edges, float], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Heads:
    """What a choice of backend depends on."""

    device: torch.device
    dtype: torch.dtype
    queries: int
    keys: int
    width: int  # of queries and keys
    value_width: int


def choose(heads: Heads, asked: str = "auto", deterministic: bool = False, tokens: int = 0) -> tuple[Backend, str]:
    """The backend for these heads, and in words why it is this one (empty where there is nothing to say).

    ``auto``: of those that a small problem of these heads proves right, forward and backward, the one that is fastest
    there and back on a causal square of ``tokens``; with 0 of them nothing is timed and the first of cudnn, flash and
    plain is taken (on a CPU flash_cpu, then plain). ``deterministic``: of those that repeat their bits. The proofs run
    once a process, and wait for the device.

    Raises: PlanError for a backend that was asked for by name and cannot be used.
    """
    if asked != "auto":
        reason = unusable(asked, heads)
        if reason:
            raise PlanError(f"attention_backend={asked}: {reason}; use auto, or another of {', '.join(BACKENDS)}")
        if deterministic and asked in REPEATABLE:
            raise PlanError(
                f"attention_backend={asked} does not repeat its bits, as deterministic=true asks; use "
                f"{REPEATABLE[asked]}"
            )
        return BACKENDS[asked], ""
    usable: list[Backend] = []
    words: list[str] = []
    for name in _order(heads, deterministic, tokens):
        if name == "plain" and usable and heads.device.type == "cuda":
            break  # it is not for speed there
        reason = unusable(name, heads)
        if reason is None:
            usable.append(BACKENDS[name])
        else:
            words.append(f"{name}: {reason}")
        if usable and not tokens:
            break
    best = usable[0]
    if len(usable) > 1:
        tokens = min(tokens, LONGEST[heads.device.type])
        times: dict[str, float] = {}
        for backend in usable:
            try:
                times[backend.name] = _seconds(backend.name, heads, tokens)
            except Exception as error:  # out of memory, or a package's refusal of this length
                times[backend.name] = float("inf")
                words.append(f"{backend.name}: {str(error).partition(chr(10))[0]}")
        for backend in usable[1:]:
            if times[backend.name] * FASTER < times[best.name]:
                best = backend
        timed = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in times.items())
        words.insert(0, f"there and back on {tokens:,} tokens: {timed}")
    return best, "; ".join(words)


def _order(heads: Heads, deterministic: bool, timed: int) -> list[str]:
    """Backends to look at, those first that are taken where nothing is timed."""
    if heads.device.type == "cpu":
        return ["flash_cpu", "plain"]
    packages = [name for name, version in VERSIONS.items() if timed and version.module and not version.missing()]
    names = ["cudnn", "flash", *packages, "plain"]
    return list(dict.fromkeys(REPEATABLE.get(name, name) if deterministic else name for name in names))


@functools.cache
def _seconds(name: str, heads: Heads, tokens: int) -> float:
    """The fastest of some times there and back on a causal square."""
    backend, scale, edges = BACKENDS[name], heads.width**-0.5, (0, tokens)
    q, k = (_normal(heads, count, heads.width, tokens, count) for count in (heads.queries, heads.keys))
    v, do = (_normal(heads, count, heads.value_width, tokens, 7) for count in (heads.keys, heads.queries))

    def wait() -> None:
        if heads.device.type == "cuda":
            torch.cuda.synchronize(heads.device)

    times = []
    for _ in range(TIMES + 1):  # the first is not counted: plans are made, kernels loaded
        wait()
        began = time.perf_counter()
        o, lse = backend.forward(q, k, v, edges, scale)
        backend.backward(do, q, k, v, o, lse, edges, scale)
        wait()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _normal(heads: Heads, count: int, width: int, tokens: int, seed: int) -> Tensor:
    """``[1, count, tokens, width]`` as layers have it: tokens before heads in memory."""
    draw = torch.Generator(heads.device).manual_seed(seed)
    shape = (1, tokens, count, width)
    return torch.randn(shape, generator=draw, device=heads.device).to(heads.dtype).transpose(1, 2)


@functools.cache
def unusable(name: str, heads: Heads) -> str | None:
    """Why a backend cannot be used for these heads, in words; None where it can."""
    if name not in BACKENDS:
        return f"there is no backend {name!r}"
    if name == "plain":
        return None
    wanted = "cpu" if name == "flash_cpu" else "cuda"
    if heads.device.type != wanted:
        return f"it is for {wanted} tensors, these are on {heads.device.type}"
    if heads.width != heads.value_width:
        return f"values are {heads.value_width} wide, keys {heads.width}"
    if name == "flash_cpu":
        return None
    if heads.dtype not in (torch.bfloat16, torch.float16):
        return f"it is for bf16 and fp16, not {str(heads.dtype).removeprefix('torch.')}"
    if heads.width % 8 or heads.width > 256:
        return f"heads are {heads.width} wide, it takes multiples of 8 up to 256"
    version = VERSIONS.get(name.removesuffix(DETERMINISTIC))
    return (version.missing() if version else None) or _failed_proof(BACKENDS[name], heads)


def _failed_proof(backend: Backend, heads: Heads) -> str | None:
    """What is wrong with a backend on this device, found on small problems whose answer the plain one knows."""
    S, scale = CUDNN_TOKENS, heads.width**-0.5
    for U, edges in ((S, (0, S)), (2 * S, ()), (S, (0, 100, 101, S))):
        q, do = (_normal(heads, heads.queries, heads.width, S, seed) for seed in (0, 1))
        k, v = (_normal(heads, heads.keys, heads.width, U, seed) for seed in (2, 3))
        try:
            o, lse = backend.forward(q, k, v, edges, scale)
            got = (o, lse, *backend.backward(do, q, k, v, o, lse, edges, scale))
            if backend.name in REPEATABLE.values():
                again = backend.backward(do, q, k, v, o, lse, edges, scale)
                if not all(torch.equal(a, b) for a, b in zip(again, got[2:], strict=True)):
                    return "its backward does not repeat its bits"
        except Exception as failure:  # whatever a package of another version raises
            return first_line(failure)
        do, q, k, v = do.float(), q.float(), k.float(), v.float()
        wide, wide_lse = PLAIN.forward(q, k, v, edges, scale)
        truth = (wide, wide_lse, *PLAIN.backward(do, q, k, v, wide, wide_lse, edges, scale))
        for name, mine, want in zip(("o", "lse", "dq", "dk", "dv"), got, truth, strict=True):
            error = float((mine.float() - want).norm() / want.norm())
            if not error < PROOF_ERROR:
                return f"{name} is off by {error:.1e} on {S} queries and {U} keys"
    return None


# cuDNN through torch.


def _cudnn_takes(q: Tensor, k: Tensor, edges: Edges) -> bool:
    return len(edges) <= 2 and q.shape[2] % CUDNN_TOKENS == 0 and k.shape[2] % CUDNN_TOKENS == 0


def _dense(x_BHSD: Tensor) -> Tensor:
    """The same numbers, tokens outermost in memory and no gaps. cuDNN's plans are found again by the strides of q, k
    and v alone, and expect o, do and all gradients in q's."""
    x_BSHD = x_BHSD.transpose(1, 2)
    # a single row's stride is no concern, but is compared all the same
    x_BSHD = x_BSHD[0].contiguous().unsqueeze(0) if len(x_BSHD) == 1 else x_BSHD.contiguous()
    return x_BSHD.transpose(1, 2)


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, edges: Edges, scale: float) -> tuple[Tensor, Tensor]:
    if not _cudnn_takes(q, k, edges):
        return FLASH.forward(q, k, v, edges, scale)
    q, k, v = _dense(q), _dense(k), _dense(v)
    o, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, bool(edges), False, scale=scale)
    return o, lse.squeeze(-1)


def _cudnn_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, edges: Edges, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if not _cudnn_takes(q, k, edges):
        return FLASH.backward(do, q, k, v, o, lse, edges, scale)
    do, q, k, v, o = (_dense(x) for x in (do, q, k, v, o))
    unused = torch.empty((), dtype=torch.int64, device=q.device)  # seed and offset of a dropout that there is not
    return aten._scaled_dot_product_cudnn_attention_backward(
        do, q, k, v, o, lse.contiguous().unsqueeze(-1), unused, unused, None, None, None, q.shape[2], k.shape[2], 0.0,
        bool(edges), scale=scale,
    )  # fmt: skip


# One block at a time: the CPU's flash attention, and matrix products.

BlockForward = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
BlockBackward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor, Tensor]
]


def _by_document(name: str, forward: BlockForward, backward: BlockBackward) -> Backend:
    """A backend from functions of one rectangle or one square."""

    def forward_all(q: Tensor, k: Tensor, v: Tensor, edges: Edges, scale: float) -> tuple[Tensor, Tensor]:
        if len(edges) <= 2:
            return forward(q, k, v, bool(edges), scale)
        parts = [forward(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], True, scale) for a, b in pairwise(edges)]
        return torch.cat([o for o, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)

    def backward_all(
        do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, edges: Edges, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        if len(edges) <= 2:
            return backward(do, q, k, v, o, lse, bool(edges), scale)
        parts = []
        for a, b in pairwise(edges):
            mine = (x[:, :, a:b] for x in (do, q, k, v, o, lse))
            parts.append(backward(*mine, True, scale))  # type: ignore[call-arg, arg-type]
        dq, dk, dv = (torch.cat(grads, 2) for grads in zip(*parts, strict=True))
        return dq, dk, dv

    return Backend(name, forward_all, backward_all)


def _flash_cpu_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (_at_least_fp32(x) for x in (q, k, v))
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _flash_cpu_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    do, q, k, v, o = (_at_least_fp32(x) for x in (do, q, k, v, o))
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(do, q, k, v, o, lse, 0.0, causal, scale=scale)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _scores(q: Tensor, k: Tensor, first: int, causal: bool, scale: float) -> Tensor:
    """``[B, G, H/G, S, U]`` for the queries from ``first`` on."""
    scores = torch.einsum("bgrsd,bgud->bgrsu", q, k) * scale
    if causal:
        seen = torch.arange(first, first + q.shape[3], device=q.device)[:, None] >= torch.arange(
            k.shape[2], device=q.device
        )
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores


def _tiles(length: int) -> list[slice]:
    return [slice(at, min(at + TILE, length)) for at in range(0, length, TILE)]


def _grouped(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """``[B, H, S, D]`` -> ``[B, G, H/G, S, D]``."""
    return x.unflatten(1, (groups, -1)).to(dtype)


def _plain_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups, keys, values = k.shape[1], k.to(dtype), v.to(dtype)
    outputs, sums = [], []
    for tile in _tiles(q.shape[2]):
        scores = _scores(_grouped(q[:, :, tile], groups, dtype), keys, tile.start, causal, scale)
        lse = scores.logsumexp(-1)
        outputs.append(torch.einsum("bgrsu,bgud->bgrsd", torch.exp(scores - lse[..., None]), values).flatten(1, 2))
        sums.append(lse.flatten(1, 2))
    return torch.cat(outputs, 2), torch.cat(sums, 2)


def _plain_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups, keys, values = k.shape[1], k.to(dtype), v.to(dtype)
    dq, dk, dv = [], torch.zeros_like(keys), torch.zeros_like(values)
    for tile in _tiles(q.shape[2]):
        queries, grad, out = (_grouped(x[:, :, tile], groups, dtype) for x in (q, do, o))
        weights = _scores(queries, keys, tile.start, causal, scale)
        weights = torch.exp(weights - _grouped(lse[:, :, tile, None], groups, dtype))
        dv += torch.einsum("bgrsu,bgrsd->bgud", weights, grad)
        delta = (grad * out).sum(-1, keepdim=True)
        dscores = weights * (torch.einsum("bgrsd,bgud->bgrsu", grad, values) - delta) * scale
        dq.append(torch.einsum("bgrsu,bgud->bgrsd", dscores, keys).flatten(1, 2))
        dk += torch.einsum("bgrsu,bgrsd->bgud", dscores, queries)
    return torch.cat(dq, 2), dk, dv


CUDNN = Backend("cudnn", _cudnn_forward, _cudnn_backward)
FLASH_CPU = _by_document("flash_cpu", _flash_cpu_forward, _flash_cpu_backward)
PLAIN = _by_document("plain", _plain_forward, _plain_backward)

# twins that repeat their bits lie beside those that do not
_FLASH = [
    Backend(name + suffix, *version.functions(bool(suffix)))
    for name, version in VERSIONS.items()
    for suffix in ("", DETERMINISTIC)
]
BACKENDS = {backend.name: backend for backend in (CUDNN, *_FLASH, FLASH_CPU, PLAIN)}
FLASH = BACKENDS["flash"]
# what stands in for one that does not repeat its bits
REPEATABLE = {"cudnn": "flash" + DETERMINISTIC} | {name: name + DETERMINISTIC for name in VERSIONS}
