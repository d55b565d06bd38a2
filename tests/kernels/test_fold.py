"""Segments that forget, whose M is zero: the fold does not read it, and its bits are the same."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dnsp.kernels import chunk_triton, operators, proof_run, scan, triton_scan
from dnsp.kernels.reference import Rule
from dnsp.kernels.segments import Inputs, Segments
from tests.kernels.cases import Case, chunked, errors, truth
from tests.kernels.interpreter import Interpreter

B, HV, K, V = 2, 3, 16, 16


def bits(x: Tensor) -> Tensor:
    """One NaN is as good as another."""
    return x.masked_fill(x.isnan(), torch.nan).view(torch.int32)


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(found, expected, strict=True))


def summaries(N: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """M, the same with NaN where it is zero, U, a state, what continues, and what forgets: all segments in a head, some
    in the next, none in the last."""
    draw = torch.Generator().manual_seed(N)
    M, U, first = (torch.randn(shape, generator=draw) for shape in ((N, B, HV, K, K), (N, B, HV, K, V), (B, HV, K, V)))
    U[..., 0], first[..., 0] = -0.0, -first[..., 0].abs()  # signs of zeros
    flags = (torch.rand(N, B, HV, generator=draw) < torch.tensor([1.0, 0.5, 0.0])).int()
    zero = (flags != 0)[..., None, None]
    continues = torch.ones(N, B, dtype=torch.bool)
    continues[N // 2, 1] = False
    M = M.masked_fill(zero, 0.0) / K**0.5
    return M, M.masked_fill(zero, torch.nan), U, first, continues, flags


def other_bits() -> list[str]:
    """Folds that have other bits where they are told what forgets."""
    wrong = []
    for N, has_first, documents, reverse in [*product((4,), *[(False, True)] * 3), (66, True, True, True)]:
        M, unread, U, first, continues, flags = summaries(N)
        U[N // 2 - 1, :, :, 5, 3] = torch.inf  # its column is lost from there on, until a document begins
        start, passes = first if has_first else None, continues if documents else None
        if documents:
            flags[N // 2, 1] = 0  # nobody says so of an M that is not needed
            unread[N // 2, 1] = torch.nan
        for steps in (N - 1, N) if N == 4 else (N - 1,):
            expected = triton_scan.fold(M, U, start, passes, None, steps, reverse)
            if not same(triton_scan.fold(unread, U, start, passes, flags, steps, reverse), expected):
                wrong.append(f"{N} {has_first} {documents} {reverse} {steps}")
        if N == 4 and has_first == documents:
            expected = proof_run._by_mail(M, U, start, passes, None, reverse)
            if not same(proof_run._by_mail(unread, U, start, passes, flags, reverse), expected):
                wrong.append(f"by mail: {has_first} {documents} {reverse}")
    return wrong


def where_it_is_not_finite(value: float, reverse: bool) -> list[Any]:
    """Of a state in one column of which something is not finite: whether bits are the same, and the rows, heads and
    columns in which the state behind one segment is not finite."""
    M, unread, U, first, _, flags = summaries(1)
    first[1, :, 5, 7] = value
    _, last = triton_scan.fold(unread, U, first, None, flags, 1, reverse)
    expected = triton_scan.fold(M, U, first, None, None, 1, reverse)[1]
    gone = ~last.isfinite()
    return [same((last,), (expected,)), gone.nonzero()[:, [0, 1, 3]].unique(dim=0).tolist(), int(gone.sum())]


def flags_of_summaries() -> dict[str, Any]:
    """Of heads whose decays are strong, mild until they leave exp(-90), and strong in one segment alone."""
    T, tokens = 384, 128
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, T, heads, K, generator=draw) for heads in (1, 1, HV))
    g = torch.full((B, T, HV), -0.01)
    g[:, :, 0] = -20.0
    g[:, 320:384, 1] = -90 / 64  # fp32 has numbers as small, but none of them is normal
    g[:, 128:256, 2] = -20.0
    part = Segments(tokens, tuple(range(0, T, tokens)), T)
    x = Inputs(q, F.normalize(k, dim=-1), v, g, torch.rand(B, T, HV, generator=draw), None, part, 1.0, Rule(), False)
    p = chunk_triton.prepare(x)
    M, _, flags = chunk_triton.summarise(p, (True,) * 3, (True,) * 3)
    untouched = torch.full_like(flags, 7)
    need = torch.tensor([[1, 0], [1, 1], [1, 0]], dtype=torch.int32)
    chunk_triton._forward(p, "summarise", need=need, M=M.clone(), U=torch.empty_like(M), forgets=untouched)
    zero = (M == 0).flatten(3).all(-1)
    return {
        "as M": torch.equal(flags, zero.int()),
        "by segment and head": flags[:, 0].tolist(),
        "where M is needed": untouched[:, 0].tolist(),
    }


def errors_of_the_rule() -> tuple[dict[str, float], list[list[int]]]:
    """With the fold by its kernel; and by fold how many segments forget, and do not."""
    scan.on_gpu = lambda U: True  # type: ignore[assignment]
    told: list[list[int]] = []
    fold = operators.fold

    def noted(M: Tensor, U: Tensor, first: Any, continues: Any, forgets: Tensor, *rest: Any) -> Any:
        told.append([int((forgets[1:-1] == n).sum()) for n in (1, 0)])  # M is needed of all but the outermost
        return fold(M, U, first, continues, forgets, *rest)

    operators.fold = noted  # type: ignore[assignment]
    case = Case(500, decays=("strong", "weak"), V=16, HV=1, l2norm=True)
    return errors(chunked(case, torch.float32, 128, backend="triton"), truth(case)), told


@pytest.mark.timeout(300)
def test_the_bits_are_the_same(interpreter: Interpreter) -> None:
    assert interpreter("test_fold:other_bits") == []


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_so_in_its_column(interpreter: Interpreter, value: float, reverse: bool) -> None:
    """Zero times what is not finite is not zero: a state that is lost does not come back behind a strong decay."""
    alike, where, count = interpreter("test_fold:where_it_is_not_finite", value, reverse)
    assert alike and where == [[1, head, 7] for head in range(HV)] and count == HV * K


def test_summaries_say_where_they_are_zero(interpreter: Interpreter) -> None:
    found = interpreter("test_fold:flags_of_summaries")
    assert found == {
        "as M": True,
        "by segment and head": [[1, 0, 0], [1, 0, 1], [1, 1, 0]],
        "where M is needed": [[7, 7, 7], [1, 0, 1], [7, 7, 7]],
    }


@pytest.mark.timeout(300)
def test_the_rule_with_strong_decays(interpreter: Interpreter) -> None:
    found, told = interpreter("test_fold:errors_of_the_rule")
    assert max(found.values()) < 5e-6, found
    assert told == [[2, 2], [2, 2]]  # two segments of the row whose decays are strong
