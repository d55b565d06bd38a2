"""The gated delta rule: the public ops, and the one autograd function that serves one device and many.

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = scale * S_t^T q_t

A sequence is cut into segments on a global grid. Each is *summarised* (what it does to any state), the *scan* finds
the state that enters each, and *apply* computes outputs from it; the backward pass is the same, right to left. The
scan is handed in: :class:`~dnsp.kernels.scan.LocalScan` here, one over many ranks in the parallel room.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import chunk_torch, kept
from .chunk_torch import CHUNK
from .reference import Rule, recurrence
from .scan import LocalScan, Scan


@dataclass(frozen=True)
class Segments:
    """Which segments of the global sequence the local tokens are.

    tokens: tokens of a segment, a multiple of 64; the sequence's last segment may be shorter.
    starts: global index of the first token of each local segment, in the order in which they lie in memory.
    total: tokens of the whole sequence.
    continues_NB: bool ``[N, B]``, whether the state passes through local segment n in row b, that is, no document
        starts inside it or at its first token; None where there are no documents.
    open: for each local segment, whether ``continues_NB`` holds in any row, known on the host; None: in all.
    """

    tokens: int
    starts: tuple[int, ...]
    total: int
    continues_NB: Tensor | None = None
    open: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        if self.tokens <= 0 or self.tokens % CHUNK:
            raise ValueError(
                f"segment_tokens={self.tokens}: segments are whole chunks of {CHUNK} tokens; "
                f"give a positive multiple of {CHUNK}"
            )

    def length(self, n: int) -> int:
        """Tokens of local segment n."""
        return min(self.tokens, self.total - self.starts[n])

    def is_first(self, n: int) -> bool:
        return self.starts[n] == 0

    def is_last(self, n: int) -> bool:
        return self.starts[n] + self.tokens >= self.total

    def need_M(self, n: int, has_initial: bool, want_final: bool) -> bool:
        """M is used where a state comes in and goes on; the same in the forward and the backward pass."""
        comes_in, goes_on = has_initial or not self.is_first(n), want_final or not self.is_last(n)
        return comes_in and goes_on and (self.open is None or self.open[n])


@dataclass(frozen=True)
class _Call:
    """What the autograd function needs beside tensors."""

    scale: float
    rule: Rule
    normalise_qk: bool
    segments: Segments
    scan: Scan
    has_initial: bool
    want_final: bool

    def inputs(self, tensors: tuple[Any, ...], n: int, offset: int) -> chunk_torch.Inputs:
        """Segment n, whose tokens begin at ``offset`` in memory."""
        q, k, v, g, beta, doc_start = tensors
        part = slice(offset, offset + self.segments.length(n))
        return chunk_torch.Inputs(
            q[:, part],
            k[:, part],
            v[:, part],
            None if g is None else g[:, part],
            beta[:, part],
            None if doc_start is None else doc_start[:, part],
            self.segments.starts[n],
            self.scale,
            self.rule,
            self.normalise_qk,
        )

    def each_segment(self, tensors: tuple[Any, ...]) -> list[tuple[slice, chunk_torch.Inputs]]:
        parts, offset = [], 0
        for n in range(len(self.segments.starts)):
            length = self.segments.length(n)
            parts.append((slice(offset, offset + length), self.inputs(tensors, n, offset)))
            offset += length
        return parts


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        beta: Tensor,
        initial: Tensor | None,
        doc_start: Tensor | None,
        call: _Call,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        parts = call.each_segment((q, k, v, g, beta, doc_start))
        segments, dtype = call.segments, parts[0][1].dtype
        B, _, HV, V = v.shape
        K = k.shape[-1]

        def scan_forward() -> tuple[Tensor, Tensor, Tensor | None]:
            M = v.new_zeros(len(parts), B, HV, K, K, dtype=dtype)
            U = v.new_zeros(len(parts), B, HV, K, V, dtype=dtype)
            for n, (_, x) in enumerate(parts):
                need_M = segments.need_M(n, call.has_initial, call.want_final)
                need_U = call.want_final or not segments.is_last(n)
                M_n, U_n = chunk_torch.summarise(x, need_M, need_U)
                if M_n is not None:
                    M[n] = M_n
                if U_n is not None:
                    U[n] = U_n
            start = None if initial is None else initial.to(dtype)
            return M, *call.scan.forward(M, U, segments.continues_NB, start, call.want_final)

        M, incoming, final = kept.once(scan_forward)
        o = torch.cat([chunk_torch.apply(x, incoming[n]) for n, (_, x) in enumerate(parts)], dim=1)
        ctx.save_for_backward(q, k, v, g, beta, doc_start, M, incoming)
        ctx.call = call
        ctx.initial_dtype = None if initial is None else initial.dtype
        return o, final

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        q, k, v, g, beta, doc_start, M, incoming = ctx.saved_tensors
        call: _Call = ctx.call
        segments = call.segments
        do = torch.zeros_like(v) if do is None else do
        parts = call.each_segment((q, k, v, g, beta, doc_start))
        D = torch.zeros_like(incoming)
        for n, (part, x) in enumerate(parts):
            if call.has_initial or not segments.is_first(n):
                D[n] = chunk_torch.summarise_backward(x, do[:, part])
        outgoing, dinitial = call.scan.reverse(
            M,
            D,
            segments.continues_NB,
            None if dfinal is None else dfinal.to(M.dtype),
            call.has_initial,
            call.want_final,
        )
        grads = [
            chunk_torch.apply_backward(x, incoming[n], do[:, part], outgoing[n]) for n, (part, x) in enumerate(parts)
        ]

        def joined(name: str) -> Tensor | None:
            pieces = [getattr(grad, name) for grad in grads]
            return None if pieces[0] is None else torch.cat(pieces, dim=1)

        if dinitial is not None and ctx.initial_dtype is not None:
            dinitial = dinitial.to(ctx.initial_dtype)
        return joined("q"), joined("k"), joined("v"), joined("g"), joined("beta"), dinitial, None, None


def delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor | None,
    beta_BTH: Tensor,
    *,
    scale: float,
    segments: Segments,
    scan: Scan,
    doc_start_BT: Tensor | None = None,
    initial_state_BHKV: Tensor | None = None,
    output_final_state: bool = False,
    rule: Rule = Rule(),  # noqa: B008 (frozen)
    normalise_qk: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The delta rule over the local segments of a sequence, with the scan that joins them to the rest.

    Args:
        q_BTHK, k_BTHK: ``[B, T, H, K]``, T the tokens of the local segments, one after another.
        v_BTHV: ``[B, T, HV, V]``; HV is a multiple of H.
        g_BTH: log decay ``<= 0``, ``[B, T, HV]``, or None.
        beta_BTH: write strength, ``[B, T, HV]``.
        scale: factor of the queries.
        segments: which part of the global grid this is.
        scan: joins segments; on every rank of a group the same kind.
        doc_start_BT: global index of the first token of each token's document, integers ``[B, T]``; None: one
            document. A first document with start -1 goes on from the initial state.
        initial_state_BHKV: ``[B, HV, K, V]``, on every rank or none; the value that counts is that of the rank which
            holds the first segment.
        output_final_state: return the state behind the last token, on the rank that holds it.
        rule: erase or not, and which state the error is taken from.
        normalise_qk: l2-normalise q and k (eps 1e-6).

    Returns:
        outputs ``[B, T, HV, V]`` in v's dtype, and the final state ``[B, HV, K, V]`` in fp32 (fp64 for fp64 values).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, naming the value and the rule.
    """
    _check(q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, initial_state_BHKV, doc_start_BT)
    T, held = v_BTHV.shape[1], sum(segments.length(n) for n in range(len(segments.starts)))
    if T != held:
        raise ValueError(f"T={T}, but the local segments hold {held} tokens; pass the tokens of whole segments")
    call = _Call(
        scale, rule, normalise_qk, segments, scan, initial_state_BHKV is not None, output_final_state
    )
    return _DeltaRule.apply(
        q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, initial_state_BHKV, doc_start_BT, call
    )  # type: ignore[no-any-return]


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    doc_start: Tensor | None = None,
    segment_tokens: int | None = None,
    check_inputs: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gated delta rule, chunked; names, shapes and meaning of flash-linear-attention's op of this name.

    Args:
        q, k: ``[B, T, H, K]``.
        v: ``[B, T, HV, V]``; HV is a multiple of H, value head ``h`` reads key head ``h // (HV // H)``.
        g: log decay, ``<= 0``, ``[B, T, HV]``; None is plain DeltaNet.
        beta: write strength, ``[B, T, HV]``.
        scale: of the queries; ``K ** -0.5`` unless given.
        initial_state: ``[B, HV, K, V]``; with ``cu_seqlens`` of N documents ``[N, HV, K, V]``.
        output_final_state: return the state behind the last token (of each document with ``cu_seqlens``).
        use_qk_l2norm_in_kernel: l2-normalise q and k over K (eps 1e-6).
        cu_seqlens: ``[N + 1]`` integers from 0 to T, the documents of one packed row (B = 1).
        doc_start: instead of ``cu_seqlens``, for any B: the index of the first token of each token's document,
            ``[B, T]``; one incoming state a row.
        segment_tokens: length of the segments, a multiple of 64; fixes the bits. None: one segment.
        check_inputs: look at values too (g > 0, cu_seqlens out of order); on a GPU this waits for the device.

    Returns:
        ``(o, final_state)``: ``[B, T, HV, V]`` in v's dtype, and fp32 states (fp64 for fp64) or None.

    Raises:
        ValueError, TypeError: naming the argument, its value, the rule and the way out.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    _check(q, k, v, g, beta, None, doc_start)
    if cu_seqlens is not None:
        if doc_start is not None:
            raise ValueError("cu_seqlens and doc_start both describe documents; give one of them")
        _check_cu_seqlens(cu_seqlens, q, initial_state, v)
    if check_inputs:
        _check_values(g, beta, cu_seqlens, q.shape[1])
    if cu_seqlens is not None and (initial_state is not None or output_final_state):
        return _by_document(
            q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens,
            segment_tokens,
        )  # fmt: skip
    T = v.shape[1]
    if T == 0:
        state = initial_state
        if state is None:
            state = v.new_zeros(v.shape[0], v.shape[2], q.shape[3], v.shape[3], dtype=_state_dtype(v))
        return torch.zeros_like(v), state if output_final_state else None
    if cu_seqlens is not None:
        doc_start = document_starts(cu_seqlens, T)
    tokens = -(-T // CHUNK) * CHUNK if segment_tokens is None else segment_tokens
    starts = tuple(range(0, T, tokens))
    if doc_start is not None and initial_state is not None:  # the first document goes on from the initial state
        doc_start = torch.where(doc_start == 0, -1, doc_start)
    continues = None
    if doc_start is not None and len(starts) > 1:
        lasts = torch.tensor([min(s + tokens, T) - 1 for s in starts], device=doc_start.device)
        first = torch.tensor(starts, device=doc_start.device)
        continues = (doc_start[:, lasts] < first).T
    elif doc_start is not None and (initial_state is not None or output_final_state):
        continues = (doc_start[:, -1:] < 0).T
    return delta_rule(
        q,
        k,
        v,
        g,
        beta,
        scale=scale,
        segments=Segments(tokens, starts, T, continues),
        scan=LocalScan(),
        doc_start_BT=doc_start,
        initial_state_BHKV=initial_state,
        output_final_state=output_final_state,
        normalise_qk=use_qk_l2norm_in_kernel,
    )


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated delta rule, token by token, for decoding; arguments, results and errors of
    :func:`chunk_gated_delta_rule`. States and sums in fp32 (fp64 for fp64 inputs)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    _check(q, k, v, g, beta, None if cu_seqlens is not None else initial_state, None)
    bounds = [0, q.shape[1]]
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, q, initial_state, v)
        bounds = cu_seqlens.tolist()
    outputs, finals = [], []
    for n, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        part = slice(start, stop)
        state = initial_state if initial_state is None or cu_seqlens is None else initial_state[n : n + 1]
        o, final = recurrence(
            q[:, part],
            k[:, part],
            v[:, part],
            None if g is None else g[:, part],
            beta[:, part],
            scale=scale,
            initial_state_BHKV=state,
            normalise_qk=use_qk_l2norm_in_kernel,
            dtype=_state_dtype(v),
        )
        outputs.append(o.to(v.dtype))
        finals.append(final)
    return torch.cat(outputs, 1), torch.cat(finals) if output_final_state else None


def _state_dtype(v: Tensor) -> torch.dtype:
    return torch.float64 if v.dtype == torch.float64 else torch.float32


def document_starts(cu_seqlens: Tensor, T: int) -> Tensor:
    """``[1, T]``: the first token of each token's document, from its ``[N + 1]`` bounds; no synchronisation."""
    t = torch.arange(T, device=cu_seqlens.device)
    return cu_seqlens[torch.searchsorted(cu_seqlens, t, right=True) - 1][None].to(torch.int32)


def _by_document(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    normalise_qk: bool,
    cu_seqlens: Tensor,
    segment_tokens: int | None,
) -> tuple[Tensor, Tensor | None]:
    """Documents with a state each: every one starts on a chunk boundary of its own."""
    bounds = cu_seqlens.tolist()
    outputs, finals = [], []
    for n, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        state = None if initial_state is None else initial_state[n : n + 1]
        part = slice(start, stop)
        o, final = chunk_gated_delta_rule(
            q[:, part],
            k[:, part],
            v[:, part],
            None if g is None else g[:, part],
            beta[:, part],
            scale,
            state,
            output_final_state,
            normalise_qk,
            segment_tokens=segment_tokens,
        )
        outputs.append(o)
        finals.append(final)
    return torch.cat(outputs, 1), torch.cat(finals) if output_final_state else None


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial: Tensor | None,
    doc_start: Tensor | None,
) -> None:
    """Shapes, dtypes and devices; never values."""
    if v.dim() != 4 or k.dim() != 4:
        raise ValueError(f"k{list(k.shape)}, v{list(v.shape)}: expected k [B, T, H, K] and v [B, T, HV, V]")
    B, T, H, K = k.shape
    HV, V = v.shape[2:]
    if g is not None and g.dim() == 4:
        raise ValueError(
            f"g{list(g.shape)}: a decay per key channel (Kimi Linear) is another algebra and is not supported; "
            f"give one log decay a value head, [B, T, HV] = {[B, T, HV]}"
        )
    if H == 0 or HV % H:
        raise ValueError(f"HV={HV} value heads, H={H} key heads: HV must be a multiple of H; change one of them")
    expected = {"q": (q, [B, T, H, K]), "v": (v, [B, T, HV, V]), "g": (g, [B, T, HV]), "beta": (beta, [B, T, HV])}
    expected["initial_state"] = (initial, [B, HV, K, V])
    expected["doc_start"] = (doc_start, [B, T])
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if list(tensor.shape) != shape:
            raise ValueError(f"{name}{list(tensor.shape)}: expected {shape}, from k{list(k.shape)} and v{list(v.shape)}")
        if tensor.device != k.device:
            raise ValueError(f"{name} is on {tensor.device}, k on {k.device}: move all inputs to one device")
    for name, tensor in {"k": k, "v": v}.items():
        if tensor.dtype != q.dtype or not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}, q is {q.dtype}: q, k and v share one floating dtype; cast them")
    if doc_start is not None and doc_start.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"doc_start is {doc_start.dtype}: token indices are int32 or int64; cast it")


def _check_cu_seqlens(cu_seqlens: Tensor, q: Tensor, initial_state: Tensor | None, v: Tensor) -> None:
    if q.shape[0] != 1:
        raise ValueError(f"B={q.shape[0]} with cu_seqlens: packed documents lie in one row; flatten the batch to B=1")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
        raise ValueError(f"cu_seqlens{list(cu_seqlens.shape)} {cu_seqlens.dtype}: expected N + 1 >= 2 integer bounds")
    documents = len(cu_seqlens) - 1
    shape = [documents, v.shape[2], q.shape[3], v.shape[3]]
    if initial_state is not None and list(initial_state.shape) != shape:
        raise ValueError(
            f"initial_state{list(initial_state.shape)}: with cu_seqlens of {documents} documents expected {shape}, "
            f"one state a document"
        )
    if cu_seqlens.device.type == "cpu":  # values cost nothing to look at here
        _check_bounds(cu_seqlens, q.shape[1])


def _check_bounds(cu_seqlens: Tensor, T: int) -> None:
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != T or any(a > b for a, b in zip(bounds[:-1], bounds[1:], strict=True)):
        raise ValueError(f"cu_seqlens={bounds[:4]}...{bounds[-1]}: must rise from 0 to T={T}")


def _check_values(g: Tensor | None, beta: Tensor, cu_seqlens: Tensor | None, T: int) -> None:
    for name, tensor in {"g": g, "beta": beta}.items():
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} holds values that are not finite; look at what made it")
    if g is not None and g.numel() and float(g.max()) > 0:
        raise ValueError(f"g={float(g.max()):.3g} > 0: the log decay is at most 0 (alpha = exp(g) <= 1); pass log alpha")
    if cu_seqlens is not None:
        _check_bounds(cu_seqlens, T)
