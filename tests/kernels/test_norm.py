"""The norms against transformers' modules (values and gradients) and against their formulas in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dnsp.kernels.norm import gated_rms_norm, l2norm, rms_norm

qwen = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")

TOLERANCE = {torch.float64: 1e-14, torch.float32: 3e-7, torch.bfloat16: 5e-3}  # |error| / |truth|, against fp64
DTYPES = list(TOLERANCE)


def tensors(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, gate, weight, dy = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((3, 5, 40), (3, 5, 40), (40,), (3, 5, 40))
    )
    return x.requires_grad_(), gate.requires_grad_(), weight.requires_grad_(), dy


def assert_close(values: tuple[Tensor, ...], truths: tuple[Tensor, ...], tolerance: float) -> None:
    for a, b in zip(values, truths, strict=True):
        assert ((a.double() - b.double()).norm() / b.double().norm()).item() < tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero_centred", [True, False])
def test_rms_norm(dtype, zero_centred):
    x, _, weight, dy = tensors(dtype)
    y = rms_norm(x, weight, 1e-5, zero_centred=zero_centred)
    assert y.dtype == dtype
    a, w = (t.detach().double().requires_grad_() for t in (x, weight))
    truth = a / (a.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (w + int(zero_centred))
    assert_close((y,), (truth,), TOLERANCE[dtype])
    assert_close(
        torch.autograd.grad(y, (x, weight), dy), torch.autograd.grad(truth, (a, w), dy.double()), 2 * TOLERANCE[dtype]
    )
    assert torch.equal(rms_norm(x, None), rms_norm(x, torch.ones(40, dtype=dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_transformers_does_it(dtype):
    x, gate, weight, _ = tensors(dtype)
    theirs = qwen.Qwen3_5RMSNorm(40, eps=1e-5).to(dtype)
    theirs.weight.data.copy_(weight)
    assert torch.equal(rms_norm(x, weight, 1e-5, zero_centred=True), theirs(x))
    gated = qwen.Qwen3_5RMSNormGated(40, eps=1e-5).to(dtype)
    gated.weight.data.copy_(weight)
    assert torch.equal(gated_rms_norm(x, gate, weight, 1e-5), gated(x, gate))
    if dtype == torch.float32:
        assert torch.equal(l2norm(x), qwen.l2norm(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_rms_norm(dtype):
    x, gate, weight, dy = tensors(dtype)
    y = gated_rms_norm(x, gate, weight, 1e-5)
    assert y.dtype == dtype
    a, z, w = (t.detach().double().requires_grad_() for t in (x, gate, weight))
    truth = a / (a.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w * z * z.sigmoid()
    assert_close((y,), (truth,), TOLERANCE[dtype])
    grads = torch.autograd.grad(y, (x, gate, weight), dy)
    assert_close(grads, torch.autograd.grad(truth, (a, z, w), dy.double()), 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_l2norm(dtype):
    x, _, _, dy = tensors(dtype)
    a = x.detach().double().requires_grad_()
    y, truth = l2norm(x), a / (a.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    assert y.dtype == dtype
    assert_close((y,), (truth,), TOLERANCE[dtype])
    assert_close(torch.autograd.grad(y, x, dy), torch.autograd.grad(truth, a, dy.double()), 2 * TOLERANCE[dtype])
    assert torch.equal(l2norm(torch.zeros(4)), torch.zeros(4))


def test_refusals():
    x, gate, weight, _ = tensors(torch.float32)
    with pytest.raises(ValueError, match=r"weight \[39\].*\[40\]"):
        rms_norm(x, weight[1:])
    with pytest.raises(ValueError, match="gate is on meta, x on cpu"):
        gated_rms_norm(x, gate.to("meta"), weight)
    with pytest.raises(ValueError, match="weight is on meta, x on cpu"):
        rms_norm(x, weight.to("meta"))
    with pytest.raises(TypeError, match="gate is torch.int32.*floating"):
        gated_rms_norm(x, gate.int(), weight)
    for norm in (l2norm, lambda x: rms_norm(x, None)):
        with pytest.raises(TypeError, match="x is torch.int32.*floating"):
            norm(x.int())
    with pytest.raises(ValueError, match=r"x\[\].*channels"):
        rms_norm(torch.ones(()), None)
    with pytest.raises(ValueError, match="one gate a channel"):
        gated_rms_norm(x, gate[0], weight)
