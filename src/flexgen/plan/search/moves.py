"""Moves points of a space as long as that helps. Knows the space's axes, and prices only through the score that it is given."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Protocol

from flexgen.plan.search.point import Point

Score = tuple[float, ...]
Move = Mapping[str, float]
# A move with a smaller gain counts as none, because looking for more such gains is not worth the time.
LEAST_IMPROVEMENT = 3e-4
# First coarse steps along one axis at a time. Then finer ones, also along two axes at once: at the edge of what fits, one share grows
# only where another shrinks. Then the finest along one axis: prompts of equal lengths fall evenly for a narrow range of quotas only.
COARSE_STEPS, FINE_STEPS, LAST_STEPS = (0.25, 0.125, 0.06, 0.03), (0.25, 0.1, 0.04, 0.015), (0.006, 0.002)
# The number of points, among those that coarse steps lead to, that are refined by fine steps.
REFINED = 2
# A kick draws an axis anew with probability DRAWN_AXES or moves it with probability MOVED_AXES (KICK is the standard deviation). Steps
# of KICK_STEPS follow.
DRAWN_AXES, MOVED_AXES, KICK, KICK_STEPS = 0.2, 0.5, 0.15, (0.1, 0.03, 0.01)
# The values of axes at which something vanishes or is all there is.
CORNER_VALUES = (
    ("kv_disk", 0.0), ("kv_disk", 1.0), ("kv_homes", 0.0), ("kv_homes", 0.5), ("kv_homes", 1.0), ("encoded", 0.0), ("encoded", 1.0),
)  # fmt: skip
# The search ends after so many kicks in a row that lead to nothing better.
FAILED_KICKS = 32


class Axes(Protocol):
    """The choices beside the numbers of a Point."""

    def free_axes(self, schedule: str) -> tuple[str, ...]:
        """Return the fields of Point that are not pinned, and make a difference."""
        ...

    def schedules(self) -> tuple[str, ...]:
        """Return the schedules to choose from."""
        ...

    def micro_batches(self) -> list[int]:
        """Return the sizes of micro-batches to choose from."""
        ...

    def host_attentions(self) -> tuple[bool, ...]:
        """Return whether the host attends to KV in its memory, both answers where that is to choose."""
        ...


# Takes a point, the choices, a score and whether to go on, and returns a point that is no worse.
Improvement = Callable[[Point, Axes, Callable[[Point], Score], Callable[[], bool]], Point]


def climb(
    starts: Sequence[Point], space: Axes, score: Callable[[Point], Score], goes_on: Callable[[], bool], *, also: Iterable[Point] = ()
) -> list[Point]:
    """Return the points that the starts lead to in coarse steps, `also`, and those that the best of all these lead to in fine steps."""
    found = [*also, *(_improved(start, space, score, goes_on, steps=COARSE_STEPS, in_pairs=False) for start in starts)]
    best = list({score(point): point for point in sorted(found, key=score)}.values())[:REFINED]
    return [*found, *(refine(point, space, score, goes_on) for point in best)]


def refine(point: Point, space: Axes, score: Callable[[Point], Score], goes_on: Callable[[], bool]) -> Point:
    """Return the point that this one leads to in fine steps, then in the finest."""
    point = _improved(point, space, score, goes_on, steps=FINE_STEPS, in_pairs=True)
    return _improved(point, space, score, goes_on, steps=LAST_STEPS, in_pairs=False)


def wander(best: Point, space: Axes, score: Callable[[Point], Score], goes_on: Callable[[], bool]) -> Point:
    """Return the best point that kicks lead to, one after the other, each followed by steps that help.

    Whole numbers (units, prompts in a pass, micro-batches) make a landscape of many small basins, which steps alone do not leave.
    """
    draw, failed = random.Random(0), 0
    while goes_on() and failed < FAILED_KICKS and space.free_axes(best.schedule):
        kicked = dataclasses.replace(best, **dict(_kick(best, space, draw)))
        there = _improved(kicked, space, score, goes_on, steps=KICK_STEPS, in_pairs=False)
        failed = 0 if _is_better(score(there), score(best)) else failed + 1
        best = min(best, there, key=score)
    return best


def _kick(point: Point, space: Axes, draw: random.Random) -> Iterator[tuple[str, float]]:
    """Yield the axes that a kick changes, and their new values."""
    for axis in space.free_axes(point.schedule):
        chance = draw.random()
        if chance < DRAWN_AXES:
            yield axis, draw.random()
        elif chance < DRAWN_AXES + MOVED_AXES:
            yield axis, min(max(getattr(point, axis) + draw.gauss(0, KICK), 0.0), 1.0)


def _improved(
    start: Point, space: Axes, score: Callable[[Point], Score], goes_on: Callable[[], bool], *, steps: Sequence[float], in_pairs: bool
) -> Point:
    """Return the point that is reached from `start` by moves that help, largest steps first, while `goes_on`."""
    best, value = start, score(start)
    for step in steps:
        moving = True
        while moving and goes_on():
            moving = False
            for move in _moves(space.free_axes(best.schedule), step, in_pairs=in_pairs):
                length = 1
                while goes_on() and (there := _moved(best, move, length)) != best and _is_better(found := score(there), value):
                    best, value, moving, length = there, found, True, 2 * length
            for there in _alternatives(best, space):
                if goes_on() and _is_better(found := score(there), value):
                    best, value, moving = there, found, True
    return best


def _is_better(found: Score, than: Score) -> bool:
    return found < (*than[:-1], than[-1] * (1 - LEAST_IMPROVEMENT))


def _moves(axes: Sequence[str], step: float, *, in_pairs: bool) -> Iterator[Move]:
    """Yield steps along each axis in both directions, and along all pairs of axes."""
    for axis, sign in product(axes, (-1, 1)):
        yield {axis: sign * step}
    if in_pairs:
        for (one, other), first, second in product(combinations(axes, 2), (-1, 1), (-1, 1)):
            yield {one: first * step, other: second * step}


def _moved(point: Point, move: Move, length: int) -> Point:
    """Return the point that is `length` times the move away, within the unit cube."""
    return dataclasses.replace(point, **{axis: min(max(getattr(point, axis) + length * by, 0.0), 1.0) for axis, by in move.items()})


def _alternatives(point: Point, space: Axes) -> Iterator[Point]:
    """Yield the same point with another value of one discrete choice, or with a corner value of an axis of homes."""
    yield dataclasses.replace(point, embedding=not point.embedding)
    free = space.free_axes(point.schedule)
    for axis, value in CORNER_VALUES:
        if axis in free:
            yield dataclasses.replace(point, **{axis: value})
    for schedule in space.schedules():
        yield dataclasses.replace(point, schedule=schedule)
    for tokens in space.micro_batches():
        yield dataclasses.replace(point, micro_batch_tokens=tokens)
    for host_attention in space.host_attentions():
        yield dataclasses.replace(point, host_attention=host_attention)
