"""The causal depthwise convolution in Triton, forward and backward: arguments and arithmetic of :mod:`.conv`.

A program walks along a *run* of tokens with a block of channels, and keeps the W-1 tokens behind it in registers: every
input is read once, but for W-1 at a run's ends, and neighbouring threads read neighbouring channels.

    forward    y of a short run
    backward   dx, dhalo and the program's part of dweight and dbias, z made again; the runs are so long that the parts,
               which a second pass sums in a fixed order, take about 20 MiB at the most, whatever T is

Sums over taps are chains of fused multiply-adds, oldest token first, the same at every token: an output's bits depend
on its own W inputs alone. L tokens are loaded before the first of them is stored, since loads and stores stay in the
order in which they stand. Groups of L tokens that lie inside one document, nearly all, take a way without selections:
at the speed of an H200's memory there is time for about 25 instructions an output.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from . import proof
from .signatures import Conv, aligned, stepped

WIDTHS = (2, 3, 4)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of x, weight, bias and halo; they need not be the same
WARPS = 2
FORWARD, BACKWARD = 8, 4  # channels a thread: 16 bytes of bf16; 8 where gradients need the registers
L = 4  # tokens loaded at once
RUN = 64  # tokens: forward's runs, and the shortest of the backward pass
ROWS = 65535  # of a batch: CUDA's grids have no more along their second axis
PROGRAMS = 4096  # of the backward pass, about: four waves on an H200


@triton.jit
def _filters(weight, bias, d, D: tl.constexpr, W: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The taps of these channels, newest first, and their bias."""
    weights = ()
    for j in tl.static_range(W):
        weights = weights + (tl.load(weight + d * W + (W - 1 - j), mask=d < D, other=0.0).to(tl.float32),)
    shift = 0.0
    if HAS_BIAS:
        shift = tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)
    return weights, shift


@triton.jit
def _before(x, halo, s, sxt, d, D: tl.constexpr, W: tl.constexpr, HAS_HALO: tl.constexpr):
    """The W-1 tokens before token s, nearest first; those before the interval come from the halo."""
    before = ()
    for j in tl.static_range(1, W):
        token = tl.load(x + (s - j) * sxt + d, mask=(d < D) & (s >= j), other=0.0).to(tl.float32)
        if HAS_HALO:  # noqa: SIM102 (a constant, and a number of the device's)
            if s < j:
                token = tl.load(halo + (W - 1 + s - j) * D + d, mask=d < D, other=0.0).to(tl.float32)
        before = before + (token,)
    return before


@triton.jit
def _rows(x, t, T, stride, d, D: tl.constexpr, L: tl.constexpr):
    """Tokens t to t+L-1, zeros behind the interval's end."""
    rows = ()
    for n in tl.static_range(L):
        rows = rows + (tl.load(x + (t + n) * stride + d, mask=(d < D) & (t + n < T), other=0.0),)
    return rows


@triton.jit
def _cut(doc, t, T, start, W: tl.constexpr, L: tl.constexpr):
    """Whether any of the tokens t to t+L-1 has taps in another document: whether the last one's began behind t-W+1."""
    first = tl.load(doc + tl.minimum(t + L, T) - 1).to(tl.int64)
    return (first >= 0) & (t + start - (W - 1) < first)


@triton.jit
def _reach(doc, t, T, start, W: tl.constexpr, CUT: tl.constexpr):
    """How many tokens before token t it sees, W standing for more; none behind the interval's end."""
    reach = W
    if CUT:
        first = tl.load(doc + tl.minimum(t, T - 1)).to(tl.int64)
        reach = tl.where(first < 0, W, tl.minimum(t + start - first, W))
        reach = tl.where(t < T, reach, 0).to(tl.int32)
    return reach


@triton.jit
def _seen(value, reach, j: tl.constexpr, CUT: tl.constexpr):
    """Selected, not multiplied: 0 * inf must not leak from one document to another."""
    seen = value
    if CUT:
        seen = tl.where(reach >= j, value, 0.0)
    return seen


@triton.jit
def _taps(now, before, reach, W: tl.constexpr, CUT: tl.constexpr):
    """The inputs of one output, newest first."""
    taps = (now,)
    for j in tl.static_range(1, W):
        taps = taps + (_seen(before[j - 1], reach, j, CUT),)
    return taps


@triton.jit
def _weighted(taps, weights, shift, W: tl.constexpr, HAS_BIAS: tl.constexpr):
    z = taps[W - 1] * weights[W - 1]
    if HAS_BIAS:
        z = tl.fma(taps[W - 1], weights[W - 1], shift)
    for j in tl.static_range(1, W):
        z = tl.fma(taps[W - 1 - j], weights[W - 1 - j], z)
    return z


@triton.jit
def sigmoid(z):
    """``1 / (1 + exp(-z))``; a division, made safe for denominators near overflow, would take five times as long."""
    root = tl.rsqrt(1.0 + tl.exp2(z * -1.4426950408889634))
    return root * root


@triton.jit
def _outputs(
    y, rows, before, weights, shift, doc, t, T, start, d,
    D: tl.constexpr, W: tl.constexpr, L: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Writes y of tokens t to t+L-1; returns the W-1 tokens before token t+L."""
    for n in tl.static_range(L):
        now = rows[n].to(tl.float32)
        taps = _taps(now, before, _reach(doc, t + n, T, start, W, CUT), W, CUT)
        z = _weighted(taps, weights, shift, W, HAS_BIAS)
        if SILU:
            z = z * sigmoid(z)
        tl.store(y + (t + n) * D + d, z.to(y.dtype.element_ty), mask=(d < D) & (t + n < T))
        before = (now,) + before[: W - 2]
    return before


@triton.jit
def _gradients(
    dx, rows, grads, walk, weights, shift, doc, s, t, T, start, d,
    D: tl.constexpr, W: tl.constexpr, L: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, CUT: tl.constexpr,
    OWN: tl.constexpr,
):  # fmt: skip
    """One group of tokens of a run that began at s; writes dx of those that it completes.

    ``walk`` holds the W-1 tokens before, what dx of these has gathered so far, nearest first, the sums dweight, newest
    tap first, and dbias. Not OWN: tokens of the next run, which add to dx alone. Behind the interval's end dy is zero,
    and so is dz: inputs that would make it NaN have made it so at the last token.
    """
    before, open, dweight, dbias = walk
    for n in tl.static_range(L):
        now, dz = rows[n].to(tl.float32), grads[n].to(tl.float32)
        reach = _reach(doc, t + n, T, start, W, CUT)
        taps = _taps(now, before, reach, W, CUT)
        if SILU:
            z = _weighted(taps, weights, shift, W, HAS_BIAS)
            p = sigmoid(z)
            dz = dz * tl.fma(z * p, 1.0 - p, p)
        gathered, sums = (dz * weights[0],), (tl.fma(dz, taps[0], dweight[0]),)
        for j in tl.static_range(1, W):
            seen = _seen(dz, reach, j, CUT)
            gathered = gathered + (tl.fma(seen, weights[j], open[j - 1]),)
            sums = sums + (tl.fma(seen, taps[j], dweight[j]),)
        if OWN:
            dweight = sums
            dbias = dbias + dz
        # The run before gathers dx of its last tokens whole; this one's first steps hold but a part of it.
        whole = t + n - (W - 1)
        inside = (d < D) & (whole >= s) & (whole < T)
        tl.store(dx + whole * D + d, gathered[W - 1].to(dx.dtype.element_ty), mask=inside)
        before, open = (now,) + before[: W - 2], gathered[: W - 1]
    return before, open, dweight, dbias


@triton.jit(do_not_specialize=["T", "start", "sdb"], do_not_specialize_on_alignment=["doc"])
def conv_kernel(
    x, weight, bias, halo, doc, y, T, start, sxb: tl.int64, sxt: tl.int64, sdb,
    D: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, RUN: tl.constexpr, L: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_HALO: tl.constexpr, HAS_DOC: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (D + BD - 1) // BD  # of one token, neighbours in memory at about the same time
    b = tl.program_id(1).to(tl.int64)
    d = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    s = (tl.program_id(0) // blocks).to(tl.int64) * RUN
    x, doc, halo, y = x + b * sxb, doc + b * sdb, halo + b * ((W - 1) * D), y + b * T * D
    weights, shift = _filters(weight, bias, d, D, W, HAS_BIAS)
    before = _before(x, halo, s, sxt, d, D, W, HAS_HALO)
    for t in range(s, tl.minimum(s + RUN, T), L):
        rows = _rows(x, t, T, sxt, d, D, L)
        cut = False
        if HAS_DOC:
            cut = _cut(doc, t, T, start, W, L)
        if cut:
            before = _outputs(y, rows, before, weights, shift, doc, t, T, start, d, D, W, L, SILU, HAS_BIAS, True)
        else:
            before = _outputs(y, rows, before, weights, shift, doc, t, T, start, d, D, W, L, SILU, HAS_BIAS, False)


@triton.jit(do_not_specialize=["T", "start", "run", "sdb"], do_not_specialize_on_alignment=["doc"])
def conv_gradients_kernel(
    x, dy, weight, bias, halo, doc, dx, dhalo, parts, T, start, run,
    sxb: tl.int64, sxt: tl.int64, syb: tl.int64, syt: tl.int64, sdb,
    D: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, L: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_HALO: tl.constexpr, HAS_DOC: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (D + BD - 1) // BD
    b = tl.program_id(1).to(tl.int64)
    d = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    part = (tl.program_id(0) // blocks).to(tl.int64)
    s = part * run
    x, dy, doc, dx = x + b * sxb, dy + b * syb, doc + b * sdb, dx + b * T * D
    halo, dhalo = halo + b * ((W - 1) * D), dhalo + b * ((W - 1) * D)
    weights, shift = _filters(weight, bias, d, D, W, HAS_BIAS)
    nothing = tl.zeros((BD,), tl.float32)
    dweight, open = (nothing,), ()
    for _ in tl.static_range(1, W):
        dweight, open = dweight + (nothing,), open + (nothing,)
    walk = (_before(x, halo, s, sxt, d, D, W, HAS_HALO), open, dweight, nothing)
    if HAS_HALO:  # noqa: SIM102
        if s == 0:  # dhalo is what the first tokens add to the gradients of those before them
            rows, grads = _rows(x, s, T, sxt, d, D, W - 1), _rows(dy, s, T, syt, d, D, W - 1)
            _gradients(
                dhalo + (W - 1) * D, rows, grads, walk, weights, shift, doc, s - (W - 1), s, T, start, d,
                D, W, W - 1, SILU, HAS_BIAS, HAS_DOC, False,
            )  # fmt: skip
    end = s + tl.cdiv(tl.minimum(run, T - s), L) * L
    for t in range(s, end, L):
        rows, grads = _rows(x, t, T, sxt, d, D, L), _rows(dy, t, T, syt, d, D, L)
        cut = False
        if HAS_DOC:
            cut = _cut(doc, t, T, start, W, L)
        if cut:
            walk = _gradients(
                dx, rows, grads, walk, weights, shift, doc, s, t, T, start, d, D, W, L, SILU, HAS_BIAS, True, True
            )
        else:
            walk = _gradients(
                dx, rows, grads, walk, weights, shift, doc, s, t, T, start, d, D, W, L, SILU, HAS_BIAS, False, True
            )
    rows, grads = _rows(x, end, T, sxt, d, D, W - 1), _rows(dy, end, T, syt, d, D, W - 1)
    walk = _gradients(
        dx, rows, grads, walk, weights, shift, doc, s, end, T, start, d, D, W, W - 1, SILU, HAS_BIAS, HAS_DOC, False
    )
    parts += (b * (tl.num_programs(0) // blocks) + part) * (D * W + D * HAS_BIAS)
    for j in tl.static_range(W):
        tl.store(parts + d * W + (W - 1 - j), walk[2][j], mask=d < D)
    if HAS_BIAS:
        tl.store(parts + D * W + d, walk[3], mask=d < D)


def takes(x_BTD: Tensor, weight_DW: Tensor) -> bool:
    """Whether there is a kernel for this width and dtype."""
    return weight_DW.shape[1] in WIDTHS and x_BTD.dtype in DTYPES and weight_DW.dtype in DTYPES


def refuse(x: Tensor, weight: Tensor, bias: Tensor | None, halo: Tensor | None) -> None:
    """Say what has no kernel here, and the way out."""
    if weight.shape[1] not in WIDTHS:
        raise ValueError(
            f"width {weight.shape[1]}: the Triton kernels have {WIDTHS} taps; pad the filter with zeros on the left, "
            f"or pass backend='torch'"
        )
    for name, tensor in {"x": x, "weight": weight, "bias": bias, "halo": halo}.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name} is {tensor.dtype}: the Triton kernels take bf16, fp16 and fp32; cast it, or pass "
                f"backend='torch'"
            )
    if x.shape[2] > 1 and x.stride(2) != 1:
        raise ValueError(
            f"x strides {list(x.stride())}: the Triton kernels read channels that lie one after another (any other "
            f"strides fit); pass x.contiguous(), or backend='torch'"
        )
    if x.shape[0] > ROWS:
        raise ValueError(f"B={x.shape[0]}: the Triton kernels take at most {ROWS} rows; split the batch")
    if not x.is_cuda and not isinstance(conv_kernel, InterpretedFunction):
        raise ValueError(
            f"backend='triton' on {x.device}: the kernels run on a GPU (or slowly anywhere, with TRITON_INTERPRET=1 "
            f"set before they are imported); move the inputs there, or pass backend='torch'"
        )


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, halo: Tensor | None, doc_start: Tensor | None, start: int,
    silu: bool,
) -> Tensor:  # fmt: skip
    """``y_BTD``; arguments as :func:`.conv.causal_conv1d` has checked them."""
    B, T, D = x.shape
    proof.require_kernels(x.device, _signature(x, weight, bias, halo, doc_start, silu))
    x = stepped(x)
    *tensors, doc_stride, constants = _arguments(FORWARD, x, weight, bias, halo, doc_start, silu)
    y = torch.empty((B, T, D), dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(D, constants["BD"]) * triton.cdiv(T, RUN), B)
    proof.launch(conv_kernel, grid, x, *tensors, y, T, start, *_strides(x), doc_stride, RUN=RUN, **constants)
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, halo: Tensor | None, doc_start: Tensor | None,
    start: int, silu: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """``(dx, dweight, dbias, dhalo)``, in the dtypes of what they are the gradients of."""
    B, T, D = x.shape
    W = weight.shape[1]
    # Autograd lays dy out as it likes: the gradient of a sum, say, is one number expanded.
    x, dy = stepped(x), stepped(dy.contiguous())
    *tensors, doc_stride, constants = _arguments(BACKWARD, x, weight, bias, halo, doc_start, silu)
    blocks = triton.cdiv(D, constants["BD"])
    run = max(RUN, triton.cdiv(T, max(1, PROGRAMS // (blocks * B))))
    run = L * triton.cdiv(run, L)
    runs = triton.cdiv(T, run)
    dx = torch.empty((B, T, D), dtype=x.dtype, device=x.device)
    dhalo = None if halo is None else torch.empty((B, W - 1, D), dtype=halo.dtype, device=x.device)
    parts = torch.empty((B * runs, D * W + (0 if bias is None else D)), dtype=torch.float32, device=x.device)
    proof.launch(
        conv_gradients_kernel, (blocks * runs, B),
        x, dy, *tensors, dx, dx if dhalo is None else dhalo, parts, T, start, run, *_strides(x), *_strides(dy),
        doc_stride, **constants,
    )  # fmt: skip
    sums = parts.sum(0)
    dweight = sums[: D * W].view(D, W).to(weight.dtype)
    return dx, dweight, None if bias is None else sums[D * W :].to(bias.dtype), dhalo


def _arguments(
    channels: int, x: Tensor, weight: Tensor, bias: Tensor | None, halo: Tensor | None, doc_start: Tensor | None,
    silu: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """What both kernels are given: weight, bias, halo, doc_start (x for those that are not), its stride, constants."""
    B, _, D = x.shape
    constants = {
        **{"D": D, "W": weight.shape[1], "BD": min(32 * WARPS * channels, triton.next_power_of_2(D)), "L": L},
        **{"SILU": silu, "HAS_BIAS": bias is not None, "HAS_HALO": halo is not None},
        **{"HAS_DOC": doc_start is not None, "num_warps": WARPS, "num_stages": 1},
    }
    doc = x
    if doc_start is not None:
        doc = doc_start if doc_start.stride(1) == 1 else doc_start.contiguous()
    return (
        aligned(weight),
        x if bias is None else aligned(bias),
        x if halo is None else aligned(halo),
        doc,
        doc.stride(0) if B > 1 else 0,
        constants,
    )


def _signature(
    x: Tensor, weight: Tensor, bias: Tensor | None, halo: Tensor | None, doc_start: Tensor | None, silu: bool
) -> Conv:
    bias_dtype, halo_dtype, documents = (None if t is None else t.dtype for t in (bias, halo, doc_start))
    D, W = weight.shape
    return Conv(x.dtype, weight.dtype, bias_dtype, halo_dtype, documents, D, W, silu)


def _strides(x: Tensor) -> tuple[int, int]:
    """Of rows and tokens; where there is one of them, its stride is nobody's, and 0."""
    return (x.stride(0) if x.shape[0] > 1 else 0), (x.stride(1) if x.shape[1] > 1 else 0)
