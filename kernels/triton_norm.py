"""The gated RMSNorm in Triton, one launch forward and one backward: arguments and roundings of :mod:`.norm`.

A program takes tiles of whole rows. Backward makes the norm again from x, writes dx and dgate, and adds up dweight over
the tiles of a program; these parts, no more than a bound however many rows there are, a second pass sums in a fixed
order.

Rows lie at ``a * sa + n * sn + h * sh``: batch, token and head, or less where all tensors let axes be counted as one.
So a gate is read where a projection has put it, among other columns.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from . import proof
from .signatures import Norm, aligned, stepped
from .triton_conv import sigmoid

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of x, gate and weight; they need not be the same
WIDEST = 8192  # D: a row must fit a tile
NUMBERS = 2048  # of a tile, unless one row has more
PARTS = 1 << 20  # numbers in all parts of dweight, about, but for the widest rows:
PROGRAMS = 1024  # of the backward pass, one part each, at the least


@triton.jit
def _tile(index, N, H: tl.constexpr, BR: tl.constexpr):
    """The rows of a tile: their a, their places n * H + h in it, and whether they are there."""
    rows = N.to(tl.int64) * H
    tiles = tl.cdiv(rows, BR).to(tl.int32)
    a = index // tiles
    row = (index % tiles).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    return a.to(tl.int64), row, row < rows


@triton.jit
def _at(a, row, d, sa, sn, sh, H: tl.constexpr):
    offset = a * sa + row * sn + d
    if H > 1:
        offset = a * sa + (row // H) * sn + (row % H) * sh + d
    return offset


@triton.jit
def _norm(x, weight, there, eps, D: tl.constexpr, DTYPE: tl.constexpr, ROUND: tl.constexpr):
    """x over its root mean square (0 where there is no row), the same rounded, times the weight; one over the root."""
    rstd = tl.where(there, tl.rsqrt(tl.sum(x * x, 1)[:, None] / D + eps), 0.0)
    exact = x * rstd
    rounded = exact.to(DTYPE).to(tl.float32)
    scaled = rounded * weight
    if ROUND:
        scaled = scaled.to(DTYPE).to(tl.float32)
    return exact, rounded, scaled, rstd


@triton.jit(do_not_specialize=["N", "eps"])
def gated_norm_kernel(
    x, gate, weight, y, N, eps,
    sxa: tl.int64, sxn: tl.int64, sxh: tl.int64, sga: tl.int64, sgn: tl.int64, sgh: tl.int64,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BD)[None, :]
    a, row, there = _tile(tl.program_id(0), N, H, BR)
    inside = there & (d < D)
    value = tl.load(x + _at(a, row, d, sxa, sxn, sxh, H), mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + _at(a, row, d, sga, sgn, sgh, H), mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    _, _, scaled, _ = _norm(value, w, there, eps, D, x.dtype.element_ty, ROUND)
    out = scaled * (g * sigmoid(g))
    tl.store(y + (a * N * H + row) * D + d, out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "tiles", "each", "eps"])
def gated_norm_gradients_kernel(
    x, gate, weight, dy, dx, dgate, parts, N, tiles, each, eps,
    sxa: tl.int64, sxn: tl.int64, sxh: tl.int64, sga: tl.int64, sgn: tl.int64, sgh: tl.int64,
    sya: tl.int64, syn: tl.int64, syh: tl.int64,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BD)[None, :]
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    dweight = tl.zeros((BR, BD), tl.float32)
    first = tl.program_id(0) * each
    for index in range(first, tl.minimum(first + each, tiles)):
        a, row, there = _tile(index, N, H, BR)
        inside = there & (d < D)
        value = tl.load(x + _at(a, row, d, sxa, sxn, sxh, H), mask=inside, other=0.0).to(tl.float32)
        g = tl.load(gate + _at(a, row, d, sga, sgn, sgh, H), mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + _at(a, row, d, sya, syn, syh, H), mask=inside, other=0.0).to(tl.float32)
        exact, rounded, scaled, rstd = _norm(value, w, there, eps, D, x.dtype.element_ty, ROUND)
        p = sigmoid(g)
        act = g * p
        at = (a * N * H + row) * D + d
        dg = grad * scaled * tl.fma(act, 1.0 - p, p)
        tl.store(dgate + at, dg.to(dgate.dtype.element_ty), mask=inside)
        dscaled = grad * act
        dweight = tl.fma(dscaled, rounded, dweight)
        dnorm = dscaled * w
        along = tl.sum(dnorm * exact, 1)[:, None] / D
        tl.store(dx + at, ((dnorm - exact * along) * rstd).to(dx.dtype.element_ty), mask=inside)
    tl.store(parts + tl.program_id(0).to(tl.int64) * D + d, tl.sum(dweight, 0)[None, :], mask=d < D)


def takes(x: Tensor, gate: Tensor, weight: Tensor) -> bool:
    """Whether there is a kernel for this width and these dtypes."""
    return x.shape[-1] <= WIDEST and all(t.dtype in DTYPES for t in (x, gate, weight))


def refuse(x: Tensor, gate: Tensor, weight: Tensor) -> None:
    """Say what has no kernel here, and the way out."""
    if x.shape[-1] > WIDEST:
        raise ValueError(f"D={x.shape[-1]}: the Triton kernels take rows of at most {WIDEST}; pass backend='torch'")
    for name, tensor in {"x": x, "gate": gate, "weight": weight}.items():
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name} is {tensor.dtype}: the Triton kernels take bf16, fp16 and fp32; cast it, or pass "
                f"backend='torch'"
            )
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} strides {list(tensor.stride())}: the Triton kernels read channels that lie one after another "
                f"(other strides as they are); pass {name}.contiguous(), or backend='torch'"
            )
    if not x.is_cuda and not isinstance(gated_norm_kernel, InterpretedFunction):
        raise ValueError(
            f"backend='triton' on {x.device}: the kernels run on a GPU (or slowly anywhere, with TRITON_INTERPRET=1 "
            f"set before they are imported); move the inputs there, or pass backend='torch'"
        )


def forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y, contiguous, in x's dtype; arguments as :func:`.norm.gated_rms_norm` has checked them."""
    (A, N, H), (x, gate), strides = _axes(x, gate)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    constants = _constants(x, weight, H)
    proof.require_kernels(x.device, Norm(x.dtype, gate.dtype, weight.dtype, x.shape[-1], H))
    grid = (A * triton.cdiv(N * H, constants["BR"]),)
    proof.launch(gated_norm_kernel, grid, x, gate, aligned(weight), y, N, float(eps), *strides, **constants)
    return y


def backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, most: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dx, dgate, dweight)``, in the dtypes of what they are the gradients of. ``most``: programs, at the most."""
    # Autograd lays dy out as it likes: the gradient of a sum, say, is one number expanded. Contiguous, it lets all axes
    # be counted as one that forward has.
    (A, N, H), (x, gate, dy), strides = _axes(x, gate, dy.contiguous())
    dx, dgate = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, gate))
    constants = _constants(x, weight, H)
    tiles = A * triton.cdiv(N * H, constants["BR"])
    each = triton.cdiv(tiles, most or max(PROGRAMS, PARTS // constants["BD"]))
    programs = triton.cdiv(tiles, each)
    parts = torch.empty((programs, x.shape[-1]), dtype=torch.float32, device=x.device)
    proof.launch(
        gated_norm_gradients_kernel, (programs,),
        x, gate, aligned(weight), dy, dx, dgate, parts, N, tiles, each, float(eps), *strides, **constants,
    )  # fmt: skip
    return dx, dgate, parts.sum(0).to(weight.dtype)


def _constants(x: Tensor, weight: Tensor, H: int) -> dict[str, Any]:
    D = x.shape[-1]
    BD = triton.next_power_of_2(D)
    return {
        **{"H": H, "D": D, "BD": BD, "BR": max(1, NUMBERS // BD), "ROUND": weight.dtype == x.dtype},
        **{"num_warps": max(4, BD // 512), "num_stages": 1},
    }


def _axes(*tensors: Tensor) -> tuple[tuple[int, int, int], tuple[Tensor, ...], list[int]]:
    """The sizes (A, N, H) of all axes but the last, the tensors, and the strides of each.

    H, which makes a binary of its own, is 1 but where heads lie further apart than their width, or N is short.
    """
    D, shape = tensors[0].shape[-1], tensors[0].shape[:-1]
    tensors = tuple(map(stepped, tensors))
    if all(t.is_contiguous() for t in tensors):
        return (1, shape.numel(), 1), tensors, [0, D, 0] * len(tensors)
    axes: list[tuple[int, list[int]]] = []
    for dim, size in enumerate(shape):
        strides = [t.stride(dim) for t in tensors]
        if axes and all(outer == size * inner for outer, inner in zip(axes[-1][1], strides, strict=True)):
            axes[-1] = (axes[-1][0] * size, strides)
        elif size > 1:
            axes.append((size, strides))
    if len(axes) > 3:
        return _axes(*(t.contiguous() for t in tensors))
    none = (1, [0] * len(tensors))
    if len(axes) == 2:  # batch and tokens, or tokens and heads
        axes = [*axes, none] if axes[0][0] <= axes[1][0] else [none, *axes]
    elif len(axes) < 2:
        axes = [none, *(axes or [none]), none]
    (A, a), (N, n), (H, h) = axes
    return (A, N, H), tensors, [stride for each in zip(a, n, h, strict=True) for stride in each]
