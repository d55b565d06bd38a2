"""Each relative of the delta rule against its own update, written out token by token in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dnsp.kernels import variants
from dnsp.kernels.delta_rule import Segments, delta_rule
from dnsp.kernels.reference import Rule
from dnsp.kernels.scan import LocalScan

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}  # |error| / |truth|
B, T, H, K, V = 2, 200, 2, 8, 6
STARTS = ((0, 130), (0, 1, 70))


def make(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = dict(q=(H, K), k=(H, K), v=(H, V), beta=(H,), forget=(H,))
    x = {name: torch.randn(B, T, *shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    x["q"], x["k"] = x["q"].abs(), F.normalize(x["k"].abs(), dim=-1)  # positive: the denominator stays away from zero
    return {name: tensor.requires_grad_() for name, tensor in x.items()}


def doc_start() -> Tensor:
    return torch.tensor([[max(s for s in row if s <= t) for t in range(T)] for row in STARTS], dtype=torch.int32)


def position() -> Tensor:
    return torch.arange(T) - doc_start()


def token_by_token(x: dict[str, Tensor], update: Callable, eps: float | None = None) -> Tensor:
    """``S = update(S, position, b, t)`` from zero in every document, ``o = q S`` or ``q S / (q D + eps)``."""
    rows = []
    for b in range(B):
        outputs = []
        for t in range(T):
            at = int(position()[b, t])
            if at == 0:
                S, D = x["v"].new_zeros(H, K, V), x["v"].new_zeros(H, K)
            S = update(S, at, *(x[name][b, t] for name in ("k", "v", "beta", "forget")))
            D = D + x["k"][b, t]
            o = torch.einsum("hk,hkv->hv", x["q"][b, t], S)
            if eps is not None:
                o = o / ((x["q"][b, t] * D).sum(-1, keepdim=True) + eps)
            outputs.append(o)
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def write(S: Tensor, k: Tensor, v: Tensor, beta: Tensor, seen: Tensor | None) -> Tensor:
    error = v if seen is None else v - torch.einsum("hk,hkv->hv", k, seen)
    return S + torch.einsum("h,hk,hv->hkv", beta, k, error)


def chunked(x: dict[str, Tensor], g: Tensor | None, beta: Tensor, rule: Rule, eps: float | None = None) -> Tensor:
    segments = Segments(64, (0, 64, 128, 192), T, (doc_start()[:, [63, 127, 191, 199]] < torch.arange(0, T, 64)).T)
    common = dict(segments=segments, scan=LocalScan(), doc_start_BT=doc_start())
    o, _ = delta_rule(x["q"], x["k"], x["v"], g, beta, scale=1.0, rule=rule, **common)
    if eps is None:
        return o
    arguments = variants.normaliser(x["q"])
    qD, _ = delta_rule(
        x["q"], x["k"], *(arguments.pop(n) for n in ("v_BTHV", "g_BTH", "beta_BTH")), **arguments, **common
    )
    return variants.normalise_output(o, qD.squeeze(-1), eps)


def plain(S, at, k, v, beta, forget):
    return write(S, k, v, beta.sigmoid(), S)


def forgetting(S, at, k, v, beta, forget):
    return write(forget.sigmoid()[:, None, None] * S, k, v, beta.sigmoid(), S)


def periodic(S, at, k, v, beta, forget):
    S = 0.9 * S if at % 50 == 0 else S
    return write(S, k, v, beta.sigmoid(), S)


def capped(S, at, k, v, beta, forget):
    return write(S, k, v, 0.5 * beta.sigmoid(), S)


def fixed(S, at, k, v, beta, forget):
    return write(S, k, v, torch.tensor([0.1, 0.5], dtype=k.dtype), S)


def linear(S, at, k, v, beta, forget):
    return write(S, k, v, torch.ones_like(beta), None)


VARIANTS = {
    "plain": (plain, lambda x: (None, variants.learned_beta(x["beta"]), variants.DELTA)),
    "forget gate": (
        forgetting,
        lambda x: (variants.forget_gate(x["forget"]), variants.learned_beta(x["beta"]), variants.FORGET_GATE),
    ),
    "periodic decay": (
        periodic,
        lambda x: (
            variants.periodic_decay(torch.zeros_like(x["beta"]), position(), H, 50, 0.9),
            variants.learned_beta(x["beta"]),
            variants.DELTA,
        ),
    ),
    "capped beta": (capped, lambda x: (None, variants.learned_beta(x["beta"], cap=0.5), variants.DELTA)),
    "fixed beta": (
        fixed,
        lambda x: (
            None,
            variants.fixed_beta(torch.tensor([0.1, 0.7], dtype=x["k"].dtype), B, T, cap=0.5),
            variants.DELTA,
        ),
    ),
    "linear attention": (
        linear,
        lambda x: (None, variants.fixed_beta(torch.ones(H).to(x["k"]), B, T), variants.LINEAR_ATTENTION),
    ),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("eps", [None, 1e-6])
@pytest.mark.parametrize("variant", VARIANTS)
def test_against_its_own_update(variant, eps, dtype):
    update, arguments = VARIANTS[variant]
    x = make(dtype)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in x.items()}
    o, expected = chunked(x, *arguments(x), eps), token_by_token(exact, update, eps)
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads = torch.autograd.grad(o, list(x.values()), do, allow_unused=True)
    truths = torch.autograd.grad(expected, list(exact.values()), do.double(), allow_unused=True)
    for name, a, b in zip(["o", *x], [o, *grads], [expected, *truths], strict=True):
        assert (a is None) == (b is None), name
        assert a is None or (a - b).norm() <= TOLERANCE[dtype] * b.norm(), name


def test_periodic_decay_counts_within_documents():
    decay = variants.periodic_decay(None, torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]]), 3, 2, 0.9)
    expected = math.log(0.9) * torch.tensor([0, 0, 1, 0, 1, 0, 0, 1])
    assert decay.shape == (1, 8, 3) and torch.equal(decay, expected[None, :, None].expand(1, 8, 3))
    other = torch.rand(1, 8, 3)
    assert torch.equal(variants.periodic_decay(other, torch.arange(8)[None], 3, 2, 0.9)[:, ::2][:, 0], other[:, 0])


def test_gates_are_fp32():
    half = torch.randn(2, 5, 3).bfloat16()
    assert variants.forget_gate(half).dtype == variants.learned_beta(half).dtype == torch.float32
    assert variants.fixed_beta(half[0, 0], 2, 5).dtype == torch.float32
    assert variants.forget_gate(half.double()).dtype == torch.float64
    nearly_open = variants.forget_gate(torch.tensor([[[30.0]]]))  # the sigmoid is 1 in fp32
    assert -1e-13 < nearly_open.item() < -9e-14


def test_a_denominator_is_shared_by_the_value_heads_of_its_key():
    o, qD = torch.rand(1, 2, 4, 3), torch.rand(1, 2, 2) + 1
    expected = o / (qD[:, :, [0, 0, 1, 1], None] + 1e-6)
    assert torch.equal(variants.normalise_output(o, qD), expected)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: variants.periodic_decay(None, torch.zeros(1, 1), 1, 0, 0.9), "0.9 every 0 tokens"),
        (lambda: variants.periodic_decay(None, torch.zeros(1, 1), 1, 10, 1.5), "1.5 every 10 tokens"),
        (lambda: variants.periodic_decay(None, torch.zeros(1, 1), 1, 10, 0.0), "decay by 0.0"),
        (lambda: variants.learned_beta(torch.zeros(1, 1, 1), cap=0.0), "beta cap 0.0"),
        (lambda: variants.fixed_beta(torch.zeros(1), 1, 1, cap=-1.0), "beta cap -1.0"),
        (lambda: variants.normalise_output(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 2)), "3 value heads for 2"),
    ],
)
def test_refusals(call, said):
    with pytest.raises(ValueError, match=said):
        call()
