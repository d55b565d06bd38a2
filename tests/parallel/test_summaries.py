"""A rank summarises what somebody reads, and nothing else: M, U and D of its segments, against tables made by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from dnsp.kernels import chunk_torch
from dnsp.kernels.delta_rule import delta_rule
from dnsp.kernels.scan import Coming
from dnsp.parallel.grid import Grid
from dnsp.parallel.layout import Layout
from dnsp.parallel.plan import make_plan

# By rank, for each local segment: which of its summaries are made. Nothing comes into the first segment of a sequence,
# so there is no M, and no D, the gradient of what comes in; nothing goes on from its last one: no M, and no U.
ONE_SEGMENT_AN_INTERVAL: dict[tuple[str, int], list[str]] = {
    ("contiguous", 1): ["-"],
    ("zigzag", 1): ["-"],
    ("contiguous", 2): ["U", "D"],  # no M at all
    ("zigzag", 2): ["U D", "MUD MUD"],
    ("contiguous", 4): ["U", "MUD", "MUD", "D"],
    ("zigzag", 4): ["U D", "MUD MUD", "MUD MUD", "MUD MUD"],
}
OTHERS: dict[str, tuple[str, int, dict[str, Any], list[str]]] = {
    "two segments an interval": ("contiguous", 2, {"each": 2}, ["U MUD", "MUD D"]),
    "a document starts in interval 1": ("contiguous", 4, {"starts": [0, 100]}, ["U", "UD", "MUD", "D"]),
    "of one row alone": ("contiguous", 2, {"each": 2, "rows": [[0, 70], [0]]}, ["U MUD", "MUD D"]),
    "goes on from a state": ("contiguous", 2, {"starts": [-1]}, ["MUD", "D"]),
    "the final state is wanted": ("zigzag", 2, {"final": True}, ["U MUD", "MUD MUD"]),
}


@dataclass
class NoScan:
    """Zero states, and as many of them as there are segments."""

    here = False
    asked: list[str] = field(default_factory=list)

    def forward(self, M: Tensor, U: Tensor, *_: object) -> Coming:
        return lambda: (torch.zeros_like(U), None)

    def reverse(self, M: Tensor, D: Tensor, *_: object) -> Coming:
        return lambda: (torch.zeros_like(D), None)


def made(kind: str, ranks: int, rank: int, case: dict[str, Any], patch: pytest.MonkeyPatch) -> str:
    """What one rank makes of each of its segments, forward and backward."""
    each, rows = case.get("each", 1), case.get("rows") or [case.get("starts", [0])]
    layout = Layout(kind, ranks, 64 * each * (2 if kind == "zigzag" and ranks > 1 else 1) * ranks)
    plan = make_plan(rows, layout, Grid(ranks, rank, ranks), 64)
    asked: list[tuple[bool, ...]] = []
    forward, backward = chunk_torch.summarise, chunk_torch.summarise_backward

    def summarise(x: Any, need_M: tuple[bool, ...], need_U: tuple[bool, ...]) -> tuple[Tensor, Tensor, None]:
        asked.extend([need_M, need_U])
        return forward(x, need_M, need_U)

    def summarise_backward(x: Any, do: Tensor, need_D: tuple[bool, ...]) -> Tensor:
        asked.append(need_D)
        return backward(x, do, need_D)

    patch.setattr(chunk_torch, "summarise", summarise)
    patch.setattr(chunk_torch, "summarise_backward", summarise_backward)
    B, T = plan.batch, plan.local_tokens
    q, k, v = (torch.randn(B, T, 1, 8, requires_grad=True) for _ in range(3))
    state = torch.zeros(B, 1, 8, 8, requires_grad=True) if plan.goes_on else None
    o, _ = delta_rule(
        q, k, v, None, torch.rand(B, T, 1), scale=1.0, segments=plan.segments, scan=NoScan(),
        doc_start_BT=plan.doc_start_BT, initial_state_BHKV=state, output_final_state=case.get("final", False),
    )  # fmt: skip
    o.sum().backward()
    patch.undo()
    return " ".join(
        "".join(name for name, need in zip("MUD", needs, strict=True) if need) or "-"
        for needs in zip(*asked, strict=True)
    )


@pytest.mark.parametrize(("kind", "ranks"), ONE_SEGMENT_AN_INTERVAL)
def test_what_each_rank_makes(kind: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [made(kind, ranks, rank, {}, monkeypatch) for rank in range(ranks)]
    assert found == ONE_SEGMENT_AN_INTERVAL[kind, ranks]


@pytest.mark.parametrize("name", OTHERS)
def test_what_each_rank_makes_where(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, ranks, case, expected = OTHERS[name]
    assert [made(kind, ranks, rank, case, monkeypatch) for rank in range(ranks)] == expected
