"""The gated delta rule: the public ops.

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = scale * S_t^T q_t

(Yang, Kautz and Hatamizadeh, arXiv:2412.06464, equation 10, transposed.)

A sequence is cut into segments on a global grid. Each is *summarised* (what it does to any state), the *scan* finds
the state that enters each, and *apply* computes outputs from it; the backward pass is the same, right to left (see
passes.py). The scan is handed in: :class:`~dnsp.kernels.scan.LocalScan` here, one over many ranks in the parallel room.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import Backend, choose
from .checks import check_cu_seqlens, check_floating, check_shapes, check_values
from .decode import delta_step
from .passes import Call, UnderWay, at_once, begin
from .reference import Rule, recurrence
from .scan import LocalScan, Scan
from .segments import CHUNK, Heads, Segments, cached, check_segment_tokens, filling_tokens

__all__ = [
    "Rule",
    "Segments",
    "begin_delta_rule",
    "chunk_gated_delta_rule",
    "delta_rule",
    "document_starts",
    "fused_recurrent_gated_delta_rule",
]


def begin_delta_rule(
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
    backend: Backend | None = None,
) -> UnderWay:
    """Starts the delta rule over the local segments of a sequence, with the scan that joins them to the rest.

    What is computed before ``finish()`` of the result is computed while states travel, and its gradients while those of
    the states do; it must not talk to other ranks of the group.

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
        backend: ``"torch"`` operations, right on any device, or Triton's kernels, ``"triton"``. None: what the
            environment's DNSP_DELTA_RULE says, or Triton on a GPU and torch elsewhere.

    Returns:
        the call under way; its ``finish()`` gives outputs ``[B, T, HV, V]`` in v's dtype, and the final state
        ``[B, HV, K, V]`` in fp32 (fp64 for fp64 values).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, naming the value and the rule.
    """
    check_shapes(q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, initial_state_BHKV, doc_start_BT)
    T, held, continues = v_BTHV.shape[1], segments.held, segments.continues_NB
    if held != T:
        raise ValueError(f"T={T}, but the local segments hold {held} tokens; pass the tokens of whole segments")
    if continues is not None and continues.device != v_BTHV.device:
        raise ValueError(f"continues_NB is on {continues.device}, v on {v_BTHV.device}: move all to one device")
    has_initial, backend = initial_state_BHKV is not None, choose(backend, v_BTHV)
    call = Call(segments, scan, float(scale), rule, normalise_qk, has_initial, output_final_state, backend)
    return _begin(q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, initial_state_BHKV, doc_start_BT, call)


delta_rule = at_once(begin_delta_rule)  # outputs and final state


def _begin(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial: Tensor | None,
    doc_start: Tensor | None,
    call: Call,
) -> UnderWay:
    """The rule on tensors that fit each other, where there are kernels for them."""
    width = v.shape[3]
    if call.backend == "triton":
        from . import chunk_triton

        if width == 1:  # the normaliser's sum of keys: the narrowest kernel, its other columns zero
            v = F.pad(v, (0, chunk_triton.WIDTHS[0] - 1))
            initial = None if initial is None else F.pad(initial, (0, chunk_triton.WIDTHS[0] - 1))
        chunk_triton.refuse(k, v)
    return begin(q, k, v, g, beta, initial, doc_start, call, width)


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
    *,
    cu_seqlens: Tensor | None = None,
    doc_start: Tensor | None = None,
    segment_tokens: int | None = None,
    check_inputs: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated delta rule (this module's head), chunked; names, shapes and meaning of flash-linear-attention's op.

    Args:
        q, k: ``[B, T, H, K]``.
        v: ``[B, T, HV, V]``; HV is a multiple of H, value head ``h`` reads key head ``h // (HV // H)``.
        g: log decay, ``<= 0``, ``[B, T, HV]``; None is plain DeltaNet.
        beta: write strength, ``[B, T, HV]``.
        scale: of the queries; ``K ** -0.5`` unless given.
        initial_state: ``[B, HV, K, V]``; with ``cu_seqlens`` of N documents ``[N, HV, K, V]``.
        output_final_state: return the state behind the last token (of each document with ``cu_seqlens``).
        use_qk_l2norm_in_kernel: l2-normalise q and k over K (eps 1e-6).
        cu_seqlens: ``[N + 1]`` integers from 0 to T, the documents of one packed row (B = 1). With a state each they
            are computed one after another, and a GPU is waited for unless the bounds are on the CPU.
        doc_start: instead of ``cu_seqlens``, for any B: the index of the first token of each token's document,
            ``[B, T]``; one incoming state a row.
        segment_tokens: length of the segments, a multiple of 64; fixes the bits. None: one segment, or on a GPU as
            many as fill its multiprocessors.
        check_inputs: look at values too (g > 0, numbers that are not finite, documents out of order); on a GPU this
            waits for the device.
        backend: ``"torch"`` or ``"triton"``; None: what the environment's DNSP_DELTA_RULE says, or Triton's
            kernels on a GPU and torch operations elsewhere.

    Returns:
        ``(o, final_state)``: ``[B, T, HV, V]`` in v's dtype, and fp32 states (fp64 for fp64) or None.

    Raises:
        ValueError, TypeError: naming the argument, its value, the rule and the way out.
    """
    check_shapes(q, k, v, g, beta, None if cu_seqlens is not None else initial_state, doc_start)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    each = initial_state is not None or output_final_state  # with cu_seqlens: every document has a state
    if cu_seqlens is not None:
        if doc_start is not None:
            raise ValueError("cu_seqlens and doc_start both describe documents; give one of them")
        check_cu_seqlens(cu_seqlens, q, initial_state, v, states=each)
    if check_inputs:
        floats = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": initial_state}
        check_values(floats, cu_seqlens, doc_start, q.shape[1])
    if cu_seqlens is not None and each:
        return _by_document(
            q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens,
            segment_tokens, backend,
        )  # fmt: skip
    T = v.shape[1]
    if T == 0:
        state = initial_state
        if state is None:
            state = v.new_zeros(v.shape[0], v.shape[2], q.shape[3], v.shape[3], dtype=_state_dtype(v))
        return torch.zeros_like(v), state.to(_state_dtype(v)) if output_final_state else None
    if cu_seqlens is not None:
        doc_start = document_starts(cu_seqlens, T)
    backend = choose(backend, v) if len(v) else "torch"  # nothing to launch
    tokens = _segment_tokens(k, v, backend) if segment_tokens is None else segment_tokens
    check_segment_tokens(tokens)
    if doc_start is not None and initial_state is not None:  # the first document goes on from the initial state
        doc_start = torch.where(doc_start == 0, -1, doc_start)
    continues = None
    if doc_start is not None and tokens < T:
        first = torch.arange(0, T, tokens, device=doc_start.device)  # made there: a copy would wait for the device
        last = doc_start[:, tokens - 1 :: tokens]
        last = last if T % tokens == 0 else torch.cat([last, doc_start[:, -1:]], 1)
        continues = (last < first).T
    elif doc_start is not None and each:
        continues = (doc_start[:, -1:] < 0).T
    segments, has_initial = _whole(tokens, T), initial_state is not None
    if continues is not None:
        segments = replace(segments, continues_NB=continues)
    call = Call(
        segments, _LOCAL, float(scale), _RULE, use_qk_l2norm_in_kernel, has_initial, output_final_state, backend
    )  # fmt: skip
    return _begin(q, k, v, g, beta, initial_state, doc_start, call).finish()


_LOCAL, _RULE = LocalScan(), Rule()


@cached
def _whole(tokens: int, T: int) -> Segments:
    """All segments of a sequence."""
    return Segments(tokens, tuple(range(0, T, tokens)), T)


def _segment_tokens(k: Tensor, v: Tensor, backend: Backend) -> int:
    """Segments for speed alone: one, or on a GPU as many as fill its multiprocessors."""
    (B, T, HV, V), (H, K) = v.shape, k.shape[2:]
    if not (backend == "triton" and v.is_cuda):
        return -(-T // CHUNK) * CHUNK
    from . import chunk_triton

    heads = Heads(B, H, HV, K, V, v.dtype, chunk_triton.is_hopper(v.device))
    return filling_tokens(heads, _multiprocessors(v.device), T)


@cached
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated delta rule, token by token, for decoding; arguments, results and errors of
    :func:`chunk_gated_delta_rule`, bounds of documents waited for. States and sums in fp32 (fp64 for fp64 inputs).
    ``beta`` None writes with strength 1. Behind g flash-linear-attention has two more gates, which this rule does not
    know, hence the keywords.

    On a GPU a launch of :func:`.decode.delta_step` a token, of a copy of the initial state; where gradients or fp64 are
    wanted, and elsewhere, torch operations."""
    check_floating({"q": q, "k": k, "v": v}, {"beta": beta})
    beta = v.new_ones(v.shape[:3]) if beta is None else beta
    check_shapes(q, k, v, g, beta, None if cu_seqlens is not None else initial_state, None)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bounds = [0, q.shape[1]]
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, q, initial_state, v, states=True)
        bounds = cu_seqlens.tolist()
    given = q, k, v, g, beta, initial_state
    differentiated = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    in_torch = differentiated or v.dtype == torch.float64 or choose(None, v) == "torch"
    outputs, finals = [], []
    for n, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        part = slice(start, stop)
        state = initial_state if initial_state is None or cu_seqlens is None else initial_state[n : n + 1]
        tensors = q[:, part], k[:, part], v[:, part], None if g is None else g[:, part], beta[:, part]
        if in_torch:
            o, final = recurrence(
                *tensors,
                scale=scale,
                initial_state_BHKV=state,
                normalise_qk=use_qk_l2norm_in_kernel,
                dtype=_state_dtype(v),
            )
        else:
            o, final = _steps(*tensors, scale, state, use_qk_l2norm_in_kernel)
        outputs.append(o.to(v.dtype))
        finals.append(final)
    return torch.cat(outputs, 1), torch.cat(finals) if output_final_state else None


def _steps(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float, initial: Tensor | None, l2norm: bool
) -> tuple[Tensor, Tensor]:
    """Outputs and the last state by the kernel of one token."""
    state = v.new_zeros(v.shape[0], v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
    if initial is not None:
        state.copy_(initial)
    outputs = [
        delta_step(
            q[:, t], k[:, t], v[:, t], None if g is None else g[:, t], beta[:, t], state, scale=scale, l2norm=l2norm,
            backend="triton",
        )
        for t in range(v.shape[1])
    ]  # fmt: skip
    return torch.stack(outputs, 1) if outputs else torch.empty_like(v), state


def _state_dtype(v: Tensor) -> torch.dtype:
    return torch.float64 if v.dtype == torch.float64 else torch.float32


def document_starts(cu_seqlens: Tensor, T: int) -> Tensor:
    """``[1, T]``: the first token of each token's document, from its ``[N + 1]`` bounds; no synchronisation."""
    t = torch.arange(T, device=cu_seqlens.device)
    return cu_seqlens[torch.searchsorted(cu_seqlens[1:], t, right=True)][None].to(torch.int32)


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
    backend: Backend | None,
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
            backend=backend,
        )
        outputs.append(o)
        if final is not None:
            finals.append(final)
    return torch.cat(outputs, 1), torch.cat(finals) if output_final_state else None
