"""bf16 where it is asked for, fp32 where it is promised: gates, states, loss, gradients of fp32 parameters."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import dnsp.model.deltanet
import dnsp.model.gated_delta
from dnsp.config import DeltaNetConfig, ModelConfig
from dnsp.model.decoder import MIXERS, Decoder
from dnsp.parallel.plan import local_plan

# |bf16 - fp32| / |fp32|; one bf16 rounding is 2e-3
TOLERANCE = {"loss": 2e-3, "gradient": 5e-2}
TOKENS, STARTS = 200, [[0, 70], [0]]


def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(
        ModelConfig(
            vocab_size=41,
            hidden_size=64,
            intermediate_size=96,
            pattern=list(MIXERS),
            deltanet=DeltaNetConfig(num_heads=2, qk_norm="rms", forget_gate=True, decay_every=50),
        )
    )


def tokens() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(41, (2, TOKENS))


def test_autocast_gradients() -> None:
    model, ids, plan = decoder(), tokens(), local_plan(STARTS, TOKENS)
    exact = model(ids, ids, plan)
    exact.backward()
    truth = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, ids, plan)
    loss.backward()
    assert loss.dtype == torch.float32 and abs(loss / exact - 1).item() < TOLERANCE["loss"]
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert ((parameter.grad - truth[name]).norm() / truth[name].norm()).item() < TOLERANCE["gradient"], name


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_gates_and_states_are_fp32(how: str, monkeypatch) -> None:
    """The delta rule's operands as the layers hand them over: q, k, v in bf16; g, beta and what comes back in fp32."""
    seen = []
    for module, name in (
        (dnsp.model.gated_delta, "begin_delta_rule"),
        (dnsp.model.deltanet, "begin_delta_rule"),
        (dnsp.model.deltanet, "delta_rule"),
    ):
        inner = getattr(module, name)

        def watch(q, k, v, g, beta, inner=inner, name=name, **settings):
            given = [t.dtype for t in (q, k, v)], [t.dtype for t in (g, beta) if t is not None]
            found = inner(q, k, v, g, beta, **settings)
            o, S = found.finish() if name == "begin_delta_rule" else found
            seen.append((*given, S.dtype))
            return SimpleNamespace(finish=lambda: (o, S)) if name == "begin_delta_rule" else (o, S)

        monkeypatch.setattr(module, name, watch)
    model = decoder() if how == "autocast" else decoder().bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        hidden, states = model.prefill(tokens(), local_plan(STARTS, TOKENS))
        logits = model.step(tokens()[:, 0], states)
    assert len(seen) == 3  # gated_delta, deltanet, linear attention's denominator
    for operands, gates, state in seen:
        assert set(operands) == {torch.bfloat16} and set(gates) == {torch.float32} and state == torch.float32
    assert logits.dtype == torch.float32 and torch.isfinite(logits).all()
    assert all(s.S_BHKV.dtype == torch.float32 for s in states if s.S_BHKV is not None)


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
def test_a_gpu_in_bf16_is_as_near_as_a_cpu(recompute: bool) -> None:
    """Its kernels, cuDNN and flash attention, liger's: loss and gradients against one CPU process in fp32."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=300,
        hidden_size=256,
        intermediate_size=320,
        head_dim=64,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        pattern=["gated_delta", "attention", "gated_delta", "attention"],
    )
    model = Decoder(config, activation_checkpointing=recompute, mlp_tile=300)
    ids, starts = torch.randint(300, (2, 1024)), [[0], [0, 70, 600]]
    exact = model(ids, ids, local_plan(starts, 1024, 512))
    exact.backward()
    truth = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    model.cuda().autocast = torch.bfloat16
    loss = model(ids.cuda(), ids.cuda(), local_plan(starts, 1024, 512).to("cuda"))
    loss.backward()
    assert abs(loss.cpu() / exact - 1).item() < TOLERANCE["loss"]
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert ((parameter.grad.cpu() - truth[name]).norm() / truth[name].norm()).item() < TOLERANCE["gradient"], name
