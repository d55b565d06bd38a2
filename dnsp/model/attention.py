"""Gated softmax attention as Qwen3.5 builds it: grouped-query heads, normed queries and keys, partial rotary, and a
sigmoid gate on the output, which shares the query's projection (Qiu et al., arXiv:2505.06708)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnsp.config import ModelConfig
from dnsp.model.norm import RMSNorm
from dnsp.model.rotary import Rotary, rotate_both
from dnsp.model.state import LayerState
from dnsp.parallel.attention import attention
from dnsp.parallel.plan import Plan


class Attention(nn.Module):
    """x ``[B, T, D]`` to y ``[B, T, D]``. Parameters are named as in transformers' Qwen3.5 text model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.scale = self.head_dim**-0.5
        hidden = config.hidden_size
        self.q_proj = nn.Linear(hidden, self.heads * self.head_dim * 2, bias=False)  # per head: query, gate
        self.k_proj = nn.Linear(hidden, self.groups * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.groups * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, hidden, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def reset_parameters(self, std: float) -> None:
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.normal_(projection.weight, std=std)
        self.q_norm.reset_parameters()
        self.k_norm.reset_parameters()

    def _project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, gates ``[..., H, K]``, keys and values ``[..., G, K]``."""
        q, gate = self.q_proj(x).unflatten(-1, (self.heads, 2 * self.head_dim)).chunk(2, dim=-1)
        k = self.k_proj(x).unflatten(-1, (self.groups, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.groups, self.head_dim))
        q, k = rotate_both(self.q_norm(q), self.k_norm(k), rotary)
        return q, gate, k, v

    def _output(self, o: Tensor, gate: Tensor) -> Tensor:
        return self.o_proj((o * gate.sigmoid()).flatten(-2))

    def forward(self, x_BTD: Tensor, plan: Plan, rotary: Rotary | None, state: LayerState | None = None) -> Tensor:
        assert rotary is not None
        q, gate, k, v = self._project(x_BTD, rotary)
        o = attention(q, k, v, plan=plan, scale=self.scale)
        if state is not None:
            state.cache(k.transpose(1, 2), v.transpose(1, 2))
        return self._output(o, gate)

    def step(self, x_BD: Tensor, rotary: Rotary | None, mask: Tensor | None, state: LayerState) -> Tensor:
        """One token a row; its key and value join the cache. ``mask``: :meth:`LayerState.mask`."""
        assert rotary is not None and mask is not None
        q, gate, k, v = self._project(x_BD, rotary)
        keys, values = state.cache(k.unsqueeze(2), v.unsqueeze(2))
        # heads that share keys are queries of one head: kernels that take a mask do not take grouped heads
        o = F.scaled_dot_product_attention(
            q.unflatten(1, (self.groups, -1)), keys, values, attn_mask=mask, scale=self.scale
        )
        return self._output(o.flatten(1, 2), gate)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        empty = torch.zeros(batch, self.groups, 0, self.head_dim, dtype=dtype, device=device)
        return LayerState(
            position_B=torch.zeros(batch, dtype=torch.long, device=device), keys_BGTK=empty, values_BGTK=empty.clone()
        )
