"""The feed-forward half of a layer: SwiGLU (Shazeer, arXiv:2002.05202), and its block taken tile by tile.

The intermediate activations are the widest of a model: gate, up and their product of 131,072 tokens by 5,632 channels
are 4 GiB in bf16. A token's feed-forward depends on that token alone, so a tile of tokens goes through it whole, and
through it once more in the backward pass (Bekman et al., Arctic Long Sequence Training, arXiv:2506.13996).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dnsp.model import liger
from dnsp.products import add_product, product_dtype


class MLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def reset_parameters(self, std: float) -> None:
        for projection in (self.gate_proj, self.up_proj, self.down_proj):
            nn.init.normal_(projection.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def feed_forward_tiled(x: Tensor, norm: nn.Module, mlp: MLP, tile: int) -> Tensor:
    """``x + mlp(norm(x))``, ``tile`` tokens at a time; nothing but x is kept for the backward pass.

    x ``[..., D]``; norm acts on the last axis. Every token's numbers are those of the plain expression, but for the
    shapes that matrix products are given. Gradients of weights are summed over tiles in fp32 (fp64 for fp64) and
    rounded to the weights' dtype once; on a CPU each tile's share is rounded too.
    """
    weights = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
    return _FeedForward.apply(x, norm, tile, *weights, *norm.parameters())


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.Module, tile: int, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x, *parameters)
        device, dtype = x.device.type, product_dtype(x)
        ctx.norm, ctx.tile, ctx.dtype, ctx.autocast = norm, tile, dtype, torch.is_autocast_enabled(device)
        gate_w, up_w, down_w = (weight.to(dtype) for weight in parameters[:3])
        rows = x.flatten(0, -2)
        y = torch.empty_like(rows)
        for part in _tiles(len(rows), tile):
            n = norm(rows[part]).to(dtype)
            torch.add(rows[part], swiglu(n @ gate_w.T, n @ up_w.T) @ down_w.T, out=y[part])
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, *parameters = ctx.saved_tensors
        dtype, rows, grad = ctx.dtype, x.flatten(0, -2), dy.flatten(0, -2)
        gate_w, up_w, down_w = (weight.to(dtype) for weight in parameters[:3])
        exact = torch.promote_types(dtype, torch.float32)
        dparameters = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, exact)) for p in parameters]
        dgate_w, dup_w, ddown_w, *dnorm = dparameters
        dx = torch.empty_like(rows)
        names = [name for name, _ in ctx.norm.named_parameters()]
        # copies of the norm's own: hooks on parameters see their gradient once, when all tiles are summed
        own = dict(zip(names, (p.detach().requires_grad_() for p in parameters[3:]), strict=True))
        with torch.autocast(x.device.type, dtype, enabled=ctx.autocast):
            for part in _tiles(len(rows), ctx.tile):
                with torch.enable_grad():
                    tile = rows[part].detach().requires_grad_()
                    normed = torch.func.functional_call(ctx.norm, own, (tile,))
                n, dout = normed.detach().to(dtype), grad[part].to(dtype)
                gate, up = n @ gate_w.T, n @ up_w.T
                add_product(ddown_w, dout.T, swiglu(gate, up))
                dgate, dup = swiglu_backward(dout @ down_w, gate, up)
                add_product(dgate_w, dgate.T, n)
                add_product(dup_w, dup.T, n)
                dn = (dgate @ gate_w + dup @ up_w).to(normed.dtype)
                dtile, *shares = torch.autograd.grad(normed, [tile, *own.values()], dn)
                torch.add(grad[part], dtile, out=dx[part])
                for total, share in zip(dnorm, shares, strict=True):
                    total += share
        grads = (total.to(p.dtype) for total, p in zip(dparameters, parameters, strict=True))
        return dx.view(x.shape), None, None, *grads


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``."""
    return liger.swiglu(gate, up) if liger.takes(gate) else F.silu(gate) * up


def swiglu_backward(dact: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, which may be overwritten."""
    if liger.takes(gate):
        return liger.swiglu_backward(dact, gate, up)
    return torch.ops.aten.silu_backward(dact * up, gate), dact * F.silu(gate)


def _tiles(tokens: int, tile: int) -> list[slice]:
    return [slice(start, min(start + tile, tokens)) for start in range(0, tokens, tile)]
