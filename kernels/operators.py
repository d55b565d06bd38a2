"""The kernels' launches as torch.library operators, ``torch.ops.dnsp.*``, so that others can see them.

Whoever works on operators, not on Python, sees each pass as one with known outputs: torch.compile, which traces through
the autograd functions, a policy of selective activation checkpointing (``torch.ops.dnsp.apply.default`` can be named),
fake tensors. Shapes, strides and dtypes of outputs are stated here a second time, for tensors without memory.

A call by way of torch's dispatcher takes 3 us of the host and more to take inputs apart and together again. So the
dispatcher is asked where someone looks on (:func:`dispatched`), and elsewhere kernels are launched directly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reference import Rule
from .segments import CHUNK, Gradients, Inputs, Segments

ROWS = 8  # of a chunk's scales, as triton_prepare's; it is imported where there is Triton alone

_library = torch.library.Library("dnsp", "FRAGMENT")


def _define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """An operator; on a CPU by Triton's interpreter, where that is chosen."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CUDA", "CPU"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"dnsp::{name}", fake, lib=_library)
    return getattr(torch.ops.dnsp, name).default


def dispatched(x: Tensor) -> bool:
    """Whether operators on tensors such as x are called by way of torch's dispatcher: someone looks on."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return True
    return torch._C._len_torch_dispatch_stack() > 0


# The delta rule: the passes of chunk_triton, by their names. An operator takes the inputs, pass 1's results, what the
# pass takes beside them, and at the end what a call holds that is no tensor.

_X = "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor beta, Tensor? doc_start"
_TILES = "Tensor A, Tensor P, Tensor rows, Tensor through, Tensor bound"
_HOW = "int[] starts, int tokens, int total, float scale, bool erase, bool previous, bool normalise"
_HOWS = _HOW.count(",") + 1


class Dispatched(NamedTuple):
    """What the passes start from, as :class:`.chunk_triton.Prepared`."""

    x: Inputs
    tensors: tuple[Tensor, ...]

    def call(self, operator: Any, *own: Any) -> Any:
        x = self.x
        s, previous = x.segments, x.rule.error_decay == "previous"
        how = s.starts, s.tokens, s.total, float(x.scale), x.rule.erase, previous, x.normalise_qk
        return operator(x.q, x.k, x.v, x.g, x.beta, x.doc_start, *self.tensors, *own, *how)


def _inputs(tensors: tuple[Any, ...], how: tuple[Any, ...]) -> Inputs:
    starts, tokens, total, scale, erase, previous, normalise = how
    rule = Rule(erase=erase, error_decay="previous" if previous else "current")
    q, k, v, g, beta, doc_start = tensors
    return Inputs(q, k, v, g, beta, doc_start, Segments(tokens, tuple(starts), total), scale, rule, normalise)


def _run_prepare(*args: Any) -> tuple[Tensor, ...]:
    from . import chunk_triton

    with torch.cuda.device_of(args[0]):
        return chunk_triton.prepare(_inputs(args[:6], args[6:])).tensors


def _pass(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        from . import chunk_triton

        own = (tuple(x) if isinstance(x, list) else x for x in args[11:-_HOWS])
        with torch.cuda.device_of(args[0]):
            p = chunk_triton.prepare(_inputs(args[:6], args[-_HOWS:]), args[6:11])
            return getattr(chunk_triton, name)(p, *own)

    return run


def _run_apply_backward(*args: Any) -> tuple[Tensor, ...]:
    *given, outgoing = args[:-_HOWS]
    grads = _pass("apply_backward")(*given, lambda: outgoing, *args[-_HOWS:])
    return grads.q, grads.k, grads.v, _or_empty(grads.g, grads.v), grads.beta


def _fake_prepare(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    B, T, HV = v.shape[:3]
    chunks = B * HV, (T + CHUNK - 1) // CHUNK
    A, P = (v.new_empty((*chunks, CHUNK, CHUNK)) for _ in range(2))
    rows = v.new_empty((*chunks, ROWS, CHUNK), dtype=torch.float32)
    through, bound = (v.new_empty(chunks, dtype=torch.float32) for _ in range(2))
    return A, P, rows, through, bound


def _fake_states(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    N, (B, _, HV, V), K = len(args[-_HOWS]), v.shape, k.shape[3]
    M, U = (v.new_empty((N, B, HV, K, width), dtype=torch.float32) for width in (K, V))
    return M, U, v.new_empty((N, B, HV), dtype=torch.int32)


def _fake_gradients(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _like(q), _like(k), _like(v), _or_empty(None if g is None else _like(g), v), _like(beta)


def _like(x: Tensor) -> Tensor:
    """As x, without gaps."""
    return x.new_empty(x.shape)


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """An operator's outputs are tensors: an empty one stands for None."""
    return like.new_empty(0) if x is None else x


_prepare = _define(f"prepare({_X}, {_HOW}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _run_prepare, _fake_prepare)
_summarise = _define(
    f"summarise({_X}, {_TILES}, bool[] need_M, bool[] need_U, {_HOW}) -> (Tensor, Tensor, Tensor)",
    _pass("summarise"),
    _fake_states,
)
_apply = _define(f"apply({_X}, {_TILES}, Tensor incoming, {_HOW}) -> Tensor", _pass("apply"), lambda *x: _like(x[2]))
_summarise_backward = _define(
    f"summarise_backward({_X}, {_TILES}, Tensor do, bool[] need_D, {_HOW}) -> Tensor",
    _pass("summarise_backward"),
    lambda *x: _fake_states(*x)[1],
)
_apply_backward = _define(
    f"apply_backward({_X}, {_TILES}, Tensor incoming, Tensor do, Tensor outgoing, {_HOW}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_apply_backward,
    _fake_gradients,
)


def prepare(x: Inputs, tensors: tuple[Tensor, ...] | None = None) -> Dispatched:
    """:func:`.chunk_triton.prepare`, and so on: all that :mod:`.passes` asks of that module."""
    return Dispatched(x, tensors or Dispatched(x, ()).call(_prepare))


def summarise(p: Dispatched, need_M: tuple[bool, ...], need_U: tuple[bool, ...]) -> tuple[Tensor, Tensor, Tensor]:
    return p.call(_summarise, need_M, need_U)


def apply(p: Dispatched, incoming_NBHKV: Tensor) -> Tensor:
    return p.call(_apply, incoming_NBHKV)


def summarise_backward(p: Dispatched, do_BTHV: Tensor, need_D: tuple[bool, ...]) -> Tensor:
    return p.call(_summarise_backward, do_BTHV, need_D)


def apply_backward(p: Dispatched, incoming_NBHKV: Tensor, do_BTHV: Tensor, coming: Callable[[], Tensor]) -> Gradients:
    dq, dk, dv, dg, dbeta = p.call(_apply_backward, incoming_NBHKV, do_BTHV, coming())
    return Gradients(dq, dk, dv, None if p.x.g is None else dg, dbeta)


# The fold of a scan that has all segments here.


def _run_fold(M: Tensor, U: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    from . import triton_scan

    with torch.cuda.device_of(U):
        return triton_scan.fold(M, U, *args)


_fold = _define(
    "fold(Tensor M, Tensor U, Tensor? first, Tensor? continues, Tensor? forgets, int steps, bool reverse) -> "
    "(Tensor, Tensor)",
    _run_fold,
    lambda M, U, *_: (_like(U), _like(U[0])),
)


def fold(
    M_NBHKK: Tensor,
    U_NBHKV: Tensor,
    first_BHKV: Tensor | None,
    continues_NB: Tensor | None,
    forgets_NBH: Tensor | None,
    steps: int,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`.triton_scan.fold` without mail."""
    if dispatched(U_NBHKV):
        return _fold(M_NBHKK, U_NBHKV, first_BHKV, continues_NB, forgets_NBH, steps, reverse)
    from . import triton_scan

    return triton_scan.fold(M_NBHKK, U_NBHKV, first_BHKV, continues_NB, forgets_NBH, steps, reverse)


# The convolution.

_CONV = "Tensor x, Tensor weight, Tensor? bias, Tensor? halo, Tensor? doc_start, int start, bool silu"


def _run_conv(x: Tensor, *args: Any) -> Tensor:
    from . import triton_conv

    with torch.cuda.device_of(x):
        return triton_conv.forward(x, *args)


def _run_conv_backward(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    dx, dweight, dbias, dhalo = _conv_gradients(dy, x, *args)
    dbias = None if dbias is None else dbias.clone()  # in fp32 it is part of one sum with dweight
    return dx, dweight, _or_empty(dbias, dx), _or_empty(dhalo, dx)


def _conv_gradients(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    from . import triton_conv

    with torch.cuda.device_of(x):
        return triton_conv.backward(dy, x, *args)


def _fake_conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, halo: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    dbias, dhalo = (_or_empty(None if y is None else _like(y), x) for y in (bias, halo))
    return _like(x), _like(weight), dbias, dhalo


_conv = _define(f"conv({_CONV}) -> Tensor", _run_conv, lambda x, *_: _like(x))
_conv_backward = _define(
    f"conv_backward(Tensor dy, {_CONV}) -> (Tensor, Tensor, Tensor, Tensor)", _run_conv_backward, _fake_conv_backward
)


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, halo: Tensor | None, doc_start: Tensor | None, start: int,
    silu: bool,
) -> Tensor:  # fmt: skip
    """:func:`.triton_conv.forward` on x's device."""
    return (_conv if dispatched(x) else _run_conv)(x, weight, bias, halo, doc_start, start, silu)


def conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, halo: Tensor | None, doc_start: Tensor | None,
    start: int, silu: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """:func:`.triton_conv.backward` on x's device."""
    if not dispatched(x):
        return _conv_gradients(dy, x, weight, bias, halo, doc_start, start, silu)
    dx, dweight, dbias, dhalo = _conv_backward(dy, x, weight, bias, halo, doc_start, start, silu)
    return dx, dweight, None if bias is None else dbias, None if halo is None else dhalo


# The gated norm.


def _run_norm(x: Tensor, *args: Any) -> Tensor:
    from . import triton_norm

    with torch.cuda.device_of(x):
        return triton_norm.forward(x, *args)


def _run_norm_backward(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from . import triton_norm

    with torch.cuda.device_of(x):
        return triton_norm.backward(dy, x, *args)


_NORM = "Tensor x, Tensor gate, Tensor weight, float eps"
_norm = _define(f"gated_norm({_NORM}) -> Tensor", _run_norm, lambda x, *_: _like(x))
_norm_backward = _define(
    f"gated_norm_backward(Tensor dy, {_NORM}) -> (Tensor, Tensor, Tensor)",
    _run_norm_backward,
    lambda dy, x, gate, weight, eps: (_like(x), _like(gate), _like(weight)),
)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """:func:`.triton_norm.forward` on x's device."""
    return (_norm if dispatched(x) else _run_norm)(x, gate, weight, eps)


def gated_norm_backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`.triton_norm.backward` on x's device."""
    return (_norm_backward if dispatched(x) else _run_norm_backward)(dy, x, gate, weight, eps)


# A decode step: its memories are changed in place.


def _run_conv_step(*args: Any) -> Tensor:
    from . import triton_decode

    return triton_decode.conv_step(*args)


def _run_delta_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, state: Tensor, scale: float, erase: bool,
    previous: bool, normalise: bool, slots: Tensor | None, A_log: Tensor | None, dt_bias: Tensor | None,
) -> Tensor:  # fmt: skip
    from . import triton_decode

    rule = Rule(erase=erase, error_decay="previous" if previous else "current")
    gates = None if A_log is None or dt_bias is None else (A_log, dt_bias)
    return triton_decode.delta_step(q, k, v, g, beta, state, scale, rule, normalise, slots, gates)


_conv_step = _define(
    "conv_step(Tensor x, Tensor(a!) tail, Tensor weight, Tensor? bias, bool silu, Tensor? slots) -> Tensor",
    _run_conv_step,
    lambda x, *_: _like(x),
)
_delta_step = _define(
    "delta_step(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor beta, Tensor(a!) state, float scale, bool erase, "
    "bool previous, bool normalise, Tensor? slots, Tensor? A_log, Tensor? dt_bias) -> Tensor",
    _run_delta_step,
    lambda q, k, v, *_: _like(v),
)


def conv_step(x: Tensor, tail: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, slots: Tensor | None) -> Tensor:
    """:func:`.triton_decode.conv_step`."""
    return (_conv_step if dispatched(x) else _run_conv_step)(x, tail, weight, bias, silu, slots)


def delta_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, state: Tensor, scale: float, rule: Rule,
    normalise: bool, slots: Tensor | None, gates: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """:func:`.triton_decode.delta_step`."""
    if dispatched(v):
        A_log, dt_bias = gates or (None, None)
        previous = rule.error_decay == "previous"
        return _delta_step(
            q, k, v, g, beta, state, float(scale), rule.erase, previous, normalise, slots, A_log, dt_bias
        )
    from . import triton_decode

    return triton_decode.delta_step(q, k, v, g, beta, state, scale, rule, normalise, slots, gates)
