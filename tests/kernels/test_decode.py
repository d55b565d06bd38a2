"""Decoding: one token at a time gives what the chunked forms give for the whole, and updates its state in place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dnsp.kernels.conv import causal_conv1d
from dnsp.kernels.decode import conv_step, delta_step, gated_delta_step, normaliser_step
from dnsp.kernels.delta_rule import Segments, delta_rule
from dnsp.kernels.reference import Rule
from dnsp.kernels.scan import LocalScan

TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 8e-3}  # |error| / |chunked|
TOKENS, PREFILL = 140, 70
RULES = [Rule(), Rule(error_decay="previous"), Rule(erase=False)]


def make(dtype: torch.dtype, H: int = 2, HV: int = 4, K: int = 8, V: int = 6) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q, k, v, g, beta = (
        torch.randn(2, TOKENS, *shape, generator=generator) for shape in ((H, K), (H, K), (HV, V), (HV,), (HV,))
    )
    return q.to(dtype), F.normalize(k, dim=-1).to(dtype), v.to(dtype), F.logsigmoid(g + 2), beta.sigmoid()


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def whole(tensors, tokens: int = TOKENS, **options) -> tuple[Tensor, Tensor]:
    held = [None if x is None else x[:, :tokens] for x in tensors]
    return delta_rule(*held, segments=Segments(192, (0,), tokens), scan=LocalScan(), output_final_state=True, **options)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("l2norm", [True, False])
def test_delta_step(rule, dtype, decay, l2norm):
    q, k, v, g, beta = make(dtype)
    tensors = (q, k, v, g if decay else None, beta)
    o, final = whole(tensors, scale=0.3, rule=rule, normalise_qk=l2norm)
    _, state = whole(tensors, PREFILL, scale=0.3, rule=rule, normalise_qk=l2norm)
    address, outputs = state.data_ptr(), []
    for t in range(PREFILL, TOKENS):
        now = (None if x is None else x[:, t] for x in tensors)
        outputs.append(delta_step(*now, state, scale=0.3, rule=rule, l2norm=l2norm))
    assert state.data_ptr() == address and outputs[0].dtype == dtype
    assert relative(torch.stack(outputs, 1), o[:, PREFILL:]) < TOLERANCE[dtype]
    assert relative(state, final) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("activation", ["silu", None])
def test_conv_step_has_the_bits_of_the_whole(dtype, width, activation):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=generator).to(dtype) for s in ((3, 20, 33), (33, width), (33,)))
    y = causal_conv1d(x, weight, bias, activation=activation)
    tail = x.new_zeros(3, width - 1, 33)
    address = tail.data_ptr()
    steps = [conv_step(x[:, t], tail, weight, bias, activation) for t in range(20)]
    assert torch.equal(torch.stack(steps, 1), y)
    assert tail.data_ptr() == address and torch.equal(tail, x[:, 20 - (width - 1) :])


@pytest.mark.parametrize("slots", [(4, 0), (-1, 3), (-1, -1)])
def test_slots_are_rows_of_tables(slots):
    """Each row of the batch as it is alone, on its row of the tables; idle ones give zeros; other rows stay."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, g, beta = (x[:, 0] for x in make(torch.float32))
    x, weight = torch.randn(2, 7, generator=generator), torch.randn(7, 3, generator=generator)
    states, tails = torch.randn(5, 4, 8, 6, generator=generator), torch.randn(5, 2, 7, generator=generator)
    before = states.clone(), tails.clone()
    o = delta_step(q, k, v, g, beta, states, slots_B=torch.tensor(slots))
    y = conv_step(x, tails, weight, slots_B=torch.tensor(slots, dtype=torch.int32))
    expected = [z.clone() for z in before]
    for b, slot in enumerate(slots):
        part, row = slice(b, b + 1), slice(slot, slot + 1)
        if slot < 0:
            assert not o[b].any() and not y[b].any()
            continue
        assert torch.equal(o[part], delta_step(*(z[part] for z in (q, k, v, g, beta)), expected[0][row]))
        assert torch.equal(y[part], conv_step(x[part], expected[1][row], weight))
    assert torch.equal(states, expected[0]) and torch.equal(tails, expected[1])


def test_gated_delta_step_is_its_parts():
    generator = torch.Generator().manual_seed(0)
    H, HV, K, V = 2, 4, 8, 6
    D = 2 * H * K + HV * V
    mixed, a, b, weight = (torch.randn(s, generator=generator) for s in ((3, D), (3, HV), (3, HV), (D, 4)))
    A_log, dt_bias = torch.randn(2, HV, generator=generator)
    tails, states = torch.randn(2, 3, 3, D, generator=generator), torch.randn(2, 3, HV, K, V, generator=generator)
    tails[1], states[1] = tails[0], states[0]
    o = gated_delta_step(
        mixed, a, b, tails[0], states[0], weight_DW=weight, A_log_H=A_log, dt_bias_H=dt_bias, scale=0.3
    )
    q, k, v = conv_step(mixed, tails[1], weight).split([H * K, H * K, HV * V], -1)
    g = -A_log.exp() * F.softplus(a + dt_bias)
    q, k, v = q.unflatten(-1, (H, K)), k.unflatten(-1, (H, K)), v.unflatten(-1, (HV, V))
    assert torch.equal(o, delta_step(q, k, v, g, b.sigmoid(), states[1], scale=0.3, l2norm=True))
    assert torch.equal(*tails) and torch.equal(*states)


def test_normaliser_step():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 9, 3, 8, generator=generator, dtype=torch.float64)
    key_sum = torch.zeros(2, 3, 8, dtype=torch.float64)
    steps = [normaliser_step(q[:, t], k[:, t], key_sum) for t in range(9)]
    assert relative(torch.stack(steps, 1), (q * k.cumsum(1)).sum(-1)) < TOLERANCE[torch.float64]
    assert relative(key_sum, k.sum(1)) < TOLERANCE[torch.float64]


def test_autocast_does_not_reach_inside():
    tensors = [x[:, 0] for x in make(torch.float32)]
    states = torch.randn(2, 4, 8, 6).expand(2, 2, 4, 8, 6).clone()
    plain = delta_step(*tensors, states[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(delta_step(*tensors, states[1]), plain)
    assert torch.equal(states[0], states[1])


def test_refusals():
    q, k, v, g, beta = (x[:, 0] for x in make(torch.float32))
    with pytest.raises(ValueError, match=r"state \[2, 4, 6, 8\].*\[2, 4, 8, 6\]"):
        delta_step(q, k, v, g, beta, torch.zeros(2, 4, 6, 8))
    with pytest.raises(ValueError, match="3 value heads for 2 key heads"):
        delta_step(q, k, v[:, :3], g[:, :3], beta[:, :3], torch.zeros(2, 3, 8, 6))
    with pytest.raises(ValueError, match=r"g\[2, 3\]: expected \[2, 4\]"):
        delta_step(q, k, v, g[:, :3], beta, torch.zeros(2, 4, 8, 6))
    with pytest.raises(TypeError, match="state is torch.bfloat16"):
        delta_step(q, k, v, g, beta, torch.zeros(2, 4, 8, 6, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="beta is torch.int64.*floating"):
        delta_step(q, k, v, g, beta.long(), torch.zeros(2, 4, 8, 6))
    with pytest.raises(ValueError, match=r"state\[2, 4, 8, 6\] has strides \[0, .*clone"):
        delta_step(q, k, v, g, beta, torch.zeros(1, 4, 8, 6).expand(2, -1, -1, -1))
    with pytest.raises(ValueError, match="K=0, V=6"):
        delta_step(q[..., :0], k[..., :0], v, g, beta, torch.zeros(2, 4, 0, 6))
    with pytest.raises(TypeError, match="tail is torch.int32.*floating"):
        conv_step(torch.zeros(2, 5), torch.zeros(2, 3, 5).int(), torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"key_sum\[2, 2, 4\]: expected \[B, H, K\] = \[2, 2, 8\]"):
        normaliser_step(q, k, torch.zeros(2, 2, 4))
    for slots, words in (([1, 1], "live ones must differ"), ([0, 7], "below 7"), ([0, 1, 2], r"slots\[3\]")):
        with pytest.raises(ValueError, match=words):
            delta_step(q, k, v, g, beta, torch.zeros(7, 4, 8, 6), slots_B=torch.tensor(slots))
    with pytest.raises(ValueError, match=r"tail \[2, 4, 5\].*\[2, 3, 5\]"):
        conv_step(torch.zeros(2, 5), torch.zeros(2, 4, 5), torch.zeros(5, 4))
