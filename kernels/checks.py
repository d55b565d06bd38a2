"""What the ops refuse: one line with the value, the rule and the way out. Shapes, dtypes and devices always; values
only where looking at them does not wait for a device, or was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial: Tensor | None,
    doc_start: Tensor | None,
) -> None:
    """Shapes, dtypes and devices; never values."""
    check_floating({"q": q, "k": k, "v": v, "beta": beta}, {"g": g, "initial_state": initial})
    if v.dim() != 4 or k.dim() != 4:
        raise ValueError(f"k{list(k.shape)}, v{list(v.shape)}: expected k [B, T, H, K] and v [B, T, HV, V]")
    B, T, H, K = k.shape
    HV, V = v.shape[2:]
    if g is not None and g.dim() == 4:
        raise ValueError(
            f"g{list(g.shape)}: a decay per key channel (Kimi Linear) is another algebra and is not supported; "
            f"give one log decay a value head, [B, T, HV] = {[B, T, HV]}"
        )
    if not H or not HV or HV % H:
        raise ValueError(f"HV={HV} value heads, H={H} key heads: HV must be a multiple of H; change one of them")
    device, dtype = k.device, q.dtype
    expected = (
        ("q", q, (B, T, H, K)),
        ("v", v, (B, T, HV, V)),
        ("g", g, (B, T, HV)),
        ("beta", beta, (B, T, HV)),
        ("initial_state", initial, (B, HV, K, V)),
        ("doc_start", doc_start, (B, T)),
    )
    for name, tensor, shape in expected:
        if tensor is None:
            continue
        _check_tensor(name, tensor)
        if tensor.shape != shape:
            raise ValueError(
                f"{name}{list(tensor.shape)}: expected {list(shape)}, from k{list(k.shape)} and v{list(v.shape)}"
            )
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, k on {device}: move all inputs to one device")
    if not K or not V:
        raise ValueError(f"K={K}, V={V}: heads are at least 1 wide; look at how q, k and v were split")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != dtype:
            raise TypeError(f"{name} is {tensor.dtype}, q is {dtype}: q, k and v share one floating dtype; cast them")
    if doc_start is not None and doc_start.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"doc_start is {doc_start.dtype}: token indices are int32 or int64; cast it")


def check_floating(tensors: Mapping[str, Tensor], options: Mapping[str, Tensor | None]) -> None:
    """That tensors, and those of the options which are given, are tensors of real numbers."""
    given: dict[str, Any] = {**tensors, **options}
    for name, x in given.items():
        if x is None and name in options:
            continue
        _check_tensor(name, x)
        if not x.is_floating_point():
            raise TypeError(f"{name} is {x.dtype}: it must be of a floating dtype; cast it")


def _check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {type(x).__name__}: give a tensor")


def check_cu_seqlens(
    cu_seqlens: Tensor, q: Tensor, initial_state: Tensor | None, v: Tensor, states: bool = False
) -> None:
    """``states``: documents have a state each, and are taken one after another by their bounds on the host."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens is {type(cu_seqlens).__name__}: give a tensor of N + 1 integer bounds")
    if q.shape[0] != 1:
        raise ValueError(f"B={q.shape[0]} with cu_seqlens: packed documents lie in one row; flatten the batch to B=1")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens{list(cu_seqlens.shape)} {cu_seqlens.dtype}: expected N + 1 >= 2 integer bounds, int32 or int64"
        )
    documents = len(cu_seqlens) - 1
    shape = [documents, v.shape[2], q.shape[3], v.shape[3]]
    if initial_state is not None and list(initial_state.shape) != shape:
        raise ValueError(
            f"initial_state{list(initial_state.shape)}: with cu_seqlens of {documents} documents expected {shape}, "
            f"one state a document"
        )
    on_host = cu_seqlens.device.type == "cpu"
    if cu_seqlens.device != q.device and not (states and on_host):
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, q on {q.device}: move all inputs to one device")
    if on_host and not torch.compiler.is_compiling():  # values cost nothing to look at here
        check_bounds(cu_seqlens, q.shape[1])


def check_bounds(cu_seqlens: Tensor, T: int) -> None:
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != T or any(a > b for a, b in zip(bounds[:-1], bounds[1:], strict=True)):
        raise ValueError(f"cu_seqlens={bounds[:4]}...{bounds[-1]}: must rise from 0 to T={T}")


def check_values(
    floats: Mapping[str, Tensor | None], cu_seqlens: Tensor | None, doc_start: Tensor | None, T: int
) -> None:
    """Of the inputs by name, g among them, and of where documents begin."""
    g = floats["g"]
    for name, tensor in floats.items():
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} holds values that are not finite; look at what made it")
    if g is not None and g.numel() and float(g.detach().max()) > 0:
        raise ValueError(
            f"g={float(g.detach().max()):.3g} > 0: the log decay is at most 0 (alpha = exp(g) <= 1); pass log alpha"
        )
    if cu_seqlens is not None:
        check_bounds(cu_seqlens, T)
    if doc_start is not None and doc_start.numel():
        before = torch.cat([doc_start[:, :1].clamp(max=0), doc_start[:, :-1]], 1)
        wrong = (doc_start != before) & (doc_start != torch.arange(T, device=doc_start.device))
        if bool(wrong.any()):
            row, t = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"doc_start[{row}, {t}]={int(doc_start[row, t])}: a document begins at this token, {t}, or has the "
                f"start of the token before, {int(before[row, t])}"
            )
