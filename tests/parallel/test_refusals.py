"""Shapes and options that do not fit, refused by the ops in words."""

from __future__ import annotations

import pytest
import torch

from dnsp.parallel.attention import attention
from dnsp.parallel.delta_rule import delta_rule
from dnsp.parallel.errors import PlanError
from dnsp.parallel.grid import Grid
from dnsp.parallel.halo import causal_conv1d
from dnsp.parallel.layout import Layout
from dnsp.parallel.plan import local_plan, make_plan

X = torch.zeros(1, 64, 4, 8)
PLAN = local_plan([[0]], 64)


@pytest.mark.parametrize(
    ("q", "k", "v", "words"),
    [
        (X[:, :60], X[:, :60], X[:, :60], "T=64 local tokens"),
        (X.expand(2, -1, -1, -1), X, X, "B=1 rows"),
        (X, X[:, :, :3], X[:, :, :3], "4 query heads over 3 key heads"),
        (X, X[..., :4], X, "D=8"),
        (X, X[:, :, :2], X, "k.*v"),
    ],
)
def test_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        attention(q, k, v, plan=PLAN)


def test_convolution() -> None:
    with pytest.raises(ValueError, match="T=64, the plan's local tokens"):
        causal_conv1d(torch.zeros(1, 60, 8), torch.zeros(8, 4), plan=PLAN)
    two = make_plan([[0]], Layout("contiguous", 2, 128), Grid(2, 0, 2))
    with pytest.raises(ValueError, match="66 taps reaches beyond an interval of 64"):
        causal_conv1d(torch.zeros(1, 64, 8), torch.zeros(8, 66), plan=two)


def test_delta_rule() -> None:
    gates = torch.zeros(1, 64, 4)
    with pytest.raises(PlanError, match="initial_state: no document .* begin its row .* with -1"):
        delta_rule(X, X, X, gates, gates, plan=PLAN, initial_state=torch.zeros(1, 4, 8, 8))
    short = slice(None, 60)
    with pytest.raises(ValueError, match="doc_start"):
        delta_rule(X[:, short], X[:, short], X[:, short], None, gates[:, short], plan=PLAN)


def test_wide_values_take_the_plain_backend() -> None:
    """Values wider than keys, against the same with both widths the same: the extra columns change nothing."""
    q, k, v = torch.randn(1, 64, 4, 8), torch.randn(1, 64, 2, 8), torch.randn(1, 64, 2, 12)
    o = attention(q, k, v, plan=PLAN)
    assert o.shape == (1, 64, 4, 12)
    assert (o[..., :8] - attention(q, k, v[..., :8], plan=PLAN)).norm() <= 1e-6 * o.norm()
