"""The chunked delta rule in Triton kernels: the four functions of :mod:`.chunk_torch`, for any number of segments.

    prepare   the tiles A and P of every chunk, and the scales of their rows          (triton_prepare, gluon_prepare)
    forward   the state through a segment: its summary, its outputs, or what the backward pass needs (triton_states)
    reverse   the state's gradient through a segment, right to left                   (triton_reverse)
    gradients of a chunk's inputs, from its states                                    (triton_gradients)
    backward  reverse and gradients in one, where the GPU is a Hopper                 (gluon_backward)

Nothing here waits for the device, and no launch depends on how many segments are here: not on T, not on N. How each is
launched, and with which constants, is in :mod:`.launches`.

Long because all passes are given what one class, Prepared, lays out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from . import proof
from .backend import WAY_OUT
from .gluon_backward import backward_kernel
from .gluon_chunk import scales_of, tiles_of, tokens_of
from .gluon_prepare import prepare_pairs_kernel
from .gluon_reverse import whole_reverse_kernel
from .gluon_states import whole_states_kernel
from .launcher import Described
from .launches import GATES, IN_GLUON, LAUNCHES, Launches, constants
from .segments import CHUNK, Gradients, Inputs, held_whole
from .signatures import Signature, stepped
from .triton_gradients import PARTS, gates_kernel, keys_kernel, pairs_kernel, queries_kernel
from .triton_prepare import ROWS, invert_kernel, prepare_kernel
from .triton_reverse import reverse_kernel
from .triton_states import states_kernel

WIDTHS = (16, 32, 64, 128, 256)  # of K and V
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


STATES = "summarise", "apply", "keep"
KERNELS = {
    **{"prepare_pairs": prepare_pairs_kernel, "prepare": prepare_kernel, "invert": invert_kernel},
    **{f"whole {use}": whole_states_kernel for use in STATES},
    **dict.fromkeys(STATES, states_kernel),
    **{"whole_reverse": whole_reverse_kernel} | dict.fromkeys(("reverse_summary", "reverse"), reverse_kernel),
    **{"pairs": pairs_kernel, "queries": queries_kernel, "keys": keys_kernel},
    **{"backward": backward_kernel, "gates": gates_kernel},
}


class Kernels:
    """What a signature decides of the launches on a device; worked out once, for launches are many."""

    def __init__(self, s: Signature, launches: Launches, device: torch.device) -> None:
        self.launches = launches
        self.signature = s
        self.constants = {use: constants(use, s, launches, KERNELS[use].arg_names) for use in KERNELS}
        rule = s.rule.erase and s.rule.error_decay != "previous"
        fits = held_whole(s.K, s.V, s.dtype) and rule and is_hopper(device)
        # Whether a pass has its kernel for Hopper here.
        self.in_gluon = {use: fits and launches[use].warps == LAUNCHES[use].warps for use in IN_GLUON}
        self.in_gluon["backward"] &= self.in_gluon["whole_states"]  # the heads of its launches lie apart
        self.some_in_gluon = any(self.in_gluon.values())


@lru_cache
def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


_kernels: dict[tuple[torch.device, Signature], Kernels] = {}


def _kernels_for(x: Inputs) -> Kernels:
    """Those that are proven for these inputs."""
    signature, device = Signature.of(x), x.v.device
    launches, found = proof.require(device, signature), _kernels.get((device, signature))
    if found is None or found.launches is not launches:
        found = _kernels[device, signature] = Kernels(signature, launches, device)
    return found


class Fetched(NamedTuple):
    """What the kernels for Hopper fetch, as they do it: chunks of the inputs, tiles, and scales of their rows."""

    q: Described
    k: Described
    v: Described
    A: Described
    P: Described
    scales: Described


class Prepared(NamedTuple):
    """Pass 1's results, and the arguments that passes 2 to 4 share."""

    x: Inputs
    kernels: Kernels
    A: Tensor
    P: Tensor
    rows: Tensor
    through: Tensor
    bound: Tensor
    sizes: tuple[int, ...]  # T, NC, segment_chunks, B, N
    strides_qk: tuple[int, ...]
    strides_v: tuple[int, ...]
    strides_o: tuple[int, ...]  # of outputs and their gradients, which lie without gaps
    fetched: Fetched | None  # where there are kernels for Hopper

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What :func:`prepare` takes back. The backward pass keeps these, together as large as v at V = 128, because to
        make them again takes a tenth of its time."""
        return self.A, self.P, self.rows, self.through, self.bound

    @property
    def state_shape(self) -> tuple[int, ...]:
        """[N, B, HV, K, V]"""
        s = self.kernels.signature
        return self.sizes[4], self.sizes[3], s.HV, s.K, s.V


@cache  # none is ever given up: a captured graph reads it where it lies
def _on_device(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small table on the device, copied there once: the copy would wait for the device in every call."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"first call with segments of this kind ({', '.join(map(str, values[:4]))}, ...) while a CUDA graph is "
            f"captured: a table of them is copied to {device} once, which would wait for it; call it once before the "
            f"capture"
        )
    return torch.tensor(values, dtype=dtype, device=device)


def _documents(x: Inputs) -> Tensor:
    return x.beta if x.doc_start is None else x.doc_start.contiguous()


def _gradient(do_BTHV: Tensor) -> Tensor:
    """The outputs' gradient, laid out as the outputs are: autograd's layout must not decide a binary."""
    return stepped(do_BTHV.contiguous())


def refuse(k: Tensor, v: Tensor) -> None:
    """Say what has no kernel here, and the way out."""
    (B, T, HV, _), most = v.shape, 65535  # programs along a second or third axis of a launch
    if most * CHUNK < T or most < B * HV:
        raise ValueError(
            f"[B, T, HV]=[{B}, {T}, {HV}]: the Triton kernels take up to {most * CHUNK} tokens a row and {most} value "
            f"heads of all rows in one call; give a longer row to more ranks (parallel.sequence), and rows in turns"
        )
    for name, width in {"K": k.shape[-1], "V": v.shape[-1]}.items():
        if width not in WIDTHS:
            raise ValueError(
                f"{name}={width}: the Triton kernels have widths {WIDTHS}; pad to one of them, or {WAY_OUT}"
            )
    if v.dtype not in DTYPES:
        raise TypeError(
            f"q, k and v are {v.dtype}: the Triton kernels take bf16, fp16 and fp32; cast them, or {WAY_OUT}"
        )
    if not v.is_cuda and not isinstance(states_kernel, InterpretedFunction):
        raise ValueError(
            f"backend='triton' on {v.device}: the kernels run on a GPU (or slowly anywhere, with TRITON_INTERPRET=1 "
            f"set before they are imported); move the inputs there, or pass backend='torch'"
        )


def _to_prepare(v: Tensor, NC: int) -> tuple[Tensor, ...]:
    """Room for the tensors that pass 1 makes."""
    heads = v.shape[0] * v.shape[2]
    A = v.new_empty((heads, NC, CHUNK, CHUNK))
    rows = v.new_empty((heads, NC, len(ROWS), CHUNK), dtype=torch.float32)
    through = v.new_empty((heads, NC), dtype=torch.float32)
    return A, torch.empty_like(A), rows, through, torch.empty_like(through)


def prepare(x: Inputs, tensors: tuple[Tensor, ...] | None = None) -> Prepared:
    """Pass 1 over all chunks, or its tensors from an earlier call; what the other functions start from."""
    q, k, v = stepped(x.q), stepped(x.k), stepped(x.v)
    if q is not x.q or k is not x.k or v is not x.v:
        x = x._replace(q=q, k=k, v=v)
    kernels, segments = _kernels_for(x), x.segments
    s, (B, T, HV, V), device = kernels.signature, v.shape, v.device
    NC = -(-T // CHUNK)
    A, P, rows, through, bound = tensors or _to_prepare(v, NC)
    by = None
    if kernels.some_in_gluon:
        by = Fetched(tokens_of(q), tokens_of(k), tokens_of(v), tiles_of(A), tiles_of(P), scales_of(rows, 256))
    p = Prepared(
        x, kernels, A, P, rows, through, bound,
        (T, NC, segments.tokens // CHUNK, B, len(segments.starts)),
        (q.stride(0), *s.q, k.stride(0), *s.k),
        (v.stride(0), *s.v),
        (T * HV * V, HV * V, V if HV > 1 else 0),
        by,
    )  # fmt: skip
    if tensors is not None:
        return p
    g, strides_g = (x.beta, s.beta) if x.g is None or s.g is None else (x.g, s.g)
    gates = g, x.beta, _documents(x), _on_device(segments.starts, torch.int64, device)
    sizes = T, NC, segments.tokens // CHUNK, x.scale
    strides = g.stride(0), *strides_g, x.beta.stride(0), *s.beta
    if by and kernels.in_gluon["prepare_pairs"]:
        proof.launch(
            prepare_pairs_kernel, (B * s.H, NC),
            by.q, by.k, v, by.P, by.A, *gates, rows, through, bound, *sizes, *p.strides_v, *strides,
            **kernels.constants["prepare_pairs"],
        )  # fmt: skip
        return p
    N = torch.empty((B * HV, NC, CHUNK, CHUNK) if s.rule.erase else 0, dtype=torch.float32, device=device)
    proof.launch(
        prepare_kernel, (B * HV, NC),
        q, k, v, *gates, N, P, rows, through, bound, *sizes, *p.strides_qk, *p.strides_v, *strides,
        **kernels.constants["prepare"],
    )  # fmt: skip
    if s.rule.erase:
        proof.launch(invert_kernel, (B * HV * NC,), N, A, 16, **kernels.constants["invert"])
    return p


def _forward(
    p: Prepared, use: str, heads: slice | None = None, *, need: Tensor | None = None, incoming: Tensor | None = None,
    o: Tensor | None = None, kept: tuple[Any, Any] | None = None,
    M: Tensor | None = None, U: Tensor | None = None, forgets: Tensor | None = None,
) -> None:  # fmt: skip
    """Pass 2 over some value heads of all rows (all unless told), for one of its uses. ``kept``: where states and
    errors are kept, by descriptors for the kernel for Hopper."""
    x, v, by = p.x, p.x.v, p.fetched
    B, _, HV, V = v.shape
    first, last, every = (heads or slice(None)).indices(B * HV)
    if by and p.kernels.in_gluon["whole_states"]:
        proof.launch(
            whole_states_kernel, (p.sizes[4], -(-(last - first) // every), 2 if use == "summarise" else 1),
            *by, by.v if o is None else tokens_of(o), *(kept or (by.v, by.v)), p.through, p.bound,
            *[v if y is None else y for y in (need, incoming, M, U, forgets)], *p.sizes, first, every,
            **p.kernels.constants[f"whole {use}"],
        )  # fmt: skip
        return
    constants, strides_v = p.kernels.constants[use], p.strides_v
    blocks = (V + (x.k.shape[3] if use == "summarise" else 0)) // constants["BV"]
    proof.launch(
        states_kernel, (blocks, p.sizes[4], last - first),
        x.q, x.k, v, p.A, p.P, p.rows, p.through, p.bound,
        *[v if y is None else y for y in (need, incoming, o, *(kept or (None, None)), M, U, forgets)],
        *p.sizes, first, *p.strides_qk, *strides_v, *(strides_v if o is None else p.strides_o),
        **constants,
    )  # fmt: skip


def _reverse(
    p: Prepared, do: Tensor, use: str, heads: slice | None = None, *, need: Tensor | None = None,
    outgoing: Tensor | None = None, d_states: Tensor | None = None, dv: Tensor | None = None, D: Tensor | None = None,
) -> None:  # fmt: skip
    """Pass 3, as :func:`_forward`."""
    x, constants, v = p.x, p.kernels.constants[use], p.x.v
    B, _, HV, V = v.shape
    first, last = (0, B * HV) if heads is None else (heads.start, heads.stop)
    proof.launch(
        reverse_kernel, (V // constants["BV"], p.sizes[4], last - first),
        x.q, x.k, do, p.A, p.P, p.rows, p.through, p.bound, _documents(x),
        *[v if y is None else y for y in (need, outgoing, d_states, dv, D)],
        *p.sizes, first, *p.strides_qk, *p.strides_o, *(p.strides_v if dv is None else p.strides_o),
        **constants,
    )  # fmt: skip


def summarise(p: Prepared, need_M: tuple[bool, ...], need_U: tuple[bool, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """What each segment does to a state, ``S_out = M S_in + U``; what is not needed is left unwritten.

    Returns:
        ``M [N, B, HV, K, K]`` and ``U [N, B, HV, K, V]``, fp32, and ``forgets [N, B, HV]``, int32: 1 where decays are
        so strong that M has no normal number and is zero, else 0; unwritten where M is.
    """
    (N, B, HV, K, V), device = p.state_shape, p.rows.device
    M, U = p.rows.new_empty((N, B, HV, K, K)), p.rows.new_empty((N, B, HV, K, V))
    forgets = p.rows.new_empty((N, B, HV), dtype=torch.int32)
    if True in need_M or True in need_U:
        need = _on_device(tuple(zip(need_U, need_M, strict=True)), torch.int32, device)
        _forward(p, "summarise", need=need, M=M, U=U, forgets=forgets)
    return M, U, forgets


def apply(p: Prepared, incoming_NBHKV: Tensor) -> Tensor:
    """Outputs ``[B, T, HV, V]`` in v's dtype, from the state that enters each segment."""
    o = p.x.v.new_empty(p.x.v.shape)
    _forward(p, "apply", incoming=incoming_NBHKV.contiguous(), o=o)
    return o


def summarise_backward(p: Prepared, do_BTHV: Tensor, need_D: tuple[bool, ...]) -> Tensor:
    """``D [N, B, HV, K, V]``: the gradient of the state that enters each segment, were that of the state which
    leaves it zero."""
    D, by = p.rows.new_empty(p.state_shape), p.fetched
    if True not in need_D:
        return D
    do, (_, B, HV, _, _) = _gradient(do_BTHV), D.shape
    need = _on_device(need_D, torch.int32, D.device)
    if not by or not p.kernels.in_gluon["whole_reverse"]:
        _reverse(p, do, "reverse_summary", need=need, D=D)
        return D
    proof.launch(
        whole_reverse_kernel, (p.sizes[4], B * HV),
        by.q, by.k, tokens_of(do), by.A, by.P, by.scales,
        p.rows, p.through, p.bound, _documents(p.x), need, D, *p.sizes, 0, **p.kernels.constants["whole_reverse"],
    )  # fmt: skip
    return D


def _reverse_and_gradients(
    p: Prepared, do: Tensor, outgoing: Tensor, heads: slice, states: Tensor, errors: Tensor,
    between: tuple[Tensor, Tensor], parts: Tensor, grads: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Passes 3 and 4 over some value heads of all rows: dq, dk and dv, and ``parts`` of dbeta and dg. Between the
    passes lie the states' gradients and the tiles of the pairs."""
    (d_states, tiles), (dq, dk, dv) = between, grads
    x, constants = p.x, p.kernels.constants
    T, NC, _, B, _ = p.sizes
    G = x.v.shape[2] // x.k.shape[2]
    value_heads, key_heads = heads.stop - heads.start, (heads.stop - heads.start) // G
    strides_qk, strides_o = p.strides_qk, p.strides_o
    _reverse(p, do, "reverse", heads, outgoing=outgoing, d_states=d_states, dv=dv)
    sizes = T, NC, B, heads.start
    proof.launch(
        pairs_kernel, (NC, value_heads),
        x.q, x.k, do, dv, _documents(x), p.rows, states, errors, tiles, parts, *sizes, x.scale,
        *strides_qk, *strides_o, *strides_o, **constants["pairs"],
    )  # fmt: skip
    proof.launch(
        queries_kernel, (NC, key_heads),
        x.q, x.k, do, p.rows, p.through, states, tiles, parts, dq,
        *sizes, G, *strides_qk, *strides_o, **constants["queries"],
    )  # fmt: skip
    proof.launch(
        keys_kernel, (NC, key_heads),
        x.q, x.k, p.rows, p.through, states, errors, d_states, dv, tiles, parts, dk,
        *sizes, G, *strides_qk, *strides_o, **constants["keys"],
    )  # fmt: skip


def _fetched(
    p: Prepared, by: Fetched, do: Tensor, kept: tuple[Any, Any], grads: tuple[Tensor, Tensor, Tensor]
) -> tuple[Any, ...]:
    """What the one kernel of passes 3 and 4 reads and writes by descriptors, the same for all heads."""
    dq, dk, dv = map(tokens_of, grads)
    return (
        by.q, by.k, tokens_of(do), *kept, by.A, by.P, dv, dq, dk, scales_of(p.rows, 512), *grads[:2],
    )  # fmt: skip


def _backward(p: Prepared, fetched: tuple[Any, ...], outgoing: Tensor, head: int, parts: Tensor) -> None:
    """The same in one kernel, over a value head of every key head; dq and dk are whole with the last."""
    T, NC, segment_chunks, B, N = p.sizes
    s = p.kernels.signature
    G = s.HV // s.H
    proof.launch(
        backward_kernel, (N, B * s.H),
        *fetched, p.rows, p.through, _documents(p.x), outgoing, parts,
        T, NC, segment_chunks, B, head, p.x.scale,
        **p.kernels.constants["backward"], SUM=head > 0, LAST=head + 1 == G,
    )  # fmt: skip


def apply_backward(p: Prepared, incoming_NBHKV: Tensor, do_BTHV: Tensor, coming: Callable[[], Tensor]) -> Gradients:
    """Gradients of the inputs; arguments as of :func:`.chunk_torch.apply_backward`."""
    x, do, NC = p.x, _gradient(do_BTHV), p.sizes[1]
    incoming, outgoing = incoming_NBHKV.contiguous(), None
    B, T, H, K = x.k.shape
    HV, V = x.v.shape[2:]
    G, room = HV // H, x.v.new_empty
    dq, dk, dv = room((B, T, H, K)), room((B, T, H, K)), room((B, T, HV, V))
    dg = None if x.g is None else x.g.new_empty((B, T, HV))
    dbeta = x.beta.new_empty((B, T, HV))

    # The states kept of a chunk are K / 64 times the size of its v: for all heads together that would be the most of
    # the backward pass's memory. It takes the heads in groups: a value head of each key head, or all of as many key
    # heads as have states as large as v.
    one, together = p.kernels.in_gluon["backward"], -(-B * H * CHUNK // max(K, CHUNK))
    groups = [slice(j, B * HV, G) for j in range(G)]
    if not one:
        groups = [slice(n * G, min(n + together, B * H) * G) for n in range(0, B * H, together)]
    rows = B * H if one else together * G
    states, errors = room((rows, NC, V, K)), room((rows, NC, CHUNK, V))
    of_a_chunk = 4 + 2 * (len(PARTS) - 1) if one else len(PARTS)  # dbeta in quarters, the others in halves
    parts = room((rows, NC, of_a_chunk, CHUNK), dtype=torch.float32)
    kept: tuple[Any, Any] = states, errors
    if p.kernels.in_gluon["whole_states"]:
        kept = tiles_of(states), tiles_of(errors)
    fetched: tuple[Any, ...] = ()
    if one and p.fetched:
        fetched = _fetched(p, p.fetched, do, kept, (dq, dk, dv))
    else:
        between = room((rows, NC, V, K)), room((rows, NC, 2 * CHUNK, CHUNK))
    for n, heads in enumerate(groups):
        _forward(p, "keep", heads, incoming=incoming, kept=kept)
        outgoing = coming().contiguous() if outgoing is None else outgoing  # behind what does not need it
        if one:
            _backward(p, fetched, outgoing, n, parts)
        else:
            _reverse_and_gradients(p, do, outgoing, heads, states, errors, between, parts, (dq, dk, dv))
        first, last, every = heads.indices(B * HV)
        count = -(-(last - first) // every)
        proof.launch(
            gates_kernel, (NC, -(-count // GATES)),
            p.rows, p.through, parts, dbeta if dg is None else dg, dbeta, T, NC, first, every, count,
            **p.kernels.constants["gates"], HALVES=one,
        )  # fmt: skip
    return Gradients(dq, dk, dv, dg, dbeta)
