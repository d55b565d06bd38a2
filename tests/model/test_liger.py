"""liger-kernel's operations as the model calls them, against fp64: on a GPU, and some under Triton's interpreter."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dnsp.kernels.norm import rms_norm
from dnsp.loss import IGNORE, cross_entropy_sum, token_losses
from dnsp.model import liger
from dnsp.model.mlp import MLP, feed_forward_tiled, swiglu, swiglu_backward
from dnsp.model.norm import RMSNorm
from dnsp.model.rotary import rotary_angles, rotate, rotate_both
from tests.ranks import python_path

# |got - truth| / |truth| on the same rounded operands: outputs, gradients
TOLERANCE = {torch.bfloat16: (4e-3, 6e-3), torch.float32: (1e-6, 1e-5)}
INTERPRETED = 1e-6
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
ROOT = Path(__file__).resolve().parents[2]


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cuda") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm())


def assert_near(dtype: torch.dtype, outputs: list[tuple[Tensor, Tensor]], grads: list[tuple[Tensor, Tensor]]) -> None:
    output_error, gradient_error = TOLERANCE[dtype]
    for n, (got, want) in enumerate(outputs):
        assert got.dtype == dtype and error(got, want) < output_error, (n, error(got, want))
    for n, (got, want) in enumerate(grads):
        assert error(got, want) < gradient_error, (n, error(got, want))


@pytest.mark.gpu
@pytest.mark.parametrize("zero_centred", [True, False])
@pytest.mark.parametrize("shape", [(1, 3000, 2048), (2, 20000, 3, 256), (5, 64)], ids=str)
@DTYPES
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...], zero_centred: bool) -> None:
    x, dy = draw(*shape, seed=0, dtype=dtype), draw(*shape, seed=1, dtype=dtype)
    norm = RMSNorm(shape[-1], 1e-6, zero_centred).to("cuda")
    with torch.no_grad():
        norm.weight += 0.1 * draw(shape[-1], seed=2)
    exact, weight = x.double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    x.requires_grad_()
    assert liger.takes(x)
    y, truth = norm(x), rms_norm(exact, weight, 1e-6, zero_centred)
    grads = torch.autograd.grad(y, (x, norm.weight), dy)
    assert grads[1].dtype == torch.float32
    wanted = torch.autograd.grad(truth, (exact, weight), dy.double())
    assert_near(dtype, [(y, truth)], list(zip(grads, wanted, strict=True)))


@pytest.mark.gpu
@DTYPES
def test_swiglu(dtype: torch.dtype) -> None:
    gate, up, dact = (draw(700, 5632, seed=seed, dtype=dtype) for seed in range(3))
    exact = [x.double().requires_grad_() for x in (gate, up)]
    truth = F.silu(exact[0]) * exact[1]
    wanted = torch.autograd.grad(truth, exact, dact.double())
    leaves = [x.clone().requires_grad_() for x in (gate, up)]
    act = swiglu(*(x * 1 for x in leaves))  # the backward overwrites what it was given
    grads = torch.autograd.grad(act, leaves, dact)
    by_hand = swiglu_backward(dact, gate.clone(), up.clone())
    pairs = [*zip(grads, wanted, strict=True), *zip(by_hand, wanted, strict=True)]
    assert_near(dtype, [(act, truth)], pairs)


@pytest.mark.gpu
@pytest.mark.parametrize("rotated", [64, 256])
@DTYPES
def test_rotary(dtype: torch.dtype, rotated: int) -> None:
    q, k = draw(2, 500, 16, 256, seed=0, dtype=dtype), draw(2, 500, 2, 256, seed=1, dtype=dtype)
    position = torch.stack([torch.arange(500) + 1_000_000, torch.arange(500)]).cuda()
    exact = [x.double().requires_grad_() for x in (q, k)]
    angles = rotary_angles(position, 1e7, rotated, torch.float64)
    truth = [rotate(x, angles) for x in exact]
    leaves = [x.clone().requires_grad_() for x in (q, k)]
    turned = rotate_both(*(x * 1 for x in leaves), rotary_angles(position, 1e7, rotated, dtype))
    grads = torch.autograd.grad(turned, leaves, (q.clone(), k.clone()))  # which the backward overwrites
    wanted = torch.autograd.grad(truth, exact, (q.double(), k.double()))
    assert_near(dtype, list(zip(turned, truth, strict=True)), list(zip(grads, wanted, strict=True)))
    last = rotate_both(*(x[:, -1].clone() for x in (q, k)), rotary_angles(position[:, -1], 1e7, rotated, dtype))
    assert_near(dtype, [(mine, other[:, -1]) for mine, other in zip(last, truth, strict=True)], [])


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["bf16", "autocast", "fp32"])
@pytest.mark.parametrize("words", [257, 32768, 100_003])
def test_cross_entropy(words: int, how: str) -> None:
    """The weight's gradient is a sum over chunks in fp32, rounded once: no worse than one product over all tokens."""
    tokens, width = 3000, 256
    hidden, weight = draw(tokens, width, seed=0), draw(words, width, seed=1) / 8
    if how != "fp32":  # what the products are made of
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    targets = torch.randint(words, (tokens,), generator=torch.Generator().manual_seed(2)).cuda()
    targets[::7] = IGNORE
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    truth = F.cross_entropy(exact[0] @ exact[1].T, targets, reduction="none")
    wanted = torch.autograd.grad(truth.sum() / 100, exact)
    leaves = [(x.float() if how == "autocast" else x).requires_grad_() for x in (hidden, weight)]
    with torch.autocast("cuda", torch.bfloat16, enabled=how == "autocast"):
        loss = cross_entropy_sum(*leaves, targets, chunk=1024)
        each = token_losses(*leaves, targets, chunk=1024)
    grads = torch.autograd.grad(loss / 100, leaves)
    rounding = TOLERANCE[torch.float32 if how == "fp32" else torch.bfloat16]
    assert loss.dtype == torch.float32 and error(loss, truth.sum()) < rounding[0]
    assert each.shape == targets.shape and error(each, truth) < rounding[0] and not each[::7].any()
    for grad, want, leaf in zip(grads, wanted, leaves, strict=True):
        assert grad.dtype == leaf.dtype and error(grad, want) < 2 * rounding[1], error(grad, want)
    assert not grads[0][::7].any()


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["bf16", "autocast"])
def test_a_tiled_feed_forward(how: str) -> None:
    tokens, width, inner = 5000, 256, 704
    torch.manual_seed(0)
    mlp, norm = MLP(width, inner), RMSNorm(width, 1e-6)
    mlp.reset_parameters(0.06)
    modules = torch.nn.ModuleList([mlp, norm]).bfloat16()
    truth_modules = torch.nn.ModuleList([MLP(width, inner), RMSNorm(width, 1e-6)])
    truth_modules.load_state_dict(modules.state_dict())
    truth_modules.double().cuda()
    modules = (modules.float() if how == "autocast" else modules).cuda()
    x, dy = draw(1, tokens, width, seed=0, dtype=torch.bfloat16), draw(1, tokens, width, seed=1, dtype=torch.bfloat16)
    exact = x.double().requires_grad_()
    truth = exact + truth_modules[0](truth_modules[1](exact))
    wanted = torch.autograd.grad(truth, [exact, *truth_modules.parameters()], dy.double())
    x.requires_grad_()
    with torch.autocast("cuda", torch.bfloat16, enabled=how == "autocast"):
        y = feed_forward_tiled(x, norm, mlp, 1024)
    grads = torch.autograd.grad(y, [x, *modules.parameters()], dy)
    assert_near(torch.bfloat16, [(y, truth)], [])
    for grad, want in zip(grads, wanted, strict=True):
        assert error(grad, want) < 1.5e-2, error(grad, want)


def test_off_a_gpu_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not liger.takes(torch.ones(2)) and liger.missing() is None and liger.wanted()
    assert liger.described() == f"liger-kernel {importlib.metadata.version('liger-kernel')}"
    monkeypatch.setenv("DNSP_LIGER", "0")
    assert not liger.wanted() and "DNSP_LIGER=0" in liger.described()


def test_what_the_interpreter_can_run() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": python_path()}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def _interpreted() -> None:
    logits, targets = draw(7, 50, seed=0, device="cpu"), torch.tensor([3, 49, IGNORE, 0, 7, IGNORE, 20])
    exact = logits.double().requires_grad_()
    truth = F.cross_entropy(exact, targets, reduction="none")
    (wanted,) = torch.autograd.grad(truth.sum(), exact)
    assert error(liger.cross_entropy(logits.clone(), targets, IGNORE, with_grad=False), truth) < INTERPRETED
    assert error(liger.cross_entropy(logits, targets, IGNORE, with_grad=True), truth) < INTERPRETED
    assert error(logits, wanted) < INTERPRETED

    leaves = [draw(2, 9, heads, 16, seed=heads, device="cpu").requires_grad_() for heads in (4, 2)]
    angles = rotary_angles(torch.arange(18).view(2, 9), 1e4, 8, torch.float32)
    turned = liger.rotate(*(x * 1 for x in leaves), *angles)
    want = [rotate(x, angles) for x in leaves]
    grads = torch.autograd.grad(turned, leaves, [x.detach().clone() for x in leaves])  # which it overwrites
    want_grads = torch.autograd.grad(want, leaves, [x.detach() for x in leaves])
    for mine, other in zip((*turned, *grads), (*want, *want_grads), strict=True):
        assert error(mine, other.double()) < INTERPRETED

    token = [x.detach()[:, 3].clone() for x in leaves]  # as a step has them
    liger.takes = lambda x: True  # type: ignore[assignment]
    for mine, other in zip(rotate_both(*token, (angles[0][:, 3], angles[1][:, 3])), want, strict=True):
        assert error(mine, other[:, 3].double()) < INTERPRETED


if __name__ == "__main__":
    _interpreted()
