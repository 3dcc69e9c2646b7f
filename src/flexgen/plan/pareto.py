"""What shorter requests cost: the best plans under ever tighter bounds on a request's time (Sheng et al., 2023, figures 1 and 4)."""

from __future__ import annotations

from dataclasses import dataclass

from flexgen.errors import CapacityError
from flexgen.plan.bounds import Bounds
from flexgen.plan.policy import Policy
from flexgen.plan.search import Search, Solution
from flexgen.plan.space import Space

CURVE_POINTS = 8
# Bounds are a little wider than what they ask for, so that rounding does not exclude the plan they were made of.
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class ParetoPoint:
    """One plan of the curve.

    Attributes:
        request_seconds: of the request that takes longest, first pass to last. tokens_per_s: of output, end to end.
    """

    request_seconds: float
    tokens_per_s: float
    policy: Policy


def pareto(space: Space, *, num_points: int = CURVE_POINTS) -> list[ParetoPoint]:
    """The curve from the plan with the shortest requests to the one of most tokens/s, rising in both; no point is dominated by another.

    Raises:
        CapacityError: nothing fits.
    """
    search = Search(space)
    widest = search.best(Bounds())
    found = [widest, search.shortest()]
    low, high = found[1].request_seconds, widest.request_seconds
    for place in range(1, num_points - 1):
        seconds = low * (high / low) ** (place / (num_points - 1))
        try:
            found.append(search.best(Bounds(request_seconds=seconds * (1 + ROUNDING))))
        except CapacityError:
            continue  # the search is not exhaustive: it may miss, near the shortest, what it found there
    return _undominated(found, space.workload.output_tokens)


def _undominated(found: list[Solution], output_tokens: int) -> list[ParetoPoint]:
    """Without plans that another one beats in both."""
    kept: list[ParetoPoint] = []
    for each in sorted(found, key=lambda each: (each.request_seconds, each.seconds)):
        rate = output_tokens / max(each.seconds, 1e-9)
        if not kept or rate > kept[-1].tokens_per_s:
            kept.append(ParetoPoint(request_seconds=each.request_seconds, tokens_per_s=rate, policy=each.policy))
    return kept
