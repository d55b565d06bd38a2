"""The ``deltanet`` layer against its document's own update, token by token, for each of its options."""

from __future__ import annotations

import math
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from dnsp.config import DeltaNetConfig, ModelConfig
from dnsp.model import deltanet
from dnsp.model.decoder import Decoder, DecoderLayer
from dnsp.model.deltanet import DeltaNet
from dnsp.model.state import advance
from dnsp.parallel.plan import local_plan

# |layer - document| / |document|, of every token by itself and of every gradient
TOLERANCE = {"fp64": 1e-10, "fp64 gradient": 1e-9, "fp32": 1e-5, "F.normalize": 2e-6, "step": 1e-11}
L2_EPS = 1e-6  # beside |k|^2, under the root; the document's F.normalize has 1e-12 as the least norm

TOKENS, STARTS = 150, [[0], [0, 1, 90]]  # 90 tokens in a document: past a chunk of 64
HIDDEN = 24

OPTIONS = {
    "default": {},
    "rms": {"qk_norm": "rms"},
    "k alone": {"normalise": "k"},
    "k alone, rms": {"qk_norm": "rms", "normalise": "k"},
    "a beta a head": {"use_beta_gate": False, "beta_init": 0.4},
    "a fixed beta": {"use_beta_gate": False, "train_beta": False, "beta_init": 0.4},
    "beta capped": {"beta_cap": 0.5},
    "no output gate": {"use_output_gate": False},
    "short convolution": {"conv_size": 4},
    "forget gate": {"forget_gate": True},
    "denominator": {"denominator": True},
    "periodic decay": {"decay_every": 7, "decay_factor": 0.6},
    "forget gate and periodic decay": {"forget_gate": True, "decay_every": 7, "decay_factor": 0.6},
    "values wider than keys": {"head_dim": 8, "value_head_dim": 12},
    "as written": {"qk_norm": "rms", "scaled": False, "denominator": True},
    "as written, no norm": {"normalise": "none", "scaled": False},
    "as written, k alone": {"qk_norm": "rms", "normalise": "k", "scaled": False, "beta_cap": 0.5},
    "everything": {
        "qk_norm": "rms",
        "use_beta_gate": False,
        "forget_gate": True,
        "denominator": True,
        "decay_every": 5,
        "value_head_dim": 16,
        "conv_size": 3,
    },
}


def config_with(**options) -> ModelConfig:
    return ModelConfig(
        vocab_size=31,
        hidden_size=HIDDEN,
        intermediate_size=40,
        num_hidden_layers=1,
        pattern=["deltanet"],
        deltanet=DeltaNetConfig(num_heads=2, **options),
    )


def layer_with(dtype: torch.dtype, **options) -> DeltaNet:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = DeltaNet(config_with(**options))
    torch.manual_seed(0)
    layer.reset_parameters(0.02)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if parameter.dim() == 1 or name == "beta_proj.weight":  # away from the values that make them invisible
                parameter += 0.2 * torch.randn_like(parameter)
    return layer.to(dtype)


def from_the_document(
    layer: DeltaNet, x_BTD: torch.Tensor, starts: list[list[int]], l2_eps: float = L2_EPS
) -> torch.Tensor:
    """Its forward_recurrent with its variations, one token of one row at a time, state anew for every document."""
    o = layer.options
    weight = {n: p.to(x_BTD.dtype) for n, p in layer.named_parameters()}

    def norm(head: torch.Tensor, name: str) -> torch.Tensor:
        if o.qk_norm == "rms":
            head = head / torch.sqrt(head.square().mean(-1, keepdim=True) + 1e-6) * weight[f"{name}.weight"]
            if not o.scaled:
                return head
        return head / torch.sqrt(head.square().sum(-1, keepdim=True) + l2_eps)

    rows = []
    for x_TD, firsts in zip(x_BTD, starts, strict=True):
        outputs, begin = [], 0
        for t, x in enumerate(x_TD):
            if t in firsts:
                begin = t
                S = x.new_zeros(layer.heads, layer.key_dim, layer.value_dim)
                D = x.new_zeros(layer.heads, layer.key_dim)
                window: list[torch.Tensor] = []
            qkv = torch.cat([weight[f"{part}_proj.weight"] @ x for part in "qkv"])
            if o.conv_size:
                window = [*window, qkv][-o.conv_size :]
                taps = weight["conv.weight"][:, -len(window) :]
                qkv = F.silu((torch.stack(window, dim=-1) * taps).sum(-1))
            q, k, v = qkv.split([layer.heads * n for n in (layer.key_dim, layer.key_dim, layer.value_dim)])
            q, k = q.view(layer.heads, layer.key_dim), k.view(layer.heads, layer.key_dim)
            v = v.view(layer.heads, layer.value_dim)
            if o.normalise == "qk":
                q = norm(q, "q_norm")
            if o.normalise in ("qk", "k"):
                k = norm(k, "k_norm")
            if o.use_beta_gate:
                beta = torch.sigmoid(weight["beta_proj.weight"] @ x) * o.beta_cap
            else:
                beta = weight["beta"] if o.train_beta else x.new_full((layer.heads,), o.beta_init)
            if o.decay_every and (t - begin) % o.decay_every == 0:
                S = o.decay_factor * S
            error = v - torch.einsum("hd,hde->he", k, S)
            f = torch.sigmoid(weight["f_proj.weight"] @ x)[:, None, None] if o.forget_gate else 1
            S = f * S + torch.einsum("h,hd,he->hde", beta, k, error)
            D = D + k
            y = torch.einsum("hd,hde->he", q, S)
            if o.denominator:
                y = y / (torch.einsum("hd,hd->h", q, D).unsqueeze(-1) + o.denominator_eps)
            y = y.reshape(-1)
            if o.use_output_gate:
                y = y * F.silu(weight["g_proj.weight"] @ x)
            outputs.append(weight["out_proj.weight"] @ y)
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def worst_token(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return ((ours - truth).norm(dim=-1) / truth.norm(dim=-1)).max().item()


def run(name: str, dtype: torch.dtype):
    layer = layer_with(dtype, **OPTIONS[name])
    torch.manual_seed(1)
    x = torch.randn(len(STARTS), TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    return layer, x, layer(x, local_plan(STARTS, TOKENS, segment_tokens=64), None)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_in_fp64(name: str) -> None:
    layer, x, y = run(name, torch.float64)
    truth = from_the_document(layer, x, STARTS)
    assert torch.isfinite(truth).all()
    assert worst_token(y, truth) < TOLERANCE["fp64"]

    parameters = dict(layer.named_parameters()) | {"x": x}
    dy = torch.randn_like(truth)
    ours = torch.autograd.grad(y, list(parameters.values()), dy)
    exact = torch.autograd.grad(truth, list(parameters.values()), dy)
    for n, a, b in zip(parameters, ours, exact, strict=True):
        assert ((a - b).norm() / b.norm()).item() < TOLERANCE["fp64 gradient"], n


@pytest.mark.parametrize("name", ["default", "rms", "k alone"])
def test_norms_are_the_documents_but_for_their_eps(name: str) -> None:
    layer, x, y = run(name, torch.float64)
    assert worst_token(y, from_the_document(layer, x, STARTS, l2_eps=0.0)) < TOLERANCE["F.normalize"]


@pytest.mark.parametrize(("name", "inside"), [("default", True), ("rms", True), ("forget gate", True),
                                              ("k alone", False), ("denominator", False),
                                              ("as written", False), ("as written, no norm", False)])  # fmt: skip
def test_the_rule_normalises_what_nothing_else_reads(name: str, inside: bool) -> None:
    """In its kernels, then: the layer has no norm of its own beside it, and a step is the forward's."""
    layer, x, _ = run(name, torch.float64)
    assert layer.l2_in_rule == inside
    keys = layer._queries_keys_values(layer._project(x))[1].detach()
    assert bool(((keys.norm(dim=-1) - 1).abs() < 1e-4).all()) == (name in ("k alone", "denominator"))
    state, plan = layer.init_state(1, x.device, x.dtype), local_plan([[0]], 9)
    whole = layer(x[:1, :9], plan, None)
    for t in range(9):
        step = layer.step(x[:1, t], None, None, state)
        advance([state])
        assert worst_token(step, whole[:, t]) < TOLERANCE["step"], t


@pytest.mark.parametrize("name", [n for n, o in OPTIONS.items() if o.get("scaled", True) and "denominator" not in o])
def test_scaled_forms_in_fp32(name: str) -> None:
    layer, x, y = run(name, torch.float32)
    truth = from_the_document(layer, x.double(), STARTS)
    assert ((y - truth).norm() / truth.norm()).item() < TOLERANCE["fp32"]


def test_states_are_fp32_under_bf16() -> None:
    layer, x, y = run("forget gate", torch.bfloat16)
    assert y.dtype == torch.bfloat16
    state = layer.init_state(2, x.device, x.dtype)
    layer(x, local_plan(STARTS, TOKENS), None, state)
    assert state.S_BHKV.dtype == torch.float32
    v, g, beta = layer._gates(x, x.new_zeros(2, TOKENS, 2, 12), local_plan(STARTS, TOKENS).position_BT)
    assert g.dtype == beta.dtype == torch.float32


def test_unscaled_form_diverges_and_the_scaled_one_does_not() -> None:
    """What the warning says: 0.5 * head_dim = 6 erases by -5 a token."""
    torch.manual_seed(1)
    x = torch.randn(1, TOKENS, HIDDEN, dtype=torch.float64)
    plan = local_plan([[0]], TOKENS)
    written, scaled = ({"qk_norm": "rms", "scaled": s, "use_output_gate": False} for s in (False, True))
    assert layer_with(torch.float64, **written)(x, plan, None).abs().max() > 1e20
    assert layer_with(torch.float64, **scaled)(x, plan, None).abs().max() < 100


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"qk_norm": "rms", "scaled": False}, r"\|k\|\^2 = head_dim = 12, so the erase factor is 1 - beta \* 12"),
        ({"normalise": "none", "scaled": False}, r"normalise=none"),
        ({"denominator": True}, r"q D may pass through zero"),
        ({}, None),
    ],
)
def test_warns_once_with_the_reason(options: dict, reason: str | None) -> None:
    deltanet._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            Decoder(config_with(**options))
    assert len(seen) == (reason is not None)
    if reason is not None:
        assert re.search(reason, str(seen[0].message))


def test_initialisation_is_the_documents() -> None:
    layer = DeltaNet(config_with())
    layer.reset_parameters(0.02)
    for name in ("q_proj", "k_proj", "v_proj", "g_proj", "out_proj"):
        bound = math.sqrt(6 / (2 * HIDDEN)) * (0.5 if name == "out_proj" else 1)  # Xavier: sqrt(6 / (in + out))
        weight = getattr(layer, name).weight
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert getattr(layer, name).bias is None
    assert torch.equal(layer.beta_proj.weight, torch.zeros_like(layer.beta_proj.weight))
    fixed = DeltaNet(config_with(use_beta_gate=False))
    fixed.reset_parameters(0.02)
    assert torch.equal(fixed.beta, torch.full((2,), 0.3)) and fixed.beta.requires_grad
    published = DeltaNet(config_with(conv_size=4))
    torch.nn.init.zeros_(published.conv.weight)
    published.reset_parameters(0.02)
    assert published.conv.weight.abs().max().item() == pytest.approx(0.5, rel=0.05)  # 1 / sqrt(4), as nn.Conv1d's


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("feed_forward", [True, False])
def test_block(norm: str, feed_forward: bool) -> None:
    """Pre-norm, residual, and the feed-forward half only where asked for."""
    layer = DecoderLayer(config_with(norm=norm, feed_forward=feed_forward), "deltanet").double()
    layer.reset_parameters(0.3)
    torch.manual_seed(1)
    x = torch.randn(1, 20, HIDDEN, dtype=torch.float64)
    plan = local_plan([[0]], 20)

    def normed(h):
        return F.layer_norm(h, (HIDDEN,), eps=1e-6) if norm == "layer" else F.rms_norm(h, (HIDDEN,), eps=1e-6)

    expected = x + layer.deltanet(normed(x), plan, None)
    if feed_forward:
        h = normed(expected)
        mlp = layer.mlp
        expected = expected + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))
    torch.testing.assert_close(layer(x, plan, None), expected, rtol=1e-12, atol=1e-12)
    assert feed_forward or not any("mlp" in n or "post_attention" in n for n, _ in layer.named_parameters())


@pytest.mark.parametrize(
    "options, words",
    [
        ({"normalise": "none"}, "deltanet.scaled=false"),
        ({"use_beta_gate": False, "beta_cap": 0.5}, "deltanet.beta_init"),
        ({"train_beta": False}, "deltanet.use_beta_gate=false"),
        ({"beta_cap": 3.0}, "less than or equal to 2"),
        ({"decay_factor": 0.0}, "greater than 0"),
    ],
)
def test_options_that_contradict_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        DeltaNetConfig(**options)
