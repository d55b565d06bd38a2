"""The Triton kernels of the convolution and the gated norm, under Triton's interpreter and on a GPU, against fp64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dnsp.kernels.conv import causal_conv1d
from dnsp.kernels.norm import gated_rms_norm
from tests.kernels.interpreter import Interpreter

pytestmark = pytest.mark.usefixtures("unasked")

# |error| / |truth| of each tensor
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}


class Conv(NamedTuple):
    tokens: int
    channels: int
    width: int = 4
    silu: bool = True
    bias: bool = False
    halo: bool = False
    starts: tuple[tuple[int, ...], ...] | None = None  # of each row's documents
    batch: int = 2
    sliced: bool = True  # x lies among other channels, as in a projection's output


class Norm(NamedTuple):
    shape: tuple[int, ...]
    sliced: bool = False


CONV = {
    "plain": Conv(70, 24),
    "two taps": Conv(9, 16, width=2, bias=True, silu=False),
    "three taps": Conv(67, 40, width=3, bias=True),
    "documents": Conv(75, 20, starts=((0, 1, 2, 40, 43), (0, 17, 64, 65, 70))),
    "halo": Conv(66, 16, halo=True, bias=True),
    "halo, documents": Conv(70, 16, halo=True, starts=((-1, 2, 33), (0, 1))),
    "one token": Conv(1, 16, halo=True, batch=1),
    "contiguous": Conv(64, 32, sliced=False),
}
NORM = {
    "rows": Norm((3, 5, 40)),
    "heads": Norm((2, 7, 3, 32), sliced=True),
    "wide": Norm((4, 300)),
}
LARGE_CONV = {
    "a layer": Conv(5000, 8192, batch=1),
    "a layer's documents": Conv(5000, 1536, starts=((0, 700, 701, 3000), (0, 4999)), bias=True),
    "a shard": Conv(4096, 2048, halo=True, batch=1),
}
LARGE_NORM = {
    "a layer": Norm((1, 5000, 32, 128), sliced=True),
    "narrow": Norm((2, 900, 8, 64)),
    "8192": Norm((77, 8192)),
}

START = 10  # of an interval with a halo


def drawn(*shape: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).to(device)


def conv_errors(case: Conv, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Of y and of every gradient, against the elementwise passes in fp64."""
    B, T, D, W = case.batch, case.tokens, case.channels, case.width
    lanes = 2 if case.sliced else 1
    whole = drawn(B, T, D * lanes, seed=0, dtype=dtype, device=device)
    x = whole[..., D:] if case.sliced else whole
    tensors = {"x": x, "weight": drawn(D, W, seed=1, dtype=dtype, device=device)}
    if case.bias:
        tensors["bias"] = drawn(D, seed=2, dtype=dtype, device=device)
    if case.halo:
        tensors["halo"] = drawn(B, W - 1, D, seed=3, dtype=dtype, device=device)
    start, doc_start = START if case.halo else 0, None
    if case.starts is not None:
        rows = [[max(s for s in row if s <= t) + start for t in range(T)] for row in case.starts]
        rows = [[-1 if s < start else s for s in row] for row in rows]
        doc_start = torch.tensor(rows, dtype=torch.int32, device=device)

    def run(dtype: torch.dtype | None, backend: str) -> dict[str, Tensor]:
        leaves = {n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in tensors.items()}
        if dtype is None and case.sliced:  # as it lies
            leaves["x"] = x.detach().requires_grad_()
        y = causal_conv1d(
            leaves["x"], leaves["weight"], leaves.get("bias"), activation="silu" if case.silu else None,
            doc_start_BT=doc_start, start=start, halo_BWD=leaves.get("halo"), backend=backend,
        )  # fmt: skip
        dy = drawn(B, T, D, seed=4, dtype=x.dtype, device=device).to(y.dtype)
        grads = torch.autograd.grad(y, list(leaves.values()), dy)
        return {"y": y.detach()} | {"d" + n: g for n, g in zip(leaves, grads, strict=True)}

    return compared(run(None, "triton"), run(torch.float64, "torch"))


def norm_errors(case: Norm, dtype: torch.dtype, device: str) -> dict[str, float]:
    shape, D = case.shape, case.shape[-1]
    x = drawn(*shape, seed=0, dtype=dtype, device=device)
    gate = drawn(*shape[:-1], 2 * D, seed=1, dtype=dtype, device=device)[..., D:] if case.sliced else None
    gate = drawn(*shape, seed=1, dtype=dtype, device=device) if gate is None else gate
    weight = drawn(D, seed=2, dtype=dtype, device=device)
    dy = drawn(*shape, seed=3, dtype=dtype, device=device)

    def run(dtype: torch.dtype | None, backend: str) -> dict[str, Tensor]:
        leaves = [t.detach() if dtype is None else t.detach().to(dtype) for t in (x, gate, weight)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        y = gated_rms_norm(*leaves, 1e-6, backend=backend)
        grads = torch.autograd.grad(y, leaves, dy.to(y.dtype))
        return {"y": y.detach()} | dict(zip(("dx", "dgate", "dweight"), grads, strict=True))

    return compared(run(None, "triton"), run(torch.float64, "torch"))


def compared(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == exact.keys() and all(found[n].shape == exact[n].shape for n in exact)
    return {n: ((found[n].double() - b).norm() / b.norm().clamp(min=1e-30)).item() for n, b in exact.items()}


def assert_within(found: dict[str, float], limit: float) -> None:
    wrong = {name: f"{error:.1e}" for name, error in found.items() if not error <= limit}
    assert not wrong, f"beyond {limit:.0e}: {wrong}"


def interpreted_errors(name: str) -> dict[str, float]:
    kind, _, case = name.partition(" ")
    if kind == "conv":
        return conv_errors(CONV[case], torch.float32, "cpu")
    return norm_errors(NORM[case], torch.float32, "cpu")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [*(f"conv {n}" for n in CONV), *(f"norm {n}" for n in NORM)])
def test_interpreted(interpreter: Interpreter, name: str) -> None:
    assert_within(interpreter("test_triton_layers:interpreted_errors", name), TOLERANCE[torch.float32])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", [*CONV, *LARGE_CONV])
def test_convolution_on_gpu(name: str, dtype: torch.dtype) -> None:
    assert_within(conv_errors((CONV | LARGE_CONV)[name], dtype, "cuda"), TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", [*NORM, *LARGE_NORM])
def test_gated_norm_on_gpu(name: str, dtype: torch.dtype) -> None:
    assert_within(norm_errors((NORM | LARGE_NORM)[name], dtype, "cuda"), TOLERANCE[dtype])


@pytest.mark.gpu
def test_convolution_of_pieces_has_the_bits_of_the_whole() -> None:
    x = drawn(1, 3000, 512, seed=0, dtype=torch.bfloat16, device="cuda")
    weight = drawn(512, 4, seed=1, dtype=torch.bfloat16, device="cuda")
    whole = causal_conv1d(x, weight)
    for cut in (64, 1000, 2997):
        second = causal_conv1d(x[:, cut:], weight, start=cut, halo_BWD=x[:, cut - 3 : cut])
        assert torch.equal(second, whole[:, cut:])
    assert torch.equal(causal_conv1d(x, weight), whole)


@pytest.mark.gpu
def test_what_is_not_finite_stays_in_its_document() -> None:
    x = drawn(1, 200, 64, seed=0, dtype=torch.bfloat16, device="cuda")
    weight = drawn(64, 4, seed=1, dtype=torch.bfloat16, device="cuda")
    doc_start = torch.tensor([[0] * 100 + [100] * 100], dtype=torch.int32, device="cuda")
    clean = causal_conv1d(x, weight, doc_start_BT=doc_start)
    x[0, 99] = torch.inf
    spoilt = causal_conv1d(x, weight, doc_start_BT=doc_start)
    assert torch.equal(spoilt[:, 100:], clean[:, 100:]) and torch.equal(spoilt[:, :99], clean[:, :99])
    assert not spoilt[:, 99].isfinite().all()
