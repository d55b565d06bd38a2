"""FlashAttention (Dao 2023) in its versions: torch's own, and the flash-attn packages' where they are installed.

    flash           torch's, which is version 2
    flash_attn_2    the package flash-attn               flash_attn_3    flash-attn-3, for Hopper
    flash_attn_4    the package flash-attn-4, kernels that are compiled at their first call, for Hopper and Blackwell

Each is two functions as :mod:`.attention_backends` has them. All of them take tokens before heads, and several
documents as one call with the documents' bounds; their backwards take the log-sum-exp that they are given. Each has a
twin, ``..._deterministic``, whose backward sums dq in a fixed order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten

Edges = tuple[int, ...]  # which keys a query sees; see attention_backends
Grads = tuple[Tensor, Tensor, Tensor]


class Lengths(NamedTuple):
    """q is ``[B, S, H, D]`` where there are no ``starts``; otherwise ``[S, H, D]``, and these bounds of documents."""

    starts: Tensor | None
    queries: int  # of the longest document
    keys: int


Forward = Callable[[Tensor, Tensor, Tensor, Lengths, bool, float], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Lengths, bool, float, bool], Grads]


class Version(NamedTuple):
    """``forward(q, k, v, lengths, causal, scale)`` and ``backward(do, q, k, v, o, lse, lengths, causal, scale,
    deterministic)``, tokens before heads; ``module``: what they need, and ``package``: where it comes from."""

    forward: Forward
    backward: Backward
    module: str = ""
    package: str = ""

    def missing(self) -> str | None:
        """Why it cannot be used, in words: what it needs is not installed."""
        try:
            _ = self.module and import_module(self.module)
        except Exception as error:  # what a package of another torch raises is not known
            return f"it needs the package {self.package}, which cannot be imported here ({error})"
        return None

    def functions(self, deterministic: bool) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Grads]]:
        """As a backend has them: heads before tokens, and edges."""

        def forward(q: Tensor, k: Tensor, v: Tensor, edges: Edges, scale: float) -> tuple[Tensor, Tensor]:
            (q, k, v), lengths = _tokens_first((q, k, v), edges)
            o, lse = self.forward(q, k, v, lengths, bool(edges), scale)
            return _heads_first(o), lse if lengths.starts is None else lse.unsqueeze(0)

        def backward(
            do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, edges: Edges, scale: float
        ) -> Grads:
            (q, k, v, do, o), lengths = _tokens_first((q, k, v, do, o), edges)
            lse = (lse if lengths.starts is None else lse[0]).contiguous()
            dq, dk, dv = self.backward(do, q, k, v, o, lse, lengths, bool(edges), scale, deterministic)
            return _heads_first(dq), _heads_first(dk), _heads_first(dv)

        return forward, backward


def _tokens_first(tensors: tuple[Tensor, ...], edges: Edges) -> tuple[tuple[Tensor, ...], Lengths]:
    """From ``[B, H, S, D]``, queries first and keys behind them."""
    if len(edges) <= 2:
        return tuple(x.transpose(1, 2) for x in tensors), Lengths(None, tensors[0].shape[2], tensors[1].shape[2])
    longest = max(stop - start for start, stop in pairwise(edges))
    lengths = Lengths(_starts(edges, tensors[0].device), longest, longest)
    return tuple(x[0].transpose(0, 1) for x in tensors), lengths


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2) if x.dim() == 4 else x.transpose(0, 1).unsqueeze(0)


@functools.lru_cache(maxsize=64)  # every layer of a micro-batch asks for the same ones
def _starts(edges: Edges, device: torch.device) -> Tensor:
    """Bounds of the documents where a kernel reads them, int32; the host does not wait for the copy."""
    return torch.tensor(edges, dtype=torch.int32, pin_memory=True).to(device, non_blocking=True)


def _torch_forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    starts, queries, keys = lengths
    o, lse, *_ = aten._flash_attention_forward(
        q, k, v, starts, starts, queries, keys, 0.0, causal, False, scale=scale
    )
    return o, lse


def _torch_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, lengths: Lengths, causal: bool, scale: float,
    deterministic: bool,
) -> Grads:  # fmt: skip
    starts, queries, keys = lengths
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of a dropout that there is not
    with _repeatable(deterministic):
        return aten._flash_attention_backward(
            do, q, k, v, o, lse, starts, starts, queries, keys, 0.0, causal, state,
            torch.empty(0, device=q.device), scale=scale,
        )  # fmt: skip


@contextmanager
def _repeatable(wanted: bool) -> Iterator[None]:
    """torch's flash backward sums in a fixed order where the program asks for deterministic algorithms."""
    if not wanted:
        yield
        return
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fills = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # nothing is read that was not written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
        settings.fill_uninitialized_memory = fills


def _forward_2(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    package = import_module(VERSIONS["flash_attn_2"].module)
    # The operators say that they write into q, k and v, and do not: autograd is to count it of other names.
    q, k, v = q.data, k.data, v.data
    options: dict[str, Any] = {
        "dropout_p": 0.0, "softmax_scale": scale, "causal": causal, "window_size_left": -1, "window_size_right": -1,
        "softcap": 0.0, "alibi_slopes": None, "return_softmax": False,
    }  # fmt: skip
    starts, queries, keys = lengths
    if starts is None:
        o, lse, *_ = package._flash_attn_forward(q, k, v, **options)
    else:
        o, lse, *_ = package._flash_attn_varlen_forward(q, k, v, starts, starts, queries, keys, **options)
    return o, lse


def _backward_2(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, lengths: Lengths, causal: bool, scale: float,
    deterministic: bool,
) -> Grads:  # fmt: skip
    package = import_module(VERSIONS["flash_attn_2"].module)
    grads = _empty(q, k, v)
    options: dict[str, Any] = {
        "dropout_p": 0.0, "softmax_scale": scale, "causal": causal, "window_size_left": -1, "window_size_right": -1,
        "softcap": 0.0, "alibi_slopes": None, "deterministic": deterministic,
    }  # fmt: skip
    starts, queries, keys = lengths
    if starts is None:
        package._flash_attn_backward(do, q, k, v, o, lse, *grads, **options)
    else:
        package._flash_attn_varlen_backward(do, q, k, v, o, lse, *grads, starts, starts, queries, keys, **options)
    return grads


def _forward_3(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    o, lse, *_ = import_module(VERSIONS["flash_attn_3"].module)._flash_attn_forward(
        q, k, v, **_bounds(lengths), softmax_scale=scale, causal=causal
    )
    return o, lse


def _backward_3(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, lengths: Lengths, causal: bool, scale: float,
    deterministic: bool,
) -> Grads:  # fmt: skip
    grads, starts = _empty(q, k, v), lengths.starts
    longest = (None, None) if starts is None else (lengths.queries, lengths.keys)
    # by place: the flag for a causal block has had two names
    import_module(VERSIONS["flash_attn_3"].module)._flash_attn_backward(
        do, q, k, v, o, lse, starts, starts, None, None, *longest, *grads, scale, causal, deterministic=deterministic
    )
    return grads


def _forward_4(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    o, lse, *_ = import_module(VERSIONS["flash_attn_4"].module)._flash_attn_fwd(
        q, k, v, **_bounds(lengths), softmax_scale=scale, causal=causal, return_lse=True
    )
    return o, lse


def _backward_4(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, lengths: Lengths, causal: bool, scale: float,
    deterministic: bool,
) -> Grads:  # fmt: skip
    dq, dk, dv, *_ = import_module(VERSIONS["flash_attn_4"].module)._flash_attn_bwd(
        q, k, v, o, do, lse, softmax_scale=scale, causal=causal, deterministic=deterministic, **_bounds(lengths)
    )
    return dq, dk, dv


def _bounds(lengths: Lengths) -> dict[str, Any]:
    if lengths.starts is None:
        return {}
    return {
        "cu_seqlens_q": lengths.starts, "cu_seqlens_k": lengths.starts, "max_seqlen_q": lengths.queries,
        "max_seqlen_k": lengths.keys,
    }  # fmt: skip


def _empty(q: Tensor, k: Tensor, v: Tensor) -> Grads:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


VERSIONS = {
    "flash": Version(_torch_forward, _torch_backward),
    "flash_attn_2": Version(_forward_2, _backward_2, "flash_attn.flash_attn_interface", "flash-attn"),
    "flash_attn_3": Version(_forward_3, _backward_3, "flash_attn_interface", "flash-attn-3"),
    "flash_attn_4": Version(_forward_4, _backward_4, "flash_attn.cute.interface", "flash-attn-4"),
}
