"""Gluon's kernels, emulated, in whole calls of the delta rule: against the recurrence in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from dnsp.kernels import chunk_triton
from tests.kernels import test_nonfinite
from tests.kernels.cases import Case, chunked, truth
from tests.kernels.emulated import Emulating, emulating
from tests.kernels.test_triton import assert_right

W: Any = {"K": 128, "V": 128}
ALL = {"prepare_pairs_kernel", "whole_states_kernel", "whole_reverse_kernel", "backward_kernel", "gates_kernel"}
# Several documents in the first chunk and in the third, one from the first chunk into the second.
PACKED = (0, 5, 97, 150)
STATES: Any = {"initial": True, "final": True}
CASES: dict[str, tuple[Case, int | None]] = {  # and tokens of a segment
    "one segment": (Case(300, ("weak",), **W, **STATES, HV=1), None),  # each buffer more than once
    "one chunk": (Case(150, ("weak",), **W, l2norm=True), 64),
    "decays": (Case(150, ("none", "strong", "any", "mixed"), **W, HV=1), 64),
    "no decay": (Case(200, ("none",), **W, g=False, l2norm=True), 128),
    "states": (Case(150, ("weak", "spikes"), **W, **STATES, HV=1, l2norm=True), 64),
    "three value heads": (Case(100, ("weak",), **W, H=2, HV=6, l2norm=True), 64),
    "documents": (Case(200, ("weak", "mixed"), **W, starts=(PACKED, (0, 1, 2, 64))), 64),
    "documents, no decay": (Case(200, ("none",), **W, starts=(PACKED,), g=False, l2norm=True), 128),
    "documents and states": (
        Case(320, ("weak", "strong"), **W, **STATES, starts=(PACKED, (0, 190)), l2norm=True), 192
    ),
}  # fmt: skip


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulating]:
    """The CPU stands in for one."""
    monkeypatch.setattr(chunk_triton, "is_hopper", lambda device: True)
    monkeypatch.setattr(chunk_triton, "refuse", lambda k, v: None)
    with emulating() as how:
        yield how


@pytest.mark.parametrize("name", CASES)
def test_against_fp64(name: str, hopper: Emulating) -> None:
    check(name, torch.bfloat16, hopper)


def test_fp16(hopper: Emulating) -> None:
    check("documents and states", torch.float16, hopper)


def check(name: str, dtype: torch.dtype, hopper: Emulating) -> None:
    case, tokens = CASES[name]
    found = chunked(case, dtype, tokens, backend="triton")
    assert hopper.launched == ALL
    assert_right(found, truth(case, dtype), dtype)


def test_a_spoilt_document(hopper: Emulating, monkeypatch: pytest.MonkeyPatch) -> None:
    few = "v", "do", "nothing"
    case, layout, tokens = test_nonfinite.CASES["one begins"]
    case = replace(case, H=len(few), HV=2 * len(few))
    monkeypatch.setattr(test_nonfinite, "BAD", few)
    monkeypatch.setitem(test_nonfinite.CASES, "few", (case, layout, tokens))
    assert test_nonfinite.check("few", "nan", torch.bfloat16, "triton") == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["documents", "documents that share chunks", "one goes on, one segment"])
def test_spoilt_documents(name: str, hopper: Emulating) -> None:
    assert test_nonfinite.check(name, "inf", torch.bfloat16, "triton") == []
