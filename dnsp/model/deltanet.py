"""The layer of the document "DeltaNet: Gated Delta Rule for Sequence Modeling", each of its options by its name there.

    S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1} k_t)      D_t = D_{t-1} + k_t      o_t = q_t S_t  [ / (q_t D_t + eps) ]
    forget gate: S_t = f_t S_{t-1} + beta_t k_t (v_t - S_{t-1} k_t)              y_t = W_out (o_t  [ * silu(W_g x_t) ])

``conv_size``, which the document does not have, is the short convolution of the published layer (Yang et al.,
arXiv:2406.06484): q, k, v = silu(conv(W x)), before they are normalised. Linear attention takes it from here, too.

As the document writes it the layer can diverge (:func:`divergence`). The default is the scaled form: keys and
normalised queries of norm 1 (1e-6 beside their square, under the root), whatever the gains of ``q_norm`` and ``k_norm``
become.
"""

from __future__ import annotations

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnsp.config import DeltaNetConfig, ModelConfig
from dnsp.kernels import variants
from dnsp.kernels.decode import delta_step, normaliser_step
from dnsp.kernels.norm import l2norm
from dnsp.model.norm import RMSNorm
from dnsp.model.rotary import Rotary
from dnsp.model.short_conv import ShortConvolution
from dnsp.model.state import LayerState
from dnsp.parallel.delta_rule import begin_delta_rule, delta_rule
from dnsp.parallel.plan import Plan


class DeltaNet(nn.Module):
    """x ``[B, T, D]`` to y ``[B, T, D]``, with H heads of keys K and values V wide."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        options = config.deltanet
        for reason in divergence(options, head_dim(config)):
            _warn_once(reason)
        self.options = options
        self.heads, self.key_dim = options.num_heads, head_dim(config)
        self.value_dim = options.value_head_dim or self.key_dim
        self.rule = variants.FORGET_GATE if options.forget_gate else variants.DELTA
        # by the rule itself, in its kernels, where it is both that are normalised and nothing else reads them
        self.l2 = options.qk_norm == "l2" or options.scaled
        self.l2_in_rule = self.l2 and options.normalise == "qk" and not options.denominator
        hidden, keys, values = config.hidden_size, self.heads * self.key_dim, self.heads * self.value_dim
        self.q_proj = nn.Linear(hidden, keys, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, values, bias=False)
        self.conv = ShortConvolution((keys, keys, values), options.conv_size) if options.conv_size else None
        if options.use_beta_gate:
            self.beta_proj = nn.Linear(hidden, self.heads, bias=False)
        elif options.train_beta:
            self.beta = nn.Parameter(torch.empty(self.heads))
        if options.use_output_gate:
            self.g_proj = nn.Linear(hidden, values, bias=False)
        if options.forget_gate:
            self.f_proj = nn.Linear(hidden, self.heads, bias=False)
        if options.qk_norm == "rms" and options.normalise == "qk":
            self.q_norm = RMSNorm(self.key_dim, config.rms_norm_eps, zero_centred=False)
        if options.qk_norm == "rms" and options.normalise != "none":
            self.k_norm = RMSNorm(self.key_dim, config.rms_norm_eps, zero_centred=False)
        self.out_proj = nn.Linear(values, hidden, bias=False)

    def reset_parameters(self, std: float) -> None:
        """The document's own initialisation, whatever the rest of the model uses."""
        del std
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(projection.weight)
        if self.conv is not None:
            self.conv.reset_parameters()
        if self.options.use_beta_gate:
            # sigmoid(0) = 0.5. The document also zeroes beta_proj.bias, which its bias-free projection does not have.
            nn.init.zeros_(self.beta_proj.weight)
        elif self.options.train_beta:
            nn.init.constant_(self.beta, self.options.beta_init)
        if self.options.use_output_gate:
            nn.init.xavier_uniform_(self.g_proj.weight)
        if self.options.forget_gate:
            nn.init.xavier_uniform_(self.f_proj.weight)  # not in the document; as its other projections
        nn.init.xavier_uniform_(self.out_proj.weight)
        with torch.no_grad():
            self.out_proj.weight.mul_(0.5)
        for name in ("q_norm", "k_norm"):
            if hasattr(self, name):
                getattr(self, name).reset_parameters()

    def _normalise(self, x: Tensor, norm: str) -> Tensor:
        if self.options.qk_norm == "rms":
            x = getattr(self, norm)(x)
        return l2norm(x) if self.l2 and not self.l2_in_rule else x

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def _queries_keys_values(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """``[..., H, K]`` twice and ``[..., H, V]``, normalised, of the projections or the convolution's outputs."""
        q = parts[0].unflatten(-1, (self.heads, self.key_dim))
        k = parts[1].unflatten(-1, (self.heads, self.key_dim))
        v = parts[2].unflatten(-1, (self.heads, self.value_dim))
        if self.options.normalise == "qk":
            q = self._normalise(q, "q_norm")
        if self.options.normalise != "none":
            k = self._normalise(k, "k_norm")
        return q, k, v

    def _gates(self, x: Tensor, v: Tensor, position_BT: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Values, log-decay (None: none) and write strength ``[B, T, H]``, the latter two at least fp32."""
        options = self.options
        if options.use_beta_gate:
            beta = variants.learned_beta(self.beta_proj(x), options.beta_cap)
        elif options.train_beta:
            beta = variants.fixed_beta(self.beta, *position_BT.shape)
        else:
            fixed = x.new_full((self.heads,), options.beta_init, dtype=torch.promote_types(x.dtype, torch.float32))
            beta = variants.fixed_beta(fixed, *position_BT.shape)
        g = variants.forget_gate(self.f_proj(x)) if options.forget_gate else None
        if options.decay_every:
            reset = variants.periodic_decay(
                torch.zeros_like(beta), position_BT, self.heads, options.decay_every, options.decay_factor
            )
            if g is None:
                return v, reset, beta
            # The error is taken before the forget gate but after the reset r: r beta k (v/r - S k) = beta k (v - r S k)
            v, beta, g = v * (-reset).exp().unsqueeze(-1).to(v.dtype), beta * reset.exp(), g + reset
        return v, g, beta

    def _output_gate(self, x: Tensor) -> Tensor | None:
        return F.silu(self.g_proj(x)) if self.options.use_output_gate else None

    def _output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        o = o.flatten(-2)
        return self.out_proj(o if gate is None else o * gate)

    def forward(self, x_BTD: Tensor, plan: Plan, rotary: Rotary | None, state: LayerState | None = None) -> Tensor:
        parts = self._project(x_BTD)
        if self.conv is not None:
            parts = self.conv(parts, plan, state)
        q, k, v = self._queries_keys_values(parts)
        v, g, beta = self._gates(x_BTD, v, plan.position_BT)
        keep = state is not None
        scan = begin_delta_rule(
            q, k, v, g, beta, plan=plan, scale=1.0, output_final_state=keep, rule=self.rule, l2norm=self.l2_in_rule
        )
        gate = self._output_gate(x_BTD)  # while states travel
        o, S = scan.finish()
        key_sum = None
        if self.options.denominator:
            qD, key_sum = key_sum_product(q, k, plan, keep)
            o = variants.normalise_output(o, qD, self.options.denominator_eps)
        if state is not None:
            state.S_BHKV, state.key_sum_BHK = S, key_sum
        return self._output(o, gate)

    def step(self, x_BD: Tensor, rotary: Rotary | None, mask: Tensor | None, state: LayerState) -> Tensor:
        """One token a row; the state is updated in place."""
        assert state.S_BHKV is not None
        x_B1D = x_BD.unsqueeze(1)
        parts = self._project(x_BD)
        if self.conv is not None:
            parts = self.conv.step(parts, state)
        q, k, v = (part.unsqueeze(1) for part in self._queries_keys_values(parts))
        v, g, beta = self._gates(x_B1D, v, state.position_B.unsqueeze(1))
        q, k, v, beta = (part.squeeze(1) for part in (q, k, v, beta))
        g = None if g is None else g.squeeze(1)
        o = delta_step(q, k, v, g, beta, state.S_BHKV, scale=1.0, rule=self.rule, l2norm=self.l2_in_rule)
        if state.key_sum_BHK is not None:
            o = variants.normalise_output(o, normaliser_step(q, k, state.key_sum_BHK), self.options.denominator_eps)
        return self._output(o, self._output_gate(x_BD))

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        shape = (batch, self.heads, self.key_dim, self.value_dim)
        S = torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=device)
        return LayerState(
            position_B=torch.zeros(batch, dtype=torch.long, device=device),
            S_BHKV=S,
            conv_tail_BWD=None if self.conv is None else self.conv.empty_tail(batch, device, dtype),
            key_sum_BHK=torch.zeros_like(S[..., 0]) if self.options.denominator else None,
        )


def head_dim(config: ModelConfig) -> int:
    """The key width of ``deltanet`` and ``linear_attention`` heads."""
    return config.deltanet.head_dim or config.hidden_size // config.deltanet.num_heads


def key_sum_product(q_BTHK: Tensor, k_BTHK: Tensor, plan: Plan, keep: bool) -> tuple[Tensor, Tensor | None]:
    """``q_t . D_t`` ``[B, T, H]``, ``D_t`` the sum of the document's keys so far; the last D ``[B, H, K]`` if kept."""
    arguments = variants.normaliser(q_BTHK)
    v, g, beta = (arguments[name] for name in ("v_BTHV", "g_BTH", "beta_BTH"))
    qD, key_sum = delta_rule(
        q_BTHK, k_BTHK, v, g, beta, plan=plan, scale=arguments["scale"], rule=arguments["rule"], output_final_state=keep
    )
    return qD.squeeze(-1), None if key_sum is None else key_sum.squeeze(-1)


def divergence(options: DeltaNetConfig, head_dim: int) -> list[str]:
    """Why a layer with these options can diverge, in words; empty where it cannot."""
    reasons = []
    if options.normalise == "none":
        reasons.append(
            "deltanet.normalise=none: keys of any norm make the erase factor 1 - beta |k|^2 of any size, and the state "
            "grows without bound where it is below -1; deltanet.normalise=qk with deltanet.scaled=true keeps |k| = 1"
        )
    elif options.qk_norm == "rms" and not options.scaled:
        reasons.append(
            f"deltanet.qk_norm=rms with deltanet.scaled=false: RMSNorm gives |k|^2 = head_dim = {head_dim}, so the "
            f"erase factor is 1 - beta * {head_dim}, and the state grows without bound where beta > {2 / head_dim:g}; "
            "deltanet.scaled=true keeps |k| = 1"
        )
    if options.denominator:
        reasons.append(
            "deltanet.denominator=true: q D may pass through zero, and the output is then as large as it comes out; "
            "deltanet.denominator=false leaves it out"
        )
    return reasons


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(reason, stacklevel=3)
