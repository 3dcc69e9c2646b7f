"""Times of repeated calls: of each setting the median of a few runs, of all rounds the best.

Neighbours come and go, and an ideal is an upper bound.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def median_seconds(run: Callable[[], object], budget_seconds: float) -> float:
    """The median time of three calls, after one that is not counted; of fewer where they are slow."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 4 and (not times or time.perf_counter() - began < budget_seconds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:] or times)


def best_rate(amount: float, run: Callable[[], object], seconds: float) -> float:
    """Amount per second, the best of the rounds that the time allows."""
    best, began = 0.0, time.perf_counter()
    while not best or time.perf_counter() - began < seconds:
        best = max(best, amount / median_seconds(run, seconds))
    return best
