"""The chunked delta rule in Triton kernels: the four functions of :mod:`.chunk_torch`, for any number of segments.

    prepare   the tiles A and P of every chunk, and the scales of their rows          (triton_prepare, gluon_prepare)
    forward   the state through a segment: its summary, its outputs, or what the backward pass needs (triton_states)
    reverse   the state's gradient through a segment, right to left                   (triton_reverse)
    gradients of a chunk's inputs, from its states                                    (triton_gradients)
    backward  reverse and gradients in one, where the GPU is a Hopper                 (gluon_backward)

Nothing here waits for the device, and no launch depends on how many segments are here: not on T, not on N.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from . import proof
from .gluon_backward import backward_kernel
from .gluon_chunk import WIDTH, scales_of, tiles_of, tokens_of
from .gluon_prepare import prepare_pairs_kernel
from .gluon_reverse import whole_reverse_kernel
from .gluon_states import whole_states_kernel
from .segments import CHUNK, Gradients, Inputs
from .signatures import strides as signature_strides
from .triton_gradients import PARTS, gates_kernel, group_kernel, keys_kernel, pairs_kernel, queries_kernel
from .triton_prepare import ROWS, invert_kernel, prepare_kernel
from .triton_reverse import reverse_kernel
from .triton_states import states_kernel
from .verdicts import Launches

WIDTHS = (16, 32, 64, 128, 256)  # of K and V
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GATES = 8  # chunks of a program that adds up dbeta and dg

@dataclass(frozen=True)
class Launch:
    """Columns of V a program (at most), warps, stages of its loop's loads, and registers a thread (None: as many as
    the compiler likes)."""

    columns: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int | None]:
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


# For K = V = 128 in bf16 on an H200 with Triton 3.6.
LAUNCHES = {
    "prepare_pairs": Launch(64, 4, 1, 168),  # its warps are part of how it is written; 0 stands for the next two
    "prepare": Launch(64, 4, 1),
    "invert": Launch(64, 1, 1),
    "whole_states": Launch(128, 8, 1),  # the same
    "summarise": Launch(64, 4, 3),
    "apply": Launch(64, 4, 2),
    "keep": Launch(64, 4, 2),
    "whole_reverse": Launch(128, 8, 1),  # the same
    "reverse_summary": Launch(64, 4, 2),
    "reverse": Launch(64, 4, 2),
    "pairs": Launch(64, 8, 3, 128),
    "queries": Launch(64, 4, 3),
    "keys": Launch(64, 8, 3),
    "backward": Launch(128, 8, 1),  # the same; 0 stands for passes 3 and 4 apart
    "group": Launch(128, 8, 1),
}


@dataclass(frozen=True)
class Prepared:
    """Pass 1's results, and the arguments that passes 2 to 4 share."""

    x: Inputs
    A: Tensor
    P: Tensor
    rows: Tensor
    through: Tensor
    bound: Tensor
    chunks: int
    launches: Launches

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What :func:`prepare` takes back. The backward pass keeps these, together as large as v at V = 128, because to
        make them again takes a tenth of its time."""
        return self.A, self.P, self.rows, self.through, self.bound

    @property
    def value_heads(self) -> int:
        return self.x.v.shape[0] * self.x.v.shape[2]

    @property
    def state_shape(self) -> tuple[int, ...]:
        """[N, B, HV, K, V]"""
        return len(self.x.segments), self.x.v.shape[0], self.x.v.shape[2], self.x.k.shape[3], self.x.v.shape[3]

    @property
    def sizes(self) -> tuple[int, ...]:
        s = self.x.segments
        return self.x.v.shape[1], self.chunks, s.tokens // CHUNK, self.x.v.shape[0], len(s)

    @property
    def shape(self) -> dict[str, Any]:
        return _shape(self.x) | {"V": self.x.v.shape[3], "ERASE": self.x.rule.erase, "DOT": _dot(self.x)}


def _shape(x: Inputs) -> dict[str, int]:
    H, K = x.k.shape[2:]
    return {"H": H, "G": x.v.shape[2] // H, "K": K}


def _flags(x: Inputs) -> dict[str, bool]:
    return {
        "HAS_G": x.g is not None,
        "HAS_DOC": x.doc_start is not None,
        "ERASE": x.rule.erase,
        "PREVIOUS": x.rule.error_decay == "previous",
        "NORM": x.normalise_qk,
    }


def _dot(x: Inputs) -> str:
    """How products of fp32 operands are formed; those of bf16 and fp16 have one way."""
    return "tf32x3" if x.v.dtype == torch.float32 else "tf32"


def _launch(launches: Launches, use: str, x: Inputs) -> Launch:
    """The launch of a kernel at these widths."""
    how, K, V = launches[use], x.k.shape[3], x.v.shape[3]
    if min(K, V) < 64:  # a warp group's matrix instructions gave wrong numbers there: two warps use others
        how = replace(how, warps=min(how.warps, 2), registers=None)
    elif max(K, V) < 128:
        how = replace(how, warps=min(how.warps, 4), registers=None)
    # Loads are fetched ahead where a multiprocessor's shared memory holds them.
    return how if max(K, V) * x.k.element_size() <= 256 else replace(how, stages=1, registers=None)


def _constants(use: str, p: Prepared) -> dict[str, Any]:
    """The constants of a pass 4 kernel."""
    x, V = p.x, p.x.v.shape[3]
    how = _launch(p.launches, use, x)
    return _shape(x) | {"V": V, "BV": min(V, how.columns), "DOT": _dot(x), "STAGES": how.stages} | how.options


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of the batch, tokens and heads; the last two are constants of a binary, as its signature has them."""
    return x.stride(0), *signature_strides(x)


@lru_cache(maxsize=256)
def _on_device(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small table on the device, copied there once: the copy would wait for the device in every call."""
    return torch.tensor(values, dtype=dtype, device=device)


def _documents(x: Inputs) -> Tensor:
    return x.beta if x.doc_start is None else x.doc_start.contiguous()


def _aligned(x: Tensor) -> Tensor:
    """x as the kernels read it, 16 bytes at a time: its last axis contiguous, the others in steps of 16 numbers."""
    apart = all(stride % 16 == 0 for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1)
    fits = apart and x.stride(-1) == 1 and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _gradient(do_BTHV: Tensor) -> Tensor:
    """The outputs' gradient, laid out as the outputs are: autograd's layout must not decide a binary."""
    return _aligned(do_BTHV.contiguous())


def refuse(k: Tensor, v: Tensor) -> None:
    """Say what has no kernel here, and the way out."""
    for name, width in {"K": k.shape[-1], "V": v.shape[-1]}.items():
        if width not in WIDTHS:
            raise ValueError(
                f"{name}={width}: the Triton kernels have widths {WIDTHS}; pad to one of them, or pass "
                f"backend='torch' for the (much slower) path in torch operations"
            )
    if v.dtype not in DTYPES:
        raise TypeError(
            f"q, k and v are {v.dtype}: the Triton kernels take bf16, fp16 and fp32; cast them, or pass "
            f"backend='torch' for the (much slower) path in torch operations"
        )
    if not v.is_cuda and not isinstance(states_kernel, InterpretedFunction):
        raise ValueError(
            f"backend='triton' on {v.device}: the kernels run on a GPU (or slowly anywhere, with TRITON_INTERPRET=1 "
            f"set before they are imported); move the inputs there, or pass backend='torch'"
        )


@lru_cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _in_gluon(x: Inputs, launches: Launches, use: str) -> bool:
    """Whether a pass has its kernel for Hopper here."""
    widths = x.k.shape[3] == x.v.shape[3] == WIDTH.value
    rule = x.rule.erase and x.rule.error_decay != "previous"
    wanted = launches[use].warps == LAUNCHES[use].warps
    return wanted and widths and rule and x.v.dtype != torch.float32 and _is_hopper(x.v.device)


def prepare(x: Inputs, tensors: tuple[Tensor, ...] | None = None) -> Prepared:
    """Pass 1 over all chunks, or its tensors from an earlier call; what the other functions start from."""
    x = replace(x, q=_aligned(x.q), k=_aligned(x.k), v=_aligned(x.v))
    B, T, HV, _ = x.v.shape
    NC, device, launches = -(-T // CHUNK), x.v.device, proof.require(x)
    if tensors is not None:
        A, P, rows, through, bound = tensors
        return Prepared(x, A, P, rows, through, bound, NC, launches)
    tiles = (B * HV, NC, CHUNK, CHUNK)
    A, P = (torch.empty(tiles, dtype=x.v.dtype, device=device) for _ in range(2))
    rows = torch.empty(B * HV, NC, len(ROWS), CHUNK, dtype=torch.float32, device=device)
    through, bound = (torch.empty(B * HV, NC, dtype=torch.float32, device=device) for _ in range(2))
    g = x.beta if x.g is None else x.g
    doc = _documents(x)
    starts = _on_device(x.segments.starts, torch.int64, device)
    sizes = T, NC, x.segments.tokens // CHUNK, x.scale
    if _in_gluon(x, launches, "prepare_pairs"):
        flags = _flags(x)
        proof.launch(
            prepare_pairs_kernel, (B * x.k.shape[2], NC),
            tokens_of(x.q), tokens_of(x.k), tiles_of(P), tiles_of(A), g, x.beta, doc, starts, rows, through, bound,
            *sizes, *_strides(g), *_strides(x.beta),
            H=x.k.shape[2], G=HV // x.k.shape[2], HEADS=triton.next_power_of_2(HV // x.k.shape[2]),
            **{name: flags[name] for name in ("HAS_G", "HAS_DOC", "NORM")},
            num_warps=launches["prepare_pairs"].warps, maxnreg=launches["prepare_pairs"].registers,
        )  # fmt: skip
        return Prepared(x, A, P, rows, through, bound, NC, launches)
    N = torch.empty(tiles if x.rule.erase else 0, dtype=torch.float32, device=device)
    proof.launch(
        prepare_kernel, (B * HV, NC),
        x.q, x.k, g, x.beta, doc, starts, N, P, rows, through, bound, *sizes,
        *_strides(x.q), *_strides(x.k), *_strides(g), *_strides(x.beta),
        **_shape(x), **_flags(x), DOT=_dot(x), **_launch(launches, "prepare", x).options,
    )  # fmt: skip
    if x.rule.erase:
        invert = launches["invert"].options
        proof.launch(invert_kernel, (B * HV * NC,), N, A, 16, DOT=_dot(x), **invert)
    return Prepared(x, A, P, rows, through, bound, NC, launches)


def _forward(
    p: Prepared, use: str, heads: slice | None = None, *, need: Tensor | None = None, incoming: Tensor | None = None,
    o: Tensor | None = None, states: Tensor | None = None, errors: Tensor | None = None,
    M: Tensor | None = None, U: Tensor | None = None,
) -> None:  # fmt: skip
    """Pass 2 over some value heads of all rows (all unless told), for one of its uses."""
    x, launch = p.x, _launch(p.launches, use, p.x)
    K, V = x.k.shape[3], x.v.shape[3]
    heads = slice(0, p.value_heads) if heads is None else heads
    unused = x.v
    if _in_gluon(x, p.launches, "whole_states"):
        v = tokens_of(x.v)
        proof.launch(
            whole_states_kernel, (len(x.segments), heads.stop - heads.start, 2 if use == "summarise" else 1),
            tokens_of(x.q), tokens_of(x.k), v, tiles_of(p.A), tiles_of(p.P), scales_of(p.rows, 256),
            v if o is None else tokens_of(o), *(v if y is None else tiles_of(y) for y in (states, errors)),
            p.through, p.bound,
            *(unused if y is None else y for y in (need, incoming, M, U)), *p.sizes, heads.start,
            H=x.k.shape[2], G=x.v.shape[2] // x.k.shape[2], HAS_DOC=x.doc_start is not None,
            SUMMARY=use == "summarise", OUTPUT=use == "apply", KEEP=use == "keep",
            num_warps=p.launches["whole_states"].warps,
        )  # fmt: skip
        return
    BV = min(V, K, launch.columns) if use == "summarise" else min(V, launch.columns)
    blocks = V // BV + (K // BV if use == "summarise" else 0)
    proof.launch(
        states_kernel, (blocks, len(x.segments), heads.stop - heads.start),
        x.q, x.k, x.v, p.A, p.P, p.rows, p.through, p.bound,
        *(unused if y is None else y for y in (need, incoming, o, states, errors, M, U)),
        *p.sizes, heads.start, *_strides(x.q), *_strides(x.k), *_strides(x.v), *_strides(unused if o is None else o),
        **p.shape, BV=BV, SUMMARY=use == "summarise", OUTPUT=use == "apply", KEEP=use == "keep",
        **launch.options,
    )  # fmt: skip


def _reverse(
    p: Prepared, do: Tensor, use: str, heads: slice | None = None, *, need: Tensor | None = None,
    outgoing: Tensor | None = None, d_states: Tensor | None = None, dv: Tensor | None = None, D: Tensor | None = None,
) -> None:  # fmt: skip
    """Pass 3, as :func:`_forward`."""
    x, launch = p.x, _launch(p.launches, use, p.x)
    V = x.v.shape[3]
    BV = min(V, launch.columns)
    heads = slice(0, p.value_heads) if heads is None else heads
    unused = x.v
    proof.launch(
        reverse_kernel, (V // BV, len(x.segments), heads.stop - heads.start),
        x.q, x.k, do, p.A, p.P, p.rows, p.through, p.bound,
        *(unused if y is None else y for y in (need, outgoing, d_states, dv, D)),
        *p.sizes, heads.start, *_strides(x.q), *_strides(x.k), *_strides(do), *_strides(unused if dv is None else dv),
        **p.shape, BV=BV, SUMMARY=use == "reverse_summary", **launch.options,
    )  # fmt: skip


def summarise(p: Prepared, need_M: tuple[bool, ...], need_U: tuple[bool, ...]) -> tuple[Tensor, Tensor]:
    """What each segment does to a state, ``S_out = M S_in + U``; what is not needed is left unwritten.

    Returns:
        ``M [N, B, HV, K, K]`` and ``U [N, B, HV, K, V]``, fp32.
    """
    N, B, HV, K, V = p.state_shape
    M = torch.empty(N, B, HV, K, K, dtype=torch.float32, device=p.rows.device)
    U = torch.empty(N, B, HV, K, V, dtype=torch.float32, device=p.rows.device)
    if any(need_M) or any(need_U):
        need = _on_device(tuple(zip(need_U, need_M, strict=True)), torch.int32, p.rows.device)
        _forward(p, "summarise", need=need, M=M, U=U)
    return M, U


def apply(p: Prepared, incoming_NBHKV: Tensor) -> Tensor:
    """Outputs ``[B, T, HV, V]`` in v's dtype, from the state that enters each segment."""
    o = torch.empty(p.x.v.shape, dtype=p.x.v.dtype, device=p.x.v.device)
    _forward(p, "apply", incoming=incoming_NBHKV.contiguous(), o=o)
    return o


def summarise_backward(p: Prepared, do_BTHV: Tensor, need_D: tuple[bool, ...]) -> Tensor:
    """``D [N, B, HV, K, V]``: the gradient of the state that enters each segment, were that of the state which
    leaves it zero."""
    D = torch.empty(p.state_shape, dtype=torch.float32, device=p.rows.device)
    if not any(need_D):
        return D
    x, do = p.x, _gradient(do_BTHV)
    need = _on_device(need_D, torch.int32, p.rows.device)
    if not _in_gluon(x, p.launches, "whole_reverse"):
        _reverse(p, do, "reverse_summary", need=need, D=D)
        return D
    H = x.k.shape[2]
    proof.launch(
        whole_reverse_kernel, (len(x.segments), p.value_heads),
        tokens_of(x.q), tokens_of(x.k), tokens_of(do), tiles_of(p.A), tiles_of(p.P), scales_of(p.rows, 256),
        p.rows, p.through, p.bound, need, D, *p.sizes, 0,
        H=H, G=x.v.shape[2] // H, HAS_DOC=x.doc_start is not None, num_warps=p.launches["whole_reverse"].warps,
    )  # fmt: skip
    return D


def _reverse_and_gradients(
    p: Prepared, do: Tensor, outgoing: Tensor, heads: slice, states: Tensor, errors: Tensor,
    between: tuple[Tensor, Tensor], parts: Tensor, grads: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Passes 3 and 4 over some value heads of all rows: dq, dk and dv, and ``parts`` of dbeta and dg. Between the
    passes lie the states' gradients and the tiles of the pairs."""
    (d_states, tiles), (dq, dk, dv) = between, grads
    x, flags, K = p.x, _flags(p.x), p.x.k.shape[3]
    T, G = x.v.shape[1], x.v.shape[2] // x.k.shape[2]
    _reverse(p, do, "reverse", heads, outgoing=outgoing, d_states=d_states, dv=dv)
    sizes = T, p.chunks, x.v.shape[0], heads.start
    proof.launch(
        pairs_kernel, (p.chunks, heads.stop - heads.start),
        x.q, x.k, do, dv, _documents(x), p.rows, errors, tiles, parts, *sizes, x.scale,
        *_strides(x.q), *_strides(x.k), *_strides(do), *_strides(dv),
        **{name: flag for name, flag in flags.items() if name != "NORM"},
        BK=min(K, 64), **_constants("pairs", p),
    )  # fmt: skip
    proof.launch(
        queries_kernel, (p.chunks, (heads.stop - heads.start) // G),
        x.q, x.k, do, p.rows, states, tiles, parts, dq, *sizes, G,
        *_strides(x.q), *_strides(x.k), *_strides(do),
        HAS_G=flags["HAS_G"], NORM=flags["NORM"], **_constants("queries", p),
    )  # fmt: skip
    proof.launch(
        keys_kernel, (p.chunks, (heads.stop - heads.start) // G),
        x.q, x.k, p.rows, states, errors, d_states, dv, tiles, parts, dk,
        *sizes, G, *_strides(x.q), *_strides(x.k), *_strides(dv),
        **{name: flags[name] for name in ("HAS_G", "ERASE", "NORM")}, **_constants("keys", p),
    )  # fmt: skip


def _backward(
    p: Prepared, do: Tensor, outgoing: Tensor, heads: slice, states: Tensor, errors: Tensor,
    between: tuple[Tensor, Tensor], parts: Tensor, grads: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """The same in one kernel, and a second one that sums the value heads' dq and dk, which lie between them."""
    (dq_parts, dk_parts), (dq, dk, dv) = between, grads
    x, flags = p.x, _flags(p.x)
    H, K = x.k.shape[2:]
    G = x.v.shape[2] // H
    T, NC, segment_chunks, B, N = p.sizes
    proof.launch(
        backward_kernel, (N, heads.stop - heads.start),
        tokens_of(x.q), tokens_of(x.k), tokens_of(do), tiles_of(states), tiles_of(errors), tiles_of(p.A), tiles_of(p.P),
        tokens_of(dv), tiles_of(dq_parts), tiles_of(dk_parts), scales_of(p.rows, 512), p.rows, p.through, _documents(x),
        outgoing, parts,
        T, NC, segment_chunks, B, heads.start, x.scale,
        H=H, G=G, HAS_G=flags["HAS_G"], HAS_DOC=flags["HAS_DOC"], num_warps=p.launches["backward"].warps,
    )  # fmt: skip
    proof.launch(
        group_kernel, (NC, (heads.stop - heads.start) // G, 2),
        x.q, x.k, p.rows, dq_parts, dk_parts, dq, dk, T, NC, heads.start, *_strides(x.q), *_strides(x.k),
        H=H, G=G, K=K, NORM=flags["NORM"], num_warps=p.launches["group"].warps,
    )  # fmt: skip


def apply_backward(p: Prepared, incoming_NBHKV: Tensor, do_BTHV: Tensor, coming: Callable[[], Tensor]) -> Gradients:
    """Gradients of the inputs; arguments as of :func:`.chunk_torch.apply_backward`."""
    x, do = p.x, _gradient(do_BTHV)
    incoming, outgoing = incoming_NBHKV.contiguous(), None
    B, T, H, K = x.k.shape
    HV, V = x.v.shape[2:]
    G, flags = HV // H, _flags(x)
    like: dict[str, Any] = {"dtype": x.v.dtype, "device": x.v.device}
    dq, dk = (torch.empty(B, T, H, K, **like) for _ in range(2))
    dv = torch.empty(B, T, HV, V, **like)
    dg = None if x.g is None else torch.empty(B, T, HV, dtype=x.g.dtype, device=x.v.device)
    dbeta = torch.empty(B, T, HV, dtype=x.beta.dtype, device=x.v.device)

    # The states kept of a chunk are K / 64 times the size of its v: for all heads together that would be the most of
    # the backward pass's memory. It takes the heads in groups whose states are as large as v.
    together = -(-B * H * CHUNK // max(K, CHUNK))
    chunks = together * G, p.chunks
    states, errors = torch.empty(*chunks, V, K, **like), torch.empty(*chunks, CHUNK, V, **like)
    parts = torch.empty(*chunks, len(PARTS), CHUNK, dtype=torch.float32, device=x.v.device)
    if _in_gluon(x, p.launches, "backward"):
        gradients, shapes = _backward, ((CHUNK, K), (CHUNK, K))
    else:
        gradients, shapes = _reverse_and_gradients, ((V, K), (2 * CHUNK, CHUNK))
    between = torch.empty(*chunks, *shapes[0], **like), torch.empty(*chunks, *shapes[1], **like)
    for first in range(0, B * H, together):
        last = min(first + together, B * H)
        heads = slice(first * G, last * G)
        _forward(p, "keep", heads, incoming=incoming, states=states, errors=errors)
        outgoing = coming().contiguous() if outgoing is None else outgoing  # behind what does not need it
        gradients(p, do, outgoing, heads, states, errors, between, parts, (dq, dk, dv))
        proof.launch(
            gates_kernel, (-(-p.chunks // GATES), heads.stop - heads.start),
            p.rows, p.through, parts, dbeta if dg is None else dg, dbeta, T, p.chunks, heads.start,
            HV=HV, CHUNKS=GATES, **{name: flags[name] for name in ("HAS_G", "ERASE", "PREVIOUS")},
        )  # fmt: skip
    return Gradients(dq, dk, dv, dg, dbeta)
