"""Gluon's pass 1, emulated, against its definition in fp64 (:mod:`dnsp.kernels.triton_prepare` has it in words)."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dnsp.kernels.gluon_chunk import tiles_of, tokens_of
from dnsp.kernels.gluon_prepare import prepare_pairs_kernel
from dnsp.kernels.triton_prepare import EPS, ROWS, SEVERAL, SPOILT
from tests.kernels.emulated import launch

W, SCALE, SEGMENT = 128, 0.5, 2
# Largest errors, relative: tiles in bf16, where A is near the identity; scales in fp32.
LIMITS = {"P": 4e-3, "A": 2e-3, **dict.fromkeys(ROWS, 2e-6), "through": 2e-6, "bound": 2e-6}


@dataclass(frozen=True)
class Case:
    """``starts``: of documents, in each row; None where the kernel is told of none. ``lost``: a token of row 0 with an
    infinite value in its first value head."""

    B: int = 1
    T: int = 150
    H: int = 1
    G: int = 2
    normalise: bool = True
    decays: bool = True
    starts: tuple[int, ...] | None = None
    lost: int | None = None


CASES = {
    "two value heads": Case(B=2, H=2),
    "one": Case(G=1, T=128, normalise=False),
    "three, no decay": Case(G=3, T=70, decays=False),
    "four": Case(G=4, T=64),
    "documents": Case(T=200, starts=(0, 70, 150)),
    "documents of one head": Case(T=100, G=1, starts=(0, 1, 64)),
    "a lost document": Case(T=200, starts=(0, 70, 100, 150), lost=80),
}


def inputs(case: Case) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(case.B, case.T, *shape, generator=draw)

    q, k, v = normal(case.H, W), normal(case.H, W), normal(case.H * case.G, W)
    if not case.normalise:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    if case.lost is not None:
        v[0, case.lost, 0, 5] = float("inf")
    heads = case.H * case.G
    doc = torch.zeros(case.B, case.T, dtype=torch.int32)
    for start in case.starts or ():
        doc[:, start:] = start
    gates = {"g": F.logsigmoid(normal(heads)) / 4, "beta": normal(heads).sigmoid()}
    return {name: x.bfloat16() for name, x in {"q": q, "k": k, "v": v}.items()} | gates | {"doc": doc}


def emulated(case: Case, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tiles ``[B, H, G, NC, 64, 64]``, scales ``[B, H, G, NC, 64]``, and a number a chunk."""
    B, T, HV, _ = x["v"].shape
    NC = -(-T // 64)
    P, A = (torch.full((B * HV * NC, 64, 64), torch.nan, dtype=torch.bfloat16) for _ in range(2))
    rows = torch.full((B * HV, NC, len(ROWS), 64), torch.nan)
    through, bound = (torch.full((B * HV, NC), torch.nan) for _ in range(2))
    starts = torch.arange(0, NC, SEGMENT) * 64
    gates = x["g"] if case.decays else x["beta"], x["beta"], x["doc"], starts
    strides = [stride for name in ("v", "g", "beta") for stride in x[name].stride()[:3]]
    launch(
        prepare_pairs_kernel, (B * case.H, NC),
        tokens_of(x["q"]), tokens_of(x["k"]), x["v"], tiles_of(P), tiles_of(A), *gates, rows, through, bound,
        T, NC, SEGMENT, SCALE, *strides, H=case.H, G=case.G, HEADS=1 << (case.G - 1).bit_length(), HAS_G=case.decays,
        HAS_DOC=case.starts is not None, NORM=case.normalise,
    )  # fmt: skip
    by_chunk = B, case.H, case.G, NC
    found = {"P": P.view(*by_chunk, 64, 64), "A": A.view(*by_chunk, 64, 64)}
    found |= {name: rows[:, :, i].reshape(*by_chunk, 64) for i, name in enumerate(ROWS)}
    return found | {"through": through.view(by_chunk), "bound": bound.view(by_chunk)}


def truth(case: Case, x: dict[str, Tensor]) -> dict[str, Tensor]:
    NC = -(-case.T // 64)

    def chunks(y: Tensor) -> Tensor:
        """``[B, T, heads, ...]`` to ``[B, heads, NC, 64, ...]``, zeros behind the last token."""
        padded = torch.zeros(case.B, NC * 64, *y.shape[2:], dtype=torch.float64)
        padded[:, : case.T] = y
        return padded.unflatten(1, (NC, 64)).movedim(3, 1)

    q, k = (chunks(x[name]).unsqueeze(2) for name in "qk")
    g, beta = (chunks(x[name]).unflatten(1, (case.H, case.G)) for name in ("g", "beta"))
    g = g if case.decays else torch.zeros_like(g)
    doc = F.pad(x["doc"].double(), (0, NC * 64 - case.T)).long()
    doc[:, case.T :] = doc[:, case.T - 1 : case.T]
    d = doc.view(case.B, 1, 1, NC, 64)
    same = d[..., :, None] == d[..., None, :]
    keep = same & torch.ones(64, 64, dtype=torch.bool).tril()
    b = (keep * g[..., None, :]).sum(-1)
    if case.normalise:
        rq, rk = ((y.square().sum(-1) + EPS.value).rsqrt() for y in (q, k))
    else:
        rq = rk = torch.ones_like(q[..., 0])
    decay = torch.where(keep, (b[..., :, None] - b[..., None, :]).exp(), 0.0)
    unit_q, unit_k = q * rq[..., None], k * rk[..., None]
    N = (unit_k @ unit_k.mT * decay * beta[..., None, :]).tril(-1)
    chunk_start = 64 * torch.arange(NC)[:, None]
    goes_on, last = (d < chunk_start) | (case.starts is None), d == d[..., -1:]
    total = (g * last).sum(-1)
    erased = beta * unit_k.square().sum(-1) * g.exp()
    longer = torch.maximum(g.exp(), (g.exp() - erased).abs()).log().sum(-1)
    found = {
        "P": SCALE * (unit_q @ unit_k.mT) * decay, "A": torch.linalg.inv(torch.eye(64, dtype=torch.float64) + N),
        "of_q": torch.where(goes_on, b.exp() * rq * SCALE, 0.0), "of_k": torch.where(goes_on, b.exp() * rk, 0.0),
        "of_out": torch.where(last, (b[..., -1:] - b).exp() * rk, 0.0), "beta": beta, "b_hi": b, "b_lo": b * 0.0,
        "rq": rq, "rk": rk, "through": torch.where(goes_on[..., -1], total.exp(), 0.0),
        "bound": torch.where(goes_on[..., -1], longer, -torch.inf),
    }  # fmt: skip
    several = (d[..., :1] != d[..., -1:])[..., 0]
    found["through"] = torch.where(several & (case.starts is not None), SEVERAL.value, found["through"])
    return {name: y.broadcast_to(*beta.shape[:4], *y.shape[4:]) for name, y in found.items()}


@pytest.mark.parametrize("name", CASES)
def test_tiles_and_scales(name: str) -> None:
    case = CASES[name]
    x = inputs(case)
    found = emulated(case, x)
    if case.lost is not None:  # its document, in its chunk: as of tokens that are zero
        c, lost = case.lost // 64, torch.zeros(case.T, dtype=torch.bool)
        lost[:] = x["doc"][0] == x["doc"][0, case.lost]
        inside = lost[c * 64 : c * 64 + 64]
        assert (found["through"][0, :, :, c] == SPOILT.value).all()
        assert found["of_q"][0, :, :, c][..., inside].isnan().all()
        found["of_q"][0, :, :, c][..., inside] = 0.0
        found["through"][0, :, :, c] = SEVERAL.value
        for part in ("q", "k", "beta"):
            x[part][0, c * 64 : c * 64 + 64][inside] = 0.0
        x["g"][0, c * 64 : c * 64 + 64][inside] = 0.0
    expected = truth(case, x)
    found["b_hi"], found["b_lo"] = found["b_hi"].double() + found["b_lo"], found["b_lo"] * 0.0
    for part, limit in LIMITS.items():
        a, b = found[part].double(), expected[part]
        if case.lost is not None:  # norms of what is left out are of no use
            a, b = (torch.where(expected["beta"] == 0, 0.0, y) if part in ("rq", "rk", "of_out") else y for y in (a, b))
        gone = b.isinf()
        assert torch.equal(a[gone], b[gone]), part
        error = (a - b).masked_fill(gone, 0.0).norm() / b.masked_fill(gone, 0.0).norm().clamp(min=1e-30)
        assert error <= limit, (part, float(error))
