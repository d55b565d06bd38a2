"""The differentiable delta rule that serves one device and many: summarise, scan, apply; and back.

It is two nodes of autograd's graph, so that a state may travel while something else is computed:

    _Begin     forward: prepare, summarise, start the scan      backward: await dS, gradients of the inputs
    _Finish    forward: await S, outputs                        backward: summarise, start the scan of dS

    under_way = begin(...)
    z = gate(x)                         # needs no state
    o, final = under_way.finish()

Autograd runs what is ready from the last made to the first. So what lies between the two in the forward pass has its
gradients computed between them in the backward pass, too, while dS travels. Where all segments are here it is one node,
which torch.compile can follow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, ParamSpec

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import chunk_torch, kept, operators
from .backend import Backend
from .reference import Rule
from .scan import Coming, Scan
from .segments import Inputs, Needs, Segments

P = ParamSpec("P")


class Call(NamedTuple):
    """What a call needs beside tensors."""

    segments: Segments
    scan: Scan
    scale: float
    rule: Rule
    normalise_qk: bool
    has_initial: bool
    want_final: bool
    backend: Backend

    def passes(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        beta: Tensor,
        doc_start: Tensor | None,
        *prepared: Tensor,
    ) -> tuple[ModuleType, Any, tuple[Tensor, ...]]:
        """The module that holds the four passes, what they start from, and the tensors of that which the backward
        pass keeps (``prepared``, there)."""
        x = Inputs(q, k, v, g, beta, doc_start, self.segments, self.scale, self.rule, self.normalise_qk)
        if self.backend == "torch":
            return chunk_torch, x, ()
        if operators.dispatched(v):
            seen = operators.prepare(x, prepared or None)
            return operators, seen, seen.tensors
        from . import chunk_triton

        p = chunk_triton.prepare(x, prepared or None)
        return chunk_triton, p, p.tensors

    def needs(self) -> Needs:
        return self.segments.needs(self.has_initial, self.want_final)


@dataclass
class _Between:
    """What one of the two nodes leaves for the other, and takes away when it has come."""

    call: Call
    scan: tuple[Tensor, Tensor | None, Coming] | None = None  # M, where it is zero, and the scan under way
    forward: tuple[ModuleType, Any, tuple[Tensor | None, ...]] | None = None
    backward: tuple[ModuleType, Any, Tensor, Tensor, Coming] | None = None


@dataclass(frozen=True)
class UnderWay:
    """A delta rule whose scan has set out. ``finish`` once."""

    _awaited: Callable[[], tuple[Tensor, Tensor | None]]
    _width: int  # of the values, as they were given

    def finish(self) -> tuple[Tensor, Tensor | None]:
        """Outputs ``[B, T, HV, V]`` in v's dtype, and the final state ``[B, HV, K, V]`` where it was asked for."""
        o, final = self._awaited()
        if self._width != o.shape[-1]:
            o, final = o[..., : self._width], None if final is None else final[..., : self._width]
        return o, final


def begin(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial: Tensor | None,
    doc_start: Tensor | None,
    call: Call,
    width: int,
) -> UnderWay:
    """Everything up to the scan; ``width``: of the values before they were padded."""
    tensors = q, k, v, g, beta, initial, doc_start
    if call.scan.here:
        results = _AtOnce.apply(*tensors, call)
        return UnderWay(lambda: results, width)
    between = _Between(call)
    if torch.compiler.is_compiling():  # which cannot follow what communicates
        ticket = torch.compiler.disable(_Begin.apply)(*tensors, between)
        return UnderWay(lambda: torch.compiler.disable(_Finish.apply)(ticket, between), width)
    ticket = _Begin.apply(*tensors, between)
    return UnderWay(lambda: _Finish.apply(ticket, between), width)


def at_once(starts: Callable[P, UnderWay]) -> Callable[P, tuple[Tensor, Tensor | None]]:
    """A function that begins and finishes, from one that begins."""

    @functools.wraps(starts)
    def call(*args: P.args, **options: P.kwargs) -> tuple[Tensor, Tensor | None]:
        return starts(*args, **options).finish()

    return call


_NOTHING = nullcontext()


def _as_given(like: Tensor) -> AbstractContextManager[None]:
    """Out of autocast, whose matrix products would be bf16, and on the tensor's device, since Triton launches on the
    current one; nothing is entered, and no time spent, where nothing is to change."""
    device, kind = like.device, like.device.type
    if torch.is_autocast_enabled(kind) or (kind == "cuda" and device.index != torch.cuda.current_device()):
        return _entered(like)
    return _NOTHING


@contextmanager
def _entered(like: Tensor) -> Iterator[None]:
    with torch.autocast(like.device.type, enabled=False), torch.cuda.device_of(like):
        yield


class _AtOnce(torch.autograd.Function):
    """All of it in one node, where all segments are here and nothing travels."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        beta: Tensor,
        initial: Tensor | None,
        doc_start: Tensor | None,
        call: Call,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        with _as_given(v):
            chunks, x, prepared = call.passes(q, k, v, g, beta, doc_start)

            def summarise_and_scan() -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
                M, forgets, coming = _start_scan(chunks, x, initial, call)
                return M, forgets, *coming()

            M, forgets, incoming, final = kept.once(summarise_and_scan)
            ctx.save_for_backward(q, k, v, g, beta, doc_start, *prepared, M, forgets, incoming)
            ctx.call, ctx.initial_dtype = call, None if initial is None else initial.dtype
            return chunks.apply(x, incoming), final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
        *tensors, M, forgets, incoming = ctx.saved_tensors
        with _as_given(M):
            chunks, x, do, coming = _start_reverse(tensors, M, forgets, do, dfinal, ctx.call)
            outgoing, dinitial = coming()
            grads = chunks.apply_backward(x, incoming, do, lambda: outgoing)
            return _gradients(grads, dinitial, ctx.initial_dtype)


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        beta: Tensor,
        initial: Tensor | None,
        doc_start: Tensor | None,
        between: _Between,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        with _as_given(v):
            chunks, x, prepared = between.call.passes(q, k, v, g, beta, doc_start)

            def summarise_and_start() -> None:
                between.scan = _start_scan(chunks, x, initial, between.call)

            kept.once(summarise_and_start)
        between.forward = chunks, x, (q, k, v, g, beta, doc_start, *prepared)
        ctx.between, ctx.initial_dtype = between, None if initial is None else initial.dtype
        return v.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dticket: Tensor | None) -> tuple[Any, ...]:
        del dticket
        chunks, x, incoming, do, coming = ctx.between.backward
        ctx.between.backward = None
        dinitial: Tensor | None = None

        def outgoing() -> Tensor:
            nonlocal dinitial
            states, dinitial = coming()
            return states

        with _as_given(incoming):
            grads = chunks.apply_backward(x, incoming, do, outgoing)
            return _gradients(grads, dinitial, ctx.initial_dtype)


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, between: _Between) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        assert between.forward is not None, "finish is called once"
        chunks, x, tensors = between.forward
        between.forward = None

        def await_states() -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
            assert between.scan is not None
            M, forgets, coming = between.scan
            between.scan = None
            return M, forgets, *coming()

        with _as_given(ticket):
            M, forgets, incoming, final = kept.once(await_states)
            ctx.save_for_backward(*tensors, M, forgets, incoming)
            ctx.between = between
            return chunks.apply(x, incoming), final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor, None]:
        *tensors, M, forgets, incoming = ctx.saved_tensors
        with _as_given(M):
            chunks, x, do, coming = _start_reverse(tensors, M, forgets, do, dfinal, ctx.between.call)
        ctx.between.backward = chunks, x, incoming, do, coming
        return do.new_empty(0), None


# What the nodes share.


def _start_scan(chunks: ModuleType, x: Any, initial: Tensor | None, call: Call) -> tuple[Tensor, Tensor | None, Coming]:
    """M, where it is zero, and the scan under way."""
    needs = call.needs()
    M, U, forgets = chunks.summarise(x, needs.M, needs.U)
    start = None if initial is None else initial.to(U.dtype)
    return M, forgets, call.scan.forward(M, U, call.segments.continues_NB, forgets, start, call.want_final)


def _start_reverse(
    tensors: Sequence[Any],
    M: Tensor,
    forgets: Tensor | None,
    do: Tensor | None,
    dfinal: Tensor | None,
    call: Call,
) -> tuple[ModuleType, Any, Tensor, Coming]:
    """The passes and what they start from, dO, and the scan of dS under way."""
    chunks, x, _ = call.passes(*tensors)
    do = torch.zeros_like(tensors[2]) if do is None else do
    D = chunks.summarise_backward(x, do, call.needs().D)
    dfinal = None if dfinal is None else dfinal.to(M.dtype)
    continues = call.segments.continues_NB
    return chunks, x, do, call.scan.reverse(M, D, continues, forgets, dfinal, call.has_initial, call.want_final)


def _gradients(grads: Any, dinitial: Tensor | None, initial_dtype: torch.dtype | None) -> tuple[Any, ...]:
    """As a node's inputs have them: q, k, v, g, beta, the initial state, doc_start and the last argument."""
    if dinitial is not None and initial_dtype is not None:
        dinitial = dinitial.to(initial_dtype)
    return grads.q, grads.k, grads.v, grads.g, grads.beta, dinitial, None, None
