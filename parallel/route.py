"""The way of a pass through the intervals: in which order it meets them, where it crosses ranks, and when; and what one
rank does on it. All of it follows from the plan, and is worked out once for all layers."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from .layout import Layout

Part = tuple[int, int]  # a place, and which part of the state that enters it


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


route = lru_cache(Route)


class Leg(NamedTuple):
    """What enters a place, or a zero state, is taken through some of a rank's segments; and on into the next place.

    ``steps``: of the segments, those that are crossed. ``source``, ``target``: the neighbour in memory that what enters
    comes from, and to which what leaves goes."""

    place: int
    interval: int
    segments: slice
    steps: int
    enters: bool
    goes_on: bool
    source: int | None
    target: int | None


class Itinerary:
    """What one rank does in a pass.

    ``each``: segments of an interval; ``begins``, ``goes_on``: whether a state enters the first place, and whether what
    leaves the last is wanted; ``near``: the group's ranks that are neighbours in memory, between which nothing goes by
    message; ``parts`` of a state that travel apart; ``on_host``: the host carries messages.

    ``route``; ``buffers``: places that what enters them is written into; ``first``: legs that wait for nobody;
    ``agenda``, in order: messages that are posted, each list together, and then legs and the part of the state that is
    taken on them; ``ending``: legs whose end is nobody's to wait for.
    """

    def __init__(
        self, layout: Layout, open: tuple[bool, ...], backward: bool, rank: int, each: int, begins: bool,
        goes_on: bool, near: tuple[int, ...], parts: int, on_host: bool,
    ) -> None:  # fmt: skip
        self.route = way = route(layout, open, backward)
        self._rank, self._each, self._near, self._wanted = rank, each, near, goes_on
        self._mine, self._last = layout.indices(rank), layout.count - 1
        here = sorted(way.order.index(interval) for interval in self._mine)
        self.buffers: list[int] = []
        self.first: list[Leg] = []
        self.ending: list[Leg] = []
        passing: dict[int, Leg] = {}
        for place in here:
            if self._by_message(place):
                self.buffers.append(place)
            if parts > 1 and self._goes_on(place):
                self.buffers.append(place + 1)
            if place == 0 and not begins and self._goes_on(place):  # nothing to wait for, whatever is closed
                whole = slice(self._at(place), self._at(place) + each)
                self.first.append(self._leg(place, whole, enters=False))
                continue
            enters, leaves = self._segments(place, backward)
            if leaves is not None:
                self.first.append(self._leg(place, leaves, enters=False))
            if leaves is not None or not self._goes_on(place):
                self.ending.append(self._leg(place, enters, goes_on=False))
            elif way.when[place] == 0:
                self.first.append(self._leg(place, enters))
            else:
                passing[place] = self._leg(place, enters)
        posts, turns = self._by_time(here, passing, parts, on_host)
        self.agenda = [
            (posts.get(time, []), [(passing[place], part) for place, part in turns.get(time, [])])
            for time in sorted({*posts, *turns})
        ]

    def _by_time(
        self, here: Iterable[int], passing: Iterable[int], parts: int, on_host: bool
    ) -> tuple[dict[int, list[list[Part]]], dict[int, list[Part]]]:
        """Messages that are posted together, and parts that are folded after that.

        A part comes into a place at a time that both ends know, and a rank posts the messages of one time together; so
        a transport may take them one after another, and none waits for a later one. The host does not, and posts at
        once what waits for nobody: calls that are under way together keep their order.
        """
        posts: dict[int, list[list[Part]]] = {}
        turns: dict[int, list[Part]] = {}
        when = self.route.when
        for place, part in product((place + at for place in here for at in (0, 1)), range(parts)):
            if self._by_message(place):
                at_once = on_host and (self.route.owners[place] == self._rank or when[place] == 1)
                now = posts.setdefault(0 if at_once else when[place] + part, [])
                if on_host or not now:
                    now.append([])
                now[-1].append((place, part))
        for place, part in product(passing, range(parts)):
            turns.setdefault(when[place] + part, []).append((place, part))
        return posts, turns

    def _segments(self, place: int, backward: bool) -> tuple[slice, slice | None]:
        """Local segments that what enters a place comes to; and, where it does not come through, those behind."""
        first = self._at(place)
        last, closed = first + self._each, self.route.closed[place]
        if not closed or not self._goes_on(place):
            return slice(first, last), None
        if backward:
            return slice(first + closed[0], last), slice(first, first + closed[0] + 1)
        return slice(first, first + closed[-1] + 1), slice(first + closed[-1], last)

    def _leg(self, place: int, segments: slice, *, enters: bool = True, goes_on: bool = True) -> Leg:
        steps = segments.stop - segments.start - (not goes_on)
        before = self.route.ends(place) if enters else None
        after = self.route.ends(place + 1) if goes_on else None
        source = self._near.index(before[0]) if before and before[0] in self._near else None
        target = self._near.index(after[1]) if after and after[1] in self._near else None
        return Leg(place, self.route.order[place], segments, steps, enters, goes_on, source, target)

    def _at(self, place: int) -> int:
        """The first of a place's segments among this rank's."""
        return self._mine.index(self.route.order[place]) * self._each

    def _goes_on(self, place: int) -> bool:
        """Whether anyone wants what leaves a place."""
        return place < self._last or self._wanted

    def _by_message(self, place: int) -> bool:
        """Whether this rank sends or receives what enters a place, and not by mail."""
        ends = self.route.ends(place)
        return ends is not None and self._rank in ends and not set(ends) <= set(self._near)


itinerary = lru_cache(Itinerary)
