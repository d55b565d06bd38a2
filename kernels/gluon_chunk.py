"""What the Gluon kernels for Hopper share: the descriptors by which chunks, tiles and rows of scales are fetched, and
a chunk's scales, which lie in shared memory one row after another as ``triton_prepare.ROWS`` has them.

Triton puts a barrier of all warps between operations that touch the same shared memory, messages about arrivals
included: each array has mbarriers of its own, and all arrivals are announced before the first is waited for.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .helpers import hashed
from .launcher import Described, laid_out
from .segments import WHOLE

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # as Triton 3.7 and 3.6 call it
WIDTH = gl.constexpr(WHOLE)  # of K and V
TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))  # in shared memory
TOKENS = gl.constexpr(gl.NVMMASharedLayout(128, 16, 4))  # the same, of a chunk [1, 64, 1, K]
STATES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 128, 16]))  # in registers: states [V, K]
VALUES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 64, 16]))  # transposed values [V, 64]
SCALES = gl.constexpr(gl.NVMMASharedLayout(0, 32, 2))  # of rows of scales, [1, 256] or [1, 512]


def tokens_of(x_BTHK: Tensor) -> Described:
    """By which a chunk of a head is fetched, with zeros behind the last token."""
    how = _tokens(x_BTHK.dtype, x_BTHK.shape, x_BTHK.stride())
    return tokens_of(x_BTHK.contiguous()) if how is None else Described(x_BTHK, how)


@lru_cache(maxsize=4096)
def _tokens(dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> dict[str, Any] | None:
    if any(stride == 0 < size - 1 for stride, size in zip(strides, shape, strict=True)):
        return None
    width = shape[3]
    apart = [stride if size > 1 else width for stride, size in zip(strides[:3], shape[:3], strict=True)]
    return laid_out(dtype, [*shape], [*apart, 1], [1, 64, 1, width], TOKENS.value)


def tiles_of(x: Tensor) -> Described:
    """By which one of x's matrices, its last two axes, is fetched."""
    return Described(x, _tiles(x.dtype, x.shape))


@lru_cache(maxsize=4096)
def _tiles(dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    *_, rows, columns = shape
    return laid_out(dtype, [prod(shape[:-1]), columns], [columns, 1], [rows, columns], TILE.value)


def scales_of(rows: Tensor, count: int) -> Described:
    """By which the first ``count`` of a chunk's 512 scales are fetched."""
    return Described(rows, _scales(rows.dtype, rows.numel() // 512, count))


@lru_cache(maxsize=4096)
def _scales(dtype: torch.dtype, chunks: int, count: int) -> dict[str, Any]:
    return laid_out(dtype, [chunks, 512], [512, 1], [1, count], SCALES.value)


@gluon.jit
def add(a, b):
    """Of a running sum."""
    return a + b


@gluon.jit
def scaled(weight, part, HAS_DOC: gl.constexpr):
    """weight * part. Where there are documents a weight of 0 keeps one out of another, and 0 * inf must not leak."""
    if HAS_DOC:
        return gl.where(weight != 0.0, weight * part, 0.0)
    else:
        return weight * part


@gluon.jit
def finite(x):
    """Where x is."""
    return gl.abs(x.to(gl.float32)) < float("inf")


@gluon.jit
def lost_rows(x):
    """NaN for rows that hold what is not finite, else 0. One instruction for a number: sums with 0 * x."""
    return gl.sum(x.to(gl.float32) * 0.0, 1)


@gluon.jit
def lost_rows_in(x, count: gl.constexpr, loads: gl.constexpr):
    """1 for rows in shared memory that hold what is not finite, else 0: of ``count``, every 32nd taken together."""
    found = lost_rows(x.slice(0, 32).load(loads))
    for j in gl.static_range(32, count, 32):
        found += lost_rows(x.slice(j, 32).load(loads))
    return gl.where(found == found, 0, 1)


@gluon.jit
def in_documents(marks, doc, layout: gl.constexpr):
    """The tokens in whose document one is marked, by NaN: 1, else 0, as rows of a tile. Marks and documents are in
    shared memory."""
    d_i = gl.expand_dims(doc.load(gl.SliceLayout(1, layout)), 1)
    d_j = gl.expand_dims(doc.load(gl.SliceLayout(0, layout)), 0)
    mark = gl.expand_dims(marks.load(gl.SliceLayout(0, layout)), 0)
    return gl.max(gl.where((d_i == d_j) & (mark != mark), 1, 0), 1)


@gluon.jit
def clear_rows(x, marks, loads: gl.constexpr):
    """Zeros in the marked rows of a chunk in shared memory."""
    for j in gl.static_range(0, 64, 32):
        mark = gl.expand_dims(marks.slice(j, 32).load(gl.SliceLayout(1, loads)), 1)
        at = x.slice(j, 32)
        at.store(gl.where(mark == mark, at.load(loads), 0.0).to(x.dtype))


@gluon.jit
def leave_out(q, k, do, rows, doc, dS_lost, S_lost, loads: gl.constexpr):
    """Takes what is spoilt in the backward pass, in :mod:`.triton_reverse`'s words, out of a chunk in shared memory: q,
    k, do and the scales of products with states become zero for these tokens, and each is a document of its own, by a
    number below 0. ``dS_lost`` and ``S_lost`` are 0 where these are finite. Returns whether the first token is spoilt.

    A row of ``loads`` lies in one warp: a sum over several warps would keep a register through the caller's loop.
    """
    row: gl.constexpr = gl.SliceLayout(1, loads)
    for j in gl.static_range(0, 64, 32):
        at = rows.slice(j, 32)
        of_k = rows.slice(64 + j, 32).load(row)
        of_out = rows.slice(128 + j, 32).load(row)
        here = ((of_k != 0.0) & (S_lost != 0)) | ((of_out != 0.0) & (dS_lost != 0))
        at.store(at.load(row) + lost_rows(do.slice(j, 32).load(loads)) + gl.where(here, float("nan"), 0.0))
    barrier()
    spoilt = in_documents(rows.slice(0, 64), doc, loads) != 0
    barrier()
    marks = rows.slice(0, 64)
    doc.store(gl.where(spoilt, -1 - gl.arange(0, 64, layout=row), doc.load(row)))
    marks.store(gl.where(spoilt, float("nan"), marks.load(row)))
    for start in gl.static_range(64, 192, 64):
        at = rows.slice(start, 64)
        at.store(gl.where(spoilt, 0.0, at.load(row)))
    barrier()
    clear_rows(q, marks, loads)
    clear_rows(k, marks, loads)
    clear_rows(do, marks, loads)
    barrier()
    marks.store(gl.where(spoilt, 0.0, marks.load(row)))
    fence_async_shared()
    barrier()
    return gl.max(doc.slice(0, 1).load(row), 0) < 0


@gluon.jit
def arrived(x):
    """x, loaded. What is loaded ahead of a loop would otherwise be waited for in each of its turns, with all that was
    asked for in the meantime."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=1)


@gluon.jit
def new_mbarrier():
    """One on which the arrivals of an array are announced."""
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    return bar


@gluon.jit
def new_mbarriers():
    """A pair, for an array with two buffers."""
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bars.index(0), count=1)
    mbarrier.init(bars.index(1), count=1)
    return bars


@gluon.jit
def kept_pairs(i, j, doc, HAS_DOC: gl.constexpr, layout: gl.constexpr):
    """Pairs j <= i of one document."""
    keep = i >= j
    if HAS_DOC:
        d_i = gl.expand_dims(doc.load(gl.SliceLayout(1, layout)), 1)
        keep = keep & (d_i == gl.expand_dims(doc.load(gl.SliceLayout(0, layout)), 0))
    return keep


@gluon.jit
def decays_of(rows, keep, layout: gl.constexpr):
    """exp(b_i - b_j) where kept, else 0."""
    hi_i = gl.expand_dims(rows.slice(256, 64).load(gl.SliceLayout(1, layout)), 1)
    hi_j = gl.expand_dims(rows.slice(256, 64).load(gl.SliceLayout(0, layout)), 0)
    lo_i = gl.expand_dims(rows.slice(320, 64).load(gl.SliceLayout(1, layout)), 1)
    lo_j = gl.expand_dims(rows.slice(320, 64).load(gl.SliceLayout(0, layout)), 0)
    difference = (hi_i - hi_j) + (lo_i - lo_j)
    return gl.where(keep, gl.exp(gl.where(keep, difference, 0.0)), 0.0)


@gluon.jit
def column_of(rows, start: gl.constexpr, layout: gl.constexpr):
    """Scales of the rows of a tile."""
    return gl.expand_dims(rows.slice(start, 64).load(gl.SliceLayout(1, layout)), 1)


@gluon.jit
def row_of(rows, start: gl.constexpr, layout: gl.constexpr):
    """The same, where tokens are the columns."""
    return gl.expand_dims(rows.slice(start, 64).load(gl.SliceLayout(0, layout)), 0)


@hashed
@gluon.jit
def fetch_chunk(x, bar, at, ib, c, head, wanted, W: gl.constexpr):
    """A chunk of a head, on its way into shared memory."""
    at = at._reinterpret(x.dtype, [1, 64, 1, W], TOKENS)
    tma.async_copy_global_to_shared(x, [ib, c * 64, head, 0], bar, at, pred=wanted)
