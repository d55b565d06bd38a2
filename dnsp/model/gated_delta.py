"""The gated delta layer (Yang, Kautz and Hatamizadeh, arXiv:2412.06464) as Qwen3.5 builds it.

    q, k, v = silu(conv(W_qkv x))     beta = sigmoid(W_b x)     g = -exp(A_log) softplus(W_a x + dt_bias)
    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T      y = W_o (norm(S_t^T q_t) silu(W_z x))
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dnsp.config import ModelConfig
from dnsp.kernels import variants
from dnsp.kernels.decode import gated_delta_step
from dnsp.model.norm import GatedRMSNorm
from dnsp.model.rotary import Rotary
from dnsp.model.state import LayerState, conv_tail
from dnsp.parallel.delta_rule import begin_delta_rule
from dnsp.parallel.halo import causal_conv1d
from dnsp.parallel.plan import Plan

TIME_STEPS = 1e-3, 1e-1  # of which a token's is drawn at first, evenly by its log; its decay is exp(-A dt)


class GatedDelta(nn.Module):
    """x ``[B, T, D]`` to y ``[B, T, D]``. Parameters are named as in transformers' Qwen3.5 text model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.key_heads, self.value_heads = config.linear_num_key_heads, config.linear_num_value_heads
        self.key_dim, self.value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        self.scale = self.key_dim**-0.5
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        self.widths = (keys, keys, values)
        hidden, channels = config.hidden_size, 2 * keys + values
        self.conv_width = config.linear_conv_kernel_dim
        # holds the weight alone; the convolution itself knows documents and intervals, which nn.Conv1d does not
        self.conv1d = nn.Conv1d(channels, channels, self.conv_width, groups=channels, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(self.value_heads))
        self.A_log = nn.Parameter(torch.empty(self.value_heads))
        self.norm = GatedRMSNorm(self.value_dim, config.rms_norm_eps)
        self.in_proj_qkv = nn.Linear(hidden, channels, bias=False)
        self.in_proj_z = nn.Linear(hidden, values, bias=False)
        self.in_proj_b = nn.Linear(hidden, self.value_heads, bias=False)
        self.in_proj_a = nn.Linear(hidden, self.value_heads, bias=False)
        self.out_proj = nn.Linear(values, hidden, bias=False)

    def reset_parameters(self, std: float) -> None:
        for module in self.children():
            if isinstance(module, nn.Linear | nn.Conv1d):
                nn.init.normal_(module.weight, std=std)
        with torch.no_grad():
            # Both as the layer's authors draw them: a state is halved in a token, or in thousands. A dt_bias of ones,
            # which transformers and Megatron-LM begin with, forgets within a token at almost every A.
            self.A_log.uniform_(0.01, 16).log_()  # above zero, so that its log is finite
            dt = self.dt_bias.uniform_(*map(math.log, TIME_STEPS)).exp_()
            dt.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
        self.norm.reset_parameters()

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.split(self.widths, dim=-1)
        heads = (self.key_heads, self.key_dim)
        return q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, (self.value_heads, self.value_dim))

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log-decay and write strength per value head, fp32 whatever the weights are."""
        g = variants.softplus_decay(self.in_proj_a(x), self.A_log, self.dt_bias)
        return g, variants.learned_beta(self.in_proj_b(x))

    def _output_gate(self, x: Tensor) -> Tensor:
        return self.in_proj_z(x).unflatten(-1, (self.value_heads, self.value_dim))

    def _output(self, o: Tensor, z: Tensor) -> Tensor:
        return self.out_proj(self.norm(o, z).flatten(-2))

    def forward(self, x_BTD: Tensor, plan: Plan, rotary: Rotary | None, state: LayerState | None = None) -> Tensor:
        mixed = self.in_proj_qkv(x_BTD)
        qkv = causal_conv1d(mixed, self.conv1d.weight.squeeze(1), None, plan=plan, activation="silu")
        q, k, v = self._split(qkv)
        g, beta = self._gates(x_BTD)
        keep = state is not None
        scan = begin_delta_rule(q, k, v, g, beta, plan=plan, scale=self.scale, output_final_state=keep, l2norm=True)
        z = self._output_gate(x_BTD)  # while states travel
        o, S = scan.finish()
        if state is not None:
            state.S_BHKV = S
            state.conv_tail_BWD = conv_tail(mixed, plan.position_BT, self.conv_width)
        return self._output(o, z)

    def step(self, x_BD: Tensor, rotary: Rotary | None, mask: Tensor | None, state: LayerState) -> Tensor:
        """One token a row; the state is updated in place."""
        assert state.S_BHKV is not None and state.conv_tail_BWD is not None
        o = gated_delta_step(
            self.in_proj_qkv(x_BD),
            self.in_proj_a(x_BD),
            self.in_proj_b(x_BD),
            state.conv_tail_BWD,
            state.S_BHKV,
            weight_DW=self.conv1d.weight.squeeze(1),
            A_log_H=self.A_log,
            dt_bias_H=self.dt_bias,
            scale=self.scale,
        )
        return self._output(o, self._output_gate(x_BD))

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        shape = (batch, self.value_heads, self.key_dim, self.value_dim)
        return LayerState(
            position_B=torch.zeros(batch, dtype=torch.long, device=device),
            S_BHKV=torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=device),
            conv_tail_BWD=torch.zeros(batch, self.conv_width - 1, sum(self.widths), dtype=dtype, device=device),
        )
