"""The causal depthwise convolution before a delta-rule layer: tap by tap, inside documents, cut anywhere.

    z_t = bias + sum_{j < W, t-j >= doc_start_t} weight[:, W-1-j] * x_{t-j}        y_t = activation(z_t)

Taps are summed one by one, oldest first, so an output's bits depend on its own W inputs alone: not on how the sequence
is cut into intervals, nor on what stands in another document. Library convolutions promise neither. Here are the
elementwise passes that run anywhere; on a GPU :mod:`.triton_conv` takes one launch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import operators
from .backend import Backend, choose_fitting
from .checks import check_floating

BLOCK = 1 << 16  # elements

Activation = Literal["silu"] | None


def causal_conv1d(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None = None,
    *,
    activation: Activation = "silu",
    doc_start_BT: Tensor | None = None,
    start: int = 0,
    halo_BWD: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Causal depthwise convolution of one interval: ``y_BTD`` in x's dtype, summed in fp32 (fp64 for fp64).

    Args:
        x_BTD: the interval's tokens; the first of them is token ``start`` of the sequence.
        weight_DW: one filter of width W a channel, the current token's tap last (nn.Conv1d's without its middle axis).
        bias_D: one number a channel, or None.
        activation: ``"silu"``, or None for none.
        doc_start_BT: global index of the first token of each token's document, int32 or int64, never falling along a
            row. Below 0, the document began before token 0 and the whole halo belongs to it. None: one document.
        start: global index of ``x_BTD[:, 0]``.
        halo_BWD: the W-1 tokens before the interval, ``[B, W-1, D]``. None: nothing is there, which needs start 0.
        backend: ``"torch"`` operations, or Triton's kernels, ``"triton"``, which read x where it lies: any strides of
            rows and tokens, channels one after another. None: on a GPU Triton for the widths 2 to 4 in bf16, fp16 and
            fp32, torch for what has no kernel (other widths, fp64), and torch elsewhere, or everywhere where the
            environment's DNSP_DELTA_RULE is ``torch``.

    Differentiable in x, weight, bias and halo. Raises ValueError or TypeError where shapes, dtypes, devices or options
    do not fit.
    """
    _check(x_BTD, weight_DW, bias_D, activation, doc_start_BT, start, halo_BWD)
    chosen = _backend(backend, x_BTD, weight_DW, bias_D, halo_BWD)
    return _CausalConv.apply(x_BTD, weight_DW, bias_D, halo_BWD, doc_start_BT, start, activation, chosen)


def _backend(asked: str | None, x: Tensor, weight: Tensor, bias: Tensor | None, halo: Tensor | None) -> Backend:
    """What was asked for, or what fits; refuses what has no kernel."""
    if choose_fitting(asked, x) == "torch":
        return "torch"
    from . import triton_conv

    if asked is None and not triton_conv.takes(x, weight):
        return "torch"
    triton_conv.refuse(x, weight, bias, halo)
    return "triton" if x.numel() else "torch"  # nothing to launch


def silu(z: Tensor) -> Tensor:
    """``z * sigmoid(z)``, written out: on CPU, F.silu gives the last elements of an array other bits than the rest."""
    return z / torch.exp(-z).add_(1)


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        halo: Tensor | None,
        doc_start: Tensor | None,
        start: int,
        activation: Activation,
        backend: Backend,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, halo, doc_start)
        ctx.start, ctx.activation, ctx.backend = start, activation, backend
        if backend == "triton":
            return operators.conv(x, weight, bias, halo, doc_start, start, activation == "silu")
        width, y = weight.shape[1], torch.empty_like(x)
        extended, taps = _with_halo(x, halo, width), _taps(doc_start, start, width)
        for a, b in _blocks(x):
            z = convolve(extended[:, a : b + width - 1], weight, bias, _part(taps, a, b))
            y[:, a:b] = silu(z) if activation == "silu" else z
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, halo, doc_start = ctx.saved_tensors
        if ctx.backend == "triton":
            silu = ctx.activation == "silu"
            grads = operators.conv_backward(dy, x, weight, bias, halo, doc_start, ctx.start, silu)
            return *grads, None, None, None, None
        width = weight.shape[1]
        extended, taps = _with_halo(x, halo, width), _taps(doc_start, ctx.start, width)
        dextended = torch.zeros_like(extended)
        dweight_WD = extended.new_zeros(width, x.shape[2])
        dbias = extended.new_zeros(x.shape[2])
        for a, b in _blocks(x):
            here, seen = extended[:, a : b + width - 1], _part(taps, a, b)
            dz = dy[:, a:b].to(extended.dtype)
            if ctx.activation == "silu":  # z is cheaper to make again than to keep
                z = convolve(here, weight, bias, seen)
                sigmoid = torch.exp(-z).add_(1).reciprocal_()
                dz = dz * sigmoid * (1 + z * (1 - sigmoid))
            dbias += dz.sum((0, 1))
            for i in range(width):
                dtap = _select(seen[i], dz)
                dextended[:, a + i : b + i] += dtap * weight[:, i].to(dz.dtype)
                dweight_WD[i] += (_select(seen[i], here[:, i : i + b - a]) * dtap).sum((0, 1))
        return (
            dextended[:, width - 1 :].to(x.dtype),
            dweight_WD.mT.to(weight.dtype),
            None if bias is None else dbias.to(bias.dtype),
            None if halo is None else dextended[:, : width - 1].to(halo.dtype),
            *[None] * 4,
        )


def _blocks(x: Tensor) -> Iterator[tuple[int, int]]:
    """Runs of tokens whose intermediate results fit a core's cache; a GPU takes all at once."""
    tokens = x.shape[1]
    step = tokens if x.is_cuda else max(1, BLOCK // max(1, x.shape[0] * x.shape[2]))
    for a in range(0, tokens, max(step, 1)):
        yield a, min(a + step, tokens)


def _with_halo(x: Tensor, halo: Tensor | None, width: int) -> Tensor:
    """The tokens with the W-1 before them, in the dtype that sums are taken in: ``[B, W-1+T, D]``."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if halo is None:
        halo = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    return torch.cat([halo.to(dtype), x.to(dtype)], dim=1)


def _taps(doc_start: Tensor | None, start: int, width: int) -> list[Tensor | None]:
    """For filter position i, which tokens may see the token W-1-i before them: ``[B, T, 1]``, or None where all may."""
    if doc_start is None:
        return [None] * width
    position = torch.arange(start, start + doc_start.shape[1], device=doc_start.device)
    unbounded = doc_start < 0
    seen = [((position - (width - 1 - i) >= doc_start) | unbounded).unsqueeze(-1) for i in range(width - 1)]
    return [*seen, None]  # every token sees itself


def _part(taps: list[Tensor | None], a: int, b: int) -> list[Tensor | None]:
    return [None if seen is None else seen[:, a:b] for seen in taps]


def _select(seen: Tensor | None, value: Tensor) -> Tensor:
    return value if seen is None else torch.where(seen, value, 0)


def convolve(
    extended: Tensor, weight: Tensor, bias: Tensor | None, taps: Sequence[Tensor | None] | None = None
) -> Tensor:
    """The sum over the taps, before the activation: ``[B, W-1+T, D]`` to ``[B, T, D]``, in extended's dtype."""
    width = weight.shape[1]
    tokens = extended.shape[1] - width + 1
    weight = weight.to(extended.dtype)
    z = extended.new_zeros(())
    for i, seen in enumerate(taps or [None] * width):
        # Two roundings a tap: a fused multiply-add would not be used for every element alike.
        z = z + _select(seen, extended[:, i : i + tokens]) * weight[:, i]
    return z if bias is None else z + bias.to(z.dtype)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    doc_start: Tensor | None,
    start: int,
    halo: Tensor | None,
) -> None:
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[1] < 1:
        raise ValueError(f"x {list(x.shape)} and weight {list(weight.shape)}: give x as [B, T, D], weight as [D, W]")
    check_floating({"x": x, "weight": weight}, {"bias": bias, "halo": halo})
    batch, tokens, channels = x.shape
    if weight.shape[0] != channels:
        raise ValueError(
            f"weight {list(weight.shape)} has {weight.shape[0]} filters for {channels} channels; give [D, W]"
        )
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias {list(bias.shape)} must be [D] = [{channels}], or None")
    if activation not in ("silu", None):
        raise ValueError(f"activation {activation!r} is not known; give 'silu' or None")
    if doc_start is not None and doc_start.shape != (batch, tokens):
        raise ValueError(f"doc_start {list(doc_start.shape)} must be [B, T] = [{batch}, {tokens}], one entry a token")
    if doc_start is not None and doc_start.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"doc_start is {doc_start.dtype}: token indices are int32 or int64; cast it")
    wanted = (batch, weight.shape[1] - 1, channels)
    if halo is not None and halo.shape != wanted:
        raise ValueError(f"halo {list(halo.shape)} must be the W-1 tokens before the interval, {list(wanted)}")
    if not isinstance(start, int | torch.SymInt) or start < 0:
        raise ValueError(f"start={start}: it is the global index of the interval's first token, an integer from 0")
    if halo is None and start != 0:
        raise ValueError(
            f"start {start} without a halo: inside a sequence the W-1 tokens before an interval are needed"
        )
    for name, tensor in {"weight": weight, "bias": bias, "doc_start": doc_start, "halo": halo}.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: move all inputs to one device")
