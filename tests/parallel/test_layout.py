"""Intervals: every token held once, in order; what does not fit is refused in words."""

from __future__ import annotations

import pytest

from dnsp.parallel.errors import LayoutError
from dnsp.parallel.layout import Layout


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
def test_every_token_is_held_once(kind: str, ranks: int) -> None:
    layout = Layout(kind, ranks, 64 * 2 * ranks * 3)
    held = sorted(bounds for rank in range(ranks) for bounds in layout.intervals(rank))
    assert held[0][0] == 0 and held[-1][1] == layout.tokens
    assert all(a[1] == b[0] for a, b in zip(held, held[1:], strict=False))
    for rank in range(ranks):
        assert all(layout.owner(i) == rank for i in layout.indices(rank))
        assert list(layout.intervals(rank)) == sorted(layout.intervals(rank))


def test_zigzag_balances_causal_work() -> None:
    layout = Layout("zigzag", 4, 64 * 8)
    assert [layout.indices(rank) for rank in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]
    assert {sum(start + stop for start, stop in layout.intervals(rank)) for rank in range(4)} == {2 * 64 * 8}


def test_one_process_takes_any_length() -> None:
    assert Layout("zigzag", 1, 1001).intervals(0) == ((0, 1001),)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("spiral", 2, 1024), ["'spiral'", "contiguous", "zigzag"]),
        (("zigzag", 2, 1000), ["1000", "4 intervals", "768 or 1024"]),
        (("contiguous", 3, 1024), ["1024", "3 intervals", "960 or 1152"]),
        (("zigzag", 8, 512), ["512", "16 intervals", "1024", "fewer ranks"]),
        (("contiguous", 0, 512), ["0"]),
    ],
)
def test_refusals(arguments: tuple[str, int, int], words: list[str]) -> None:
    with pytest.raises(LayoutError) as refused:
        Layout(*arguments)
    assert all(word in str(refused.value) for word in words), refused.value
