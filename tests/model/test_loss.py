"""The chunked loss against F.cross_entropy on whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dnsp.loss import cross_entropy_sum, token_losses

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2}
B, T, D, V = 2, 50, 12, 37


def inputs(dtype: torch.dtype):
    torch.manual_seed(0)
    hidden = torch.randn(B, T, D).to(dtype).requires_grad_()
    weight = torch.randn(V, D).to(dtype).requires_grad_()
    targets = torch.randint(V, (B, T))
    targets[torch.rand(B, T) < 0.2] = -100
    return hidden, weight, targets


def plain(hidden, weight, targets, reduction="sum"):
    return F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), reduction=reduction)


def relative(a, b) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("chunk", [None, 1, 7, 1000])
def test_loss_and_gradients(dtype: torch.dtype, chunk: int | None) -> None:
    hidden, weight, targets = inputs(dtype)
    loss = cross_entropy_sum(hidden, weight, targets, chunk)
    grads = torch.autograd.grad(loss * 0.125, (hidden, weight))

    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = plain(*exact, targets)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert relative(loss, truth) < TOLERANCE[dtype]
    for ours, wanted in zip(grads, torch.autograd.grad(truth * 0.125, exact), strict=True):
        assert ours.dtype == dtype
        assert relative(ours, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("share", [0.3, 0.0], ids=["some", "none"])
def test_only_the_asked_tokens_have_logits(dtype: torch.dtype, share: float) -> None:
    hidden, weight, targets = inputs(dtype)
    targets[torch.rand(B, T) >= share] = -100
    asked = (targets.flatten() != -100).nonzero().flatten()
    wanted = torch.autograd.grad(cross_entropy_sum(hidden, weight, targets) * 0.125, (hidden, weight))
    loss = cross_entropy_sum(hidden, weight, targets, 7, asked)
    found = torch.autograd.grad(loss * 0.125, (hidden, weight))
    assert loss.item() == pytest.approx(cross_entropy_sum(hidden, weight, targets).item(), rel=TOLERANCE[dtype])
    for ours, truth in zip(found, wanted, strict=True):
        assert ours.dtype == dtype and (ours.double() - truth).norm() <= TOLERANCE[dtype] * truth.double().norm()


def test_ignored_tokens_and_none_at_all() -> None:
    hidden, weight, targets = inputs(torch.float32)
    loss = cross_entropy_sum(hidden, weight, torch.full_like(targets, -100))
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss.item() == 0 and not grads[0].any() and not grads[1].any()

    (dhidden,) = torch.autograd.grad(cross_entropy_sum(hidden, weight, targets), hidden)
    assert not dhidden[targets == -100].any()


def test_extreme_logits_stay_finite() -> None:
    hidden, weight, targets = inputs(torch.float32)
    loss = cross_entropy_sum(hidden * 1e4, weight, targets)
    assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, (hidden, weight)))


def test_losses_of_tokens() -> None:
    hidden, weight, targets = inputs(torch.float32)
    each = token_losses(hidden, weight, targets, chunk=7)
    truth = plain(hidden.double(), weight.double(), targets, "none").view(B, T)
    assert each.shape == (B, T) and not each.requires_grad and not each[targets == -100].any()
    assert relative(each, truth) < TOLERANCE[torch.float32]
    assert relative(each.sum(), cross_entropy_sum(hidden, weight, targets).double()) < TOLERANCE[torch.float32]


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    hidden, weight, targets = inputs(torch.float32)
    with torch.no_grad():
        assert not cross_entropy_sum(hidden, weight, targets).requires_grad
    loss = cross_entropy_sum(hidden.detach(), weight, targets)
    (dweight,) = torch.autograd.grad(loss, weight)
    assert torch.equal(dweight, torch.autograd.grad(cross_entropy_sum(hidden, weight, targets), weight)[0])


def test_under_autocast_the_products_are_bf16_and_the_softmax_fp32() -> None:
    hidden, weight, targets = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cross_entropy_sum(hidden, weight, targets)
    half = cross_entropy_sum(hidden.bfloat16(), weight.bfloat16(), targets)
    assert loss.dtype == torch.float32 and torch.equal(loss, half)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(loss, (hidden, weight)))


def test_whole_logits_never_exist() -> None:
    """Peak memory of tensors made inside: far below tokens times vocabulary."""
    tokens, vocabulary, chunk = 4096, 2048, 64
    hidden, weight = torch.randn(tokens, 8, requires_grad=True), torch.randn(vocabulary, 8, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,))
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        cross_entropy_sum(hidden, weight, targets, chunk).backward()
    assert largest == chunk * vocabulary
