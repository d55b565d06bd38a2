"""Linear attention against its quadratic form in fp64, and in bf16 where features are small."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dnsp.config import DeltaNetConfig, ModelConfig
from dnsp.model.linear_attention import LinearAttention
from dnsp.parallel.plan import local_plan

# |layer - truth| / |truth|, of outputs and of every gradient
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2}
TOKENS, STARTS, HIDDEN = 150, [[0], [0, 1, 90]], 32


def layer_and_input(offset: float, taps: int = 0) -> tuple[LinearAttention, torch.Tensor]:
    """With what ``elu`` is given about ``offset``: the first channel of the input is 1 everywhere."""
    torch.manual_seed(0)
    options = DeltaNetConfig(num_heads=2, conv_size=taps)
    layer = LinearAttention(ModelConfig(hidden_size=HIDDEN, deltanet=options)).double()
    layer.reset_parameters(HIDDEN**-0.5)
    x = torch.randn(len(STARTS), TOKENS, HIDDEN, dtype=torch.float64)
    x[..., 0] = 1
    with torch.no_grad():
        layer.q_proj.weight[:, 0] = layer.k_proj.weight[:, 0] = offset
    return layer, x


def quadratic(layer: LinearAttention, x: torch.Tensor) -> torch.Tensor:
    """Attention whose scores are phi(q) . phi(k), within documents."""

    parts = torch.cat([layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)], dim=-1)
    if layer.conv is not None:
        filters_D1W, rows = layer.conv.weight.unsqueeze(1), []
        for row_TD, starts in zip(parts, STARTS, strict=True):
            documents = [F.pad(d.T, (layer.conv.taps - 1, 0)) for d in row_TD.tensor_split(starts[1:])]
            rows.append(torch.cat([F.conv1d(d, filters_D1W, groups=len(d)) for d in documents], dim=1).T)
        parts = F.silu(torch.stack(rows))
    q, k, v = (part.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for part in parts.chunk(3, dim=-1))
    phi_q, phi_k = (torch.where(a > 0, a + 1, a.exp()) for a in (q, k))
    token = torch.arange(TOKENS)
    document = torch.stack([(token[:, None] >= torch.tensor(starts)).sum(1) for starts in STARTS])
    seen = (token[:, None] >= token) & (document[:, :, None] == document[:, None])
    scores = (phi_q @ phi_k.mT) * seen[:, None]
    o = (scores @ v) / (scores.sum(-1, keepdim=True) + layer.eps)
    return layer.out_proj(o.transpose(1, 2).flatten(-2))


@pytest.mark.parametrize(
    "offset, taps", [(0.0, 0), (-6.0, 0), (0.0, 3)], ids=["about 0", "far below 0", "with a convolution"]
)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_is_the_quadratic_form(dtype: torch.dtype, offset: float, taps: int) -> None:
    """-6: elu(x) + 1 is 0.002, of which bf16 keeps nothing beside 1."""
    layer, x = layer_and_input(offset, taps)
    layer.eps = 0.0  # not to be seen beside a denominator of any size
    x = x.to(dtype).double()  # the same input and weights for both
    layer.to(dtype).double()
    truth = quadratic(layer, x)
    dy = torch.randn_like(truth)
    wanted = torch.autograd.grad((truth * dy).sum(), list(layer.parameters()))
    layer.to(dtype)
    y = layer(x.to(dtype), local_plan(STARTS, TOKENS, segment_tokens=64), None)
    found = torch.autograd.grad((y * dy.to(dtype)).sum(), list(layer.parameters()))
    for name, ours, theirs in zip(("o", *dict(layer.named_parameters())), (y, *found), (truth, *wanted), strict=True):
        error = ((ours.double() - theirs).norm() / theirs.norm()).item()
        assert error < TOLERANCE[dtype], (name, error)
