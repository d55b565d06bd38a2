"""The causal convolution against torch's own in fp64, document by document; and its bits against where it is cut."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dnsp.kernels.conv import causal_conv1d, silu

# |error| / |truth| per tensor
TOLERANCE = {torch.float64: 1e-14, torch.float32: 5e-7, torch.bfloat16: 5e-3}
GRADIENTS = ("x", "weight", "bias")
STARTS = [[0, 1, 2, 40, 43], [0, 17, 64, 65, 90]]  # documents of one token, and shorter than the filter
TOKENS = 101


def make(batch: int = 2, tokens: int = TOKENS, channels: int = 33, width: int = 4, dtype=torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, tokens, channels), (channels, width), (channels,)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def doc_start(starts: list[list[int]], tokens: int = TOKENS) -> Tensor:
    rows = [torch.tensor([max(s for s in row if s <= t) for t in range(tokens)]) for row in starts]
    return torch.stack(rows).to(torch.int32)


def truth(x: Tensor, weight: Tensor, bias: Tensor | None, starts: list[list[int]], activation: str | None) -> Tensor:
    """torch's convolution of every document by itself."""
    width, rows = weight.shape[1], []
    for row, begins in zip(x, starts, strict=True):
        pieces = []
        for a, b in zip(begins, [*begins[1:], len(row)], strict=True):
            padded = F.pad(row[a:b].mT[None], (width - 1, 0))
            pieces.append(F.conv1d(padded, weight[:, None], bias, groups=weight.shape[0])[0].mT)
        rows.append(torch.cat(pieces))
    z = torch.stack(rows)
    return F.silu(z) if activation else z


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("documents", [True, False])
def test_outputs_and_gradients(dtype, width, activation, documents):
    inputs = make(width=width, dtype=dtype)
    starts = STARTS if documents else [[0], [0]]
    y = causal_conv1d(*inputs, activation=activation, doc_start_BT=doc_start(STARTS) if documents else None)
    assert y.dtype == dtype
    exact = [i.detach().double().requires_grad_() for i in inputs]
    expected = truth(*exact, starts, activation)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    assert relative(y, expected) < TOLERANCE[dtype]
    for name, a, b in zip(
        GRADIENTS, torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, exact, dy.double()), strict=True
    ):
        assert a.dtype == dtype and relative(a, b) < TOLERANCE[dtype], name


def test_gradcheck_with_halo_and_without_bias():
    x, weight, _ = make(batch=1, tokens=7, channels=3)
    halo = torch.randn(1, 3, 3, dtype=torch.float64, requires_grad=True)
    starts = doc_start([[0, 9, 12]], 17)[
        :, 10:
    ]  # the first document began in the halo, the next one inside the interval

    def run(x: Tensor, weight: Tensor, halo: Tensor) -> Tensor:
        return causal_conv1d(x, weight, doc_start_BT=starts, start=10, halo_BWD=halo)

    assert torch.autograd.gradcheck(run, (x, weight, halo))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("documents", [True, False])
def test_cut_anywhere_gives_the_same_bits(dtype, documents):
    """Outputs bit for bit; gradients to rounding: those of many pieces are summed in another order and dtype."""
    inputs = make(dtype=dtype)
    starts = doc_start(STARTS) if documents else None
    whole = causal_conv1d(*inputs, doc_start_BT=starts)
    before = F.pad(inputs[0], (0, 0, 3, 0))  # token t is at t + 3
    for cuts in ([0, 41, 64, TOKENS], [0, 1, 2, 3, 90, TOKENS], list(range(TOKENS + 1))):
        pieces = [
            causal_conv1d(
                before[:, a + 3 : b + 3],
                *inputs[1:],
                doc_start_BT=None if starts is None else starts[:, a:b],
                start=a,
                halo_BWD=before[:, a : a + 3],
            )
            for a, b in zip(cuts, cuts[1:], strict=False)
        ]
        assert torch.equal(torch.cat(pieces, 1), whole)
    dy = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for name, a, b in zip(
        GRADIENTS,
        torch.autograd.grad(torch.cat(pieces, 1), inputs, dy),
        torch.autograd.grad(whole, inputs, dy),
        strict=True,
    ):
        assert relative(a, b) < 10 * TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_blocks_of_the_computation_do_not_show(dtype, monkeypatch):
    inputs, starts = make(dtype=dtype), doc_start(STARTS)
    dy = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    for block in (1 << 30, 700, 1):
        monkeypatch.setattr("dnsp.kernels.conv.BLOCK", block)
        y = causal_conv1d(*inputs, doc_start_BT=starts)
        results.append([y, *torch.autograd.grad(y, inputs, dy)])
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0])
        assert all(relative(a, b) < TOLERANCE[dtype] for a, b in zip(other[1:], results[0][1:], strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 7.0])
def test_a_document_changes_no_bit_of_another(value):
    inputs = make(dtype=torch.float32)
    starts = doc_start(STARTS)
    dy = torch.randn(inputs[0].shape)
    y = causal_conv1d(*inputs, doc_start_BT=starts)
    (dx,) = torch.autograd.grad(y, inputs[0], dy)
    changed = inputs[0].detach().clone()
    changed[0, 2:40] = value
    changed.requires_grad_()
    y2 = causal_conv1d(changed, *inputs[1:], doc_start_BT=starts)
    (dx2,) = torch.autograd.grad(y2, changed, dy)
    others = torch.ones(TOKENS, dtype=torch.bool)
    others[2:40] = False
    for a, b in ((y, y2), (dx, dx2)):
        assert torch.equal(a[0, others], b[0, others]) and torch.equal(a[1], b[1])
        assert not torch.equal(a[0, 2:40], b[0, 2:40])


def test_a_document_begun_before_token_0_reads_the_whole_halo():
    x, weight, bias = make()
    y = causal_conv1d(x, weight, bias)
    starts = torch.full((2, TOKENS - 10), -1, dtype=torch.int32)
    rest = causal_conv1d(x[:, 10:], weight, bias, doc_start_BT=starts, halo_BWD=x[:, 7:10])
    assert torch.equal(rest, y[:, 10:])
    assert torch.equal(causal_conv1d(x[:, 10:], weight, bias, halo_BWD=x[:, 7:10]), y[:, 10:])


@pytest.mark.parametrize("shape", [(0, 9, 6), (2, 0, 6), (2, 9, 0)])
def test_nothing_in_nothing_out(shape):
    x, weight = torch.zeros(shape, requires_grad=True), torch.randn(shape[2], 4, requires_grad=True)
    y = causal_conv1d(x, weight)
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert y.shape == dx.shape == shape and not dweight.any()


def test_silu_is_silu_to_the_ends_of_the_range():
    z = torch.tensor([-1e4, -100.0, -88.0, -3.0, 0.0, 3.0, 88.0, 1e4])
    assert torch.allclose(silu(z), F.silu(z.double()).float(), rtol=1e-6, atol=1e-38)  # flushed to zero below


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(activation="gelu"), "'gelu'.*'silu' or None"),
        (dict(start=64), "start 64 without a halo"),
        (dict(halo_BWD=torch.zeros(2, 2, 33)), r"halo \[2, 2, 33\].*\[2, 3, 33\]"),
        (dict(doc_start_BT=torch.zeros(2, 5)), r"doc_start \[2, 5\].*\[2, 101\]"),
        (dict(weight_DW=torch.zeros(32, 4)), "32 filters for 33 channels"),
        (dict(bias_D=torch.zeros(4)), r"bias \[4\].*\[33\]"),
        (dict(start=-3, halo_BWD=torch.zeros(2, 3, 33)), "start=-3.*from 0"),
        (dict(start=3.0, halo_BWD=torch.zeros(2, 3, 33)), "start=3.0.*integer"),
        (dict(doc_start_BT=torch.zeros(2, 101)), "doc_start is torch.float32.*int32 or int64"),
        (dict(x_BTD=torch.zeros(2, 101, 33).int()), "x is torch.int32.*floating"),
        (dict(weight_DW=torch.zeros(33, 4).int()), "weight is torch.int32.*floating"),
        (dict(bias_D=torch.zeros(33).bool()), "bias is torch.bool.*floating"),
        (dict(weight_DW=torch.zeros(33, 4, device="meta")), "weight is on meta, x on cpu"),
        (dict(backend="cuda"), "backend='cuda'.*'triton'"),
    ],
)
def test_refusals(change, said):
    x, weight, bias = make()
    with pytest.raises((ValueError, TypeError), match=said):
        causal_conv1d(**(dict(x_BTD=x, weight_DW=weight, bias_D=bias) | change))
