"""Where a model is cut into stages so that the dearest stage costs least. A stage is any range that has a cost, which grows with it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

# The share of requests that never fit, then seconds: less is better, in this order.
Cost = tuple[float, float]
Layers = tuple[range, ...]


def best_cut(cost: Callable[[int, range], Cost], edges: Sequence[int], begin: Layers) -> Layers:
    """Return the cut whose dearest stage costs least; `begin` where none is better.

    Each round asks for a cut all of whose stages cost less than the dearest of the best so far. The first stages that are as long as that
    allows leave the fewest layers to the others; they are shorter only where a later one could not take a single layer.

    Args:
        cost: The cost of a stage, by its number, with these layers. More layers never cost less.
        edges: The layers at which a stage may begin or end, in rising order: the first is 0, the last the number of layers.
        begin: A cut to begin with: the better it is, the fewer costs are asked for.
    """
    best = begin
    while (better := _below(dearest(cost, best), cost, edges, best)) is not None:
        best = better
    return best


def proportional_cut(weights: Sequence[float], edges: Sequence[int]) -> Layers:
    """Return the cut whose stages have about so many layers relative to each other; each has one at least."""
    last, ends = len(edges) - 1, [0]
    for stage, reached in enumerate(itertools.accumulate(weights)):
        ends.append(min(max(round(last * reached / sum(weights)), ends[-1] + 1), last - (len(weights) - 1 - stage)))
    return tuple(range(edges[low], edges[high]) for low, high in itertools.pairwise(ends))


def dearest(cost: Callable[[int, range], Cost], cut: Layers) -> Cost:
    """Return the cost of the dearest stage."""
    return max(cost(stage, layers) for stage, layers in enumerate(cut))


def _below(limit: Cost, cost: Callable[[int, range], Cost], edges: Sequence[int], near: Layers) -> Layers | None:
    """Return a cut whose stages all cost less, or None where there is none."""
    last = len(edges) - 1
    stuck: set[tuple[int, int]] = set()

    def filled(stage: int, first: int) -> Layers | None:
        """Return the stages from this one on; None where one of them has no layer that costs less, so that those before must end earlier.

        Raises:
            _TooMuchIsLeft: The last stage costs too much, and would cost more if those before ended earlier.
        """
        if stage == len(near) - 1:
            rest = range(edges[first], edges[last])
            if cost(stage, rest) >= limit:
                raise _TooMuchIsLeft
            return (rest,)
        most = last - (len(near) - 1 - stage)  # each of the stages after it has a layer at least
        like = first + edges.index(near[stage].stop) - edges.index(near[stage].start)
        furthest = _furthest(lambda end: cost(stage, range(edges[first], edges[end])) < limit, first, most, like)
        for end in range(furthest, first, -1):
            if (stage + 1, end) not in stuck:
                others = filled(stage + 1, end)
                if others is not None:
                    return (range(edges[first], edges[end]), *others)
                stuck.add((stage + 1, end))
        return None

    try:
        return filled(0, 0)
    except _TooMuchIsLeft:
        return None


class _TooMuchIsLeft(Exception):
    """No cut costs less: the first stages are as long as they may be."""


def _furthest(holds: Callable[[int], bool], low: int, high: int, near: int) -> int:
    """Return the last number after `low` up to `high` for which `holds` is true, or `low`; it stays false once it is false.

    The search begins at `near`, in steps that double.
    """
    at, beyond, step = min(max(near, low + 1), high), high + 1, 1
    if holds(at):
        low = at
        while low + step < beyond:
            if holds(low + step):
                low, step = low + step, 2 * step
            else:
                beyond = low + step
    else:
        beyond = at
        while at - step > low:
            if holds(at - step):
                low = at - step
            else:
                beyond, step = at - step, 2 * step
    while beyond - low > 1:
        middle = (low + beyond) // 2
        low, beyond = (middle, beyond) if holds(middle) else (low, middle)
    return low
