"""Linear attention (Katharopoulos et al., arXiv:2006.16236), the delta rule without its erase, for comparison with it.

    S_t = S_{t-1} + phi(k_t) v_t^T   D_t = D_{t-1} + phi(k_t)   o_t = S_t^T phi(q_t) / (phi(q_t) . D_t)   phi = elu + 1
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dnsp.config import ModelConfig
from dnsp.kernels import variants
from dnsp.kernels.decode import delta_step, normaliser_step
from dnsp.model.deltanet import head_dim, key_sum_product
from dnsp.model.norm import at_least_fp32
from dnsp.model.rotary import Rotary
from dnsp.model.short_conv import ShortConvolution
from dnsp.model.state import LayerState
from dnsp.parallel.delta_rule import delta_rule
from dnsp.parallel.plan import Plan


class LinearAttention(nn.Module):
    """x ``[B, T, D]`` to y ``[B, T, D]``; heads, widths and convolution as in ``deltanet``: states of equal size."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.key_dim = config.deltanet.num_heads, head_dim(config)
        self.value_dim = config.deltanet.value_head_dim or self.key_dim
        self.eps = config.deltanet.denominator_eps
        hidden, keys, values = config.hidden_size, self.heads * self.key_dim, self.heads * self.value_dim
        self.q_proj = nn.Linear(hidden, keys, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, values, bias=False)
        taps = config.deltanet.conv_size
        self.conv = ShortConvolution((keys, keys, values), taps) if taps else None
        self.out_proj = nn.Linear(values, hidden, bias=False)

    def reset_parameters(self, std: float) -> None:
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.normal_(projection.weight, std=std)
        if self.conv is not None:
            self.conv.reset_parameters()

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def _features(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Positive queries and keys, values, and the write strength, which is 1."""
        q = positive(parts[0]).unflatten(-1, (self.heads, self.key_dim))
        k = positive(parts[1]).unflatten(-1, (self.heads, self.key_dim))
        v = parts[2].unflatten(-1, (self.heads, self.value_dim))
        return q, k, v, torch.ones_like(at_least_fp32(v[..., 0]))

    def forward(self, x_BTD: Tensor, plan: Plan, rotary: Rotary | None, state: LayerState | None = None) -> Tensor:
        parts = self._project(x_BTD)
        if self.conv is not None:
            parts = self.conv(parts, plan, state)
        q, k, v, beta = self._features(parts)
        keep = state is not None
        o, S = delta_rule(
            q, k, v, None, beta, plan=plan, scale=1.0, output_final_state=keep, rule=variants.LINEAR_ATTENTION
        )
        qD, key_sum = key_sum_product(q, k, plan, keep)
        if state is not None:
            state.S_BHKV, state.key_sum_BHK = S, key_sum
        return self.out_proj(variants.normalise_output(o, qD, self.eps).flatten(-2))

    def step(self, x_BD: Tensor, rotary: Rotary | None, mask: Tensor | None, state: LayerState) -> Tensor:
        """One token a row; the state is updated in place."""
        assert state.S_BHKV is not None and state.key_sum_BHK is not None
        parts = self._project(x_BD)
        if self.conv is not None:
            parts = self.conv.step(parts, state)
        q, k, v, beta = self._features(parts)
        o = delta_step(q, k, v, None, beta, state.S_BHKV, scale=1.0, rule=variants.LINEAR_ATTENTION)
        qD = normaliser_step(q, k, state.key_sum_BHK)
        return self.out_proj(variants.normalise_output(o, qD, self.eps).flatten(-2))

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        shape = (batch, self.heads, self.key_dim, self.value_dim)
        S = torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=device)
        return LayerState(
            position_B=torch.zeros(batch, dtype=torch.long, device=device),
            S_BHKV=S,
            conv_tail_BWD=None if self.conv is None else self.conv.empty_tail(batch, device, dtype),
            key_sum_BHK=torch.zeros_like(S[..., 0]),
        )


def positive(x: Tensor) -> Tensor:
    """``elu(x) + 1``, in x's dtype.

    Below zero that is ``exp(x)``, and has to be taken so: bf16 keeps of ``elu(x) + 1`` what it has beside 1, which is 0
    from -6 down. A query of zeros has a denominator of ``eps`` alone, by which its gradient is divided.
    """
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp()).to(x.dtype)
