"""Cuts against all cuts, for costs that grow with the layers of a stage."""

from __future__ import annotations

import functools
import itertools
import random

import pytest

from flexgen.plan.stages.cut import best_cut, dearest, proportional_cut


def all_cuts(edges, number):
    """Every way to give each of so many stages some layers."""
    for inner in itertools.combinations(edges[1:-1], number - 1):
        yield tuple(range(start, stop) for start, stop in itertools.pairwise((0, *inner, edges[-1])))


@pytest.mark.parametrize("seed", range(60))
def test_no_cut_is_better(seed):
    draw = random.Random(seed)
    layers, number = draw.randint(4, 11), draw.randint(1, 4)
    weights = [draw.choice([1.0, 1.0, 2.5, 0.0]) for _ in range(layers)]
    speeds = [draw.choice([1.0, 1.0, 3.0]) for _ in range(number)]
    most = [draw.choice([layers, layers // 2]) for _ in range(number)]  # of some machines no plan has more
    edges = [0, *sorted(draw.sample(range(1, layers), draw.randint(number - 1, layers - 1))), layers]
    asked = []

    @functools.cache
    def cost(stage, part):
        asked.append(part)
        if len(part) > most[stage]:
            return float("inf"), float("inf")
        return 0.0, sum(weights[layer] for layer in part) / speeds[stage] + 0.1 * (part.stop == layers)

    found = best_cut(cost, edges, proportional_cut([1.0] * number, edges))
    assert [layer for part in found for layer in part] == list(range(layers))
    assert all(len(part) and part.start in edges for part in found)
    assert dearest(cost, found) == min(dearest(cost, cut) for cut in all_cuts(edges, number))


def test_few_costs_are_asked_for():
    """64 equal machines and 126 layers: what is kept for one serves all, and the first cut is nearly the best."""
    asked = set()

    def cost(stage, part):
        asked.add((len(part), part.start == 0, part.stop == 126))
        return 0.0, len(part) + 0.5 * (part.stop == 126)

    edges = list(range(127))
    found = best_cut(cost, edges, proportional_cut([1.0] * 64, edges))
    assert dearest(cost, found) == (0.0, 2.0)
    assert len(asked) < 20


def test_a_cut_in_proportion():
    assert proportional_cut([1.0, 1.0, 2.0], [0, 1, 2, 3, 4, 5, 6, 7, 8]) == (range(2), range(2, 4), range(4, 8))
    assert proportional_cut([1000.0, 1.0, 1.0], [0, 1, 2, 3]) == (range(1), range(1, 2), range(2, 3)), "each has a layer"
    assert proportional_cut([1.0, 1.0], [0, 6, 8]) == (range(6), range(6, 8)), "between the points that are allowed"
