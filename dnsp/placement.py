"""Where the ranks of a run lie: which node holds which, and whether a sequence group has to cross between nodes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

SHOWN = 16  # nodes that get a line of their own


def describe(nodes: Sequence[tuple[int, str]], sequence: int) -> list[str]:
    """Lines for people.

    Args:
        nodes: of each rank in order, its node's number and name. Names may repeat, numbers tell nodes apart.
        sequence: ranks of a sequence group; group n is ranks ``n * sequence`` to ``(n + 1) * sequence - 1``.
    """
    if len(nodes) == 1:
        return [f"placement: one rank on {nodes[0][1]}"]
    ranks: dict[tuple[int, str], list[int]] = {}
    for rank, node in enumerate(nodes):
        ranks.setdefault(node, []).append(rank)
    groups = [set(nodes[first : first + sequence]) for first in range(0, len(nodes), sequence)]
    inside = sum(len(where) == 1 for where in groups)
    most = "all" if inside == len(groups) else inside
    lines = [
        f"placement: {_many(len(nodes), 'rank')} on {_many(len(ranks), 'node')}, "
        f"{_many(len(groups), 'sequence group')} of {sequence}, {most} inside a node"
    ]
    for node, mine in list(ranks.items())[:SHOWN]:
        touched = sorted({rank // sequence for rank in mine})
        crossing = [group for group in touched if len(groups[group]) > 1]
        text = f"  {node[1]} (node {node[0]}): ranks {spans(mine)}, sequence groups {spans(touched)}"
        lines.append(text + (f" ({spans(crossing)} with other nodes)" if crossing else ""))
    if len(ranks) > SHOWN:
        lines.append(f"  and {_many(len(ranks) - SHOWN, 'more node')}")
    return lines


def spans(numbers: Sequence[int]) -> str:
    """Increasing numbers in short.

    >>> spans([0, 1, 2, 5])
    '0-2, 5'
    """
    parts = []
    for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        values = [value for _, value in run]
        parts.append(str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}")
    return ", ".join(parts)


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
