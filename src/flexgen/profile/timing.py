"""Rates of repeated calls: rounds of a few calls each, with the median of every round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from flexgen.plan.machine import Rate


def median_seconds(run: Callable[[], object], budget_seconds: float) -> float:
    """Return the median time of three calls, after one that is not counted; of fewer calls where they are slow."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 4 and (not times or time.perf_counter() - began < budget_seconds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:] or times)


def measured_rate(amount: float, run: Callable[[], object], seconds: float) -> Rate:
    """Measure an amount per second over as many rounds as the time allows, at least two, after a call that may compile something."""
    run()
    rounds: list[float] = []
    began = time.perf_counter()
    while len(rounds) < 2 or time.perf_counter() - began < seconds:
        rounds.append(amount / median_seconds(run, seconds))
    return Rate.of(rounds)
