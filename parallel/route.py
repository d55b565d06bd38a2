"""The way of a pass through the intervals: in which order it meets them, where it crosses ranks, and when."""

from __future__ import annotations

from functools import lru_cache

from .layout import Layout


class Route:
    """Of a pass left to right, or right to left (``backward``). ``open``: for each segment of the sequence, whether any
    row's state passes through it.

    A *place* is an index into ``order``, the intervals as the pass meets them. By place, ``owners`` are the ranks that
    hold them; ``closed`` their segments, from 0, through which no state passes, so that what leaves the place does not
    depend on what enters it; ``when`` is how many crossings, one behind another, bring a state there.
    """

    def __init__(self, layout: Layout, open: tuple[bool, ...], backward: bool) -> None:
        each = len(open) // layout.count
        self.order = range(layout.count)[::-1] if backward else range(layout.count)
        self.owners = [layout.owner(interval) for interval in self.order]
        self.closed = [[at for at in range(each) if not open[interval * each + at]] for interval in self.order]
        self.when = [0]
        for place in range(1, layout.count):
            leaves = 0 if self.closed[place - 1] else self.when[-1]
            self.when.append(leaves + (self.ends(place) is not None))

    def ends(self, place: int) -> tuple[int, int] | None:
        """The rank from which a state comes into a place and the one that holds it; None where it crosses no ranks."""
        if not 0 < place < len(self.owners) or self.owners[place - 1] == self.owners[place]:
            return None
        return self.owners[place - 1], self.owners[place]


route = lru_cache(Route)  # the same for all layers
