"""Causal convolution over a sequence group: each interval is lent the last W-1 tokens of the interval before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dnsp.kernels import kept
from dnsp.kernels.conv import Activation
from dnsp.kernels.conv import causal_conv1d as kernels_conv

from .plan import Plan


def causal_conv1d(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None = None,
    *,
    plan: Plan,
    activation: Activation = "silu",
) -> Tensor:
    """``kernels.conv.causal_conv1d`` over this rank's tokens, ``[B, T, D]`` with T = ``plan.local_tokens``.

    Outputs have the bits of one process. So have the gradients of x, all but those of the last W-1 tokens before a cut,
    whose sums over taps are split between two ranks. Every rank of the sequence group calls it together.

    Raises: ValueError where shapes do not fit; PeerLost where a rank is gone.
    """
    if x_BTD.dim() != 3 or x_BTD.shape[1] != plan.local_tokens:
        raise ValueError(
            f"x{list(x_BTD.shape)}: expected [B, T, D] with T={plan.local_tokens}, the plan's local tokens"
        )
    size, width = plan.layout.interval_tokens, weight_DW.shape[-1] - 1
    if width > size and plan.layout.count > 1:
        raise ValueError(
            f"a convolution of {width + 1} taps reaches beyond an interval of {size} tokens: use fewer ranks or longer "
            f"sequences"
        )
    halo_NBWD = _Halo.apply(x_BTD, width, plan) if width > 0 and plan.layout.count > 1 else None
    outputs = []
    for n, (start, stop) in enumerate(plan.spans):
        first = plan.intervals[n][0]
        outputs.append(
            kernels_conv(
                x_BTD[:, start:stop],
                weight_DW,
                bias_D,
                activation=activation,
                doc_start_BT=plan.doc_start_BT[:, start:stop],
                start=first,
                # zeros before token 0, given all the same: every rank must take part in the halos' backward
                halo_BWD=None if halo_NBWD is None else halo_NBWD[n],
            )
        )
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


class _Halo(torch.autograd.Function):
    """x ``[B, T, D]`` -> the ``width`` tokens before each local interval, ``[N, B, width, D]``; zero before token 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, width: int, plan: Plan) -> Tensor:
        ctx.plan, ctx.shape = plan, x.shape
        tails = [x[:, stop - width : stop] for _, stop in plan.spans]
        return kept.once(lambda: _shift(tails, plan, 1)).detach()  # what is kept stays free of this graph

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhalo: Tensor) -> tuple[Tensor, None, None]:
        plan: Plan = ctx.plan
        dtails = _shift(list(dhalo), plan, -1)
        dx = dhalo.new_zeros(ctx.shape)
        for n, (_, stop) in enumerate(plan.spans):
            dx[:, stop - dtails.shape[2] : stop] = dtails[n]
        return dx, None, None


def _shift(parts: list[Tensor], plan: Plan, step: int) -> Tensor:
    """Every interval's part handed to the interval ``step`` places further (1 or -1); what comes in, stacked, zeros at
    the end from which nothing comes."""
    layout, rank = plan.layout, plan.rank
    mine = layout.indices(rank)
    arriving = torch.zeros(len(parts), *parts[0].shape, dtype=parts[0].dtype, device=parts[0].device)
    sends, receives = [], []
    for n, interval in enumerate(mine):
        to, source = interval + step, interval - step
        if 0 <= to < layout.count and layout.owner(to) != rank:
            sends.append((layout.owner(to), parts[n].contiguous()))
        if 0 <= source < layout.count:
            if layout.owner(source) == rank:
                arriving[n] = parts[mine.index(source)]
            else:
                receives.append((layout.owner(source), arriving[n]))
    way = "forward" if step == 1 else "backward"
    _, B, width, D = arriving.shape
    plan.comm.first("a convolution's halo", arriving, way, plan.layer, rows=B, tokens=width, channels=D)
    size = arriving[0].numel() * arriving.element_size()
    mail = plan.mail(plan.scan.kind if layout.ranks > 1 else "", arriving, size)
    plan.comm.calls += mail is not plan.comm
    mail.exchange(sends, receives, plan.named(f"the convolution's halo exchange ({way})")).wait()
    return arriving
