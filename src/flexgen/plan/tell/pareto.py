"""What shorter requests cost: the best plans under ever tighter bounds on a request's time (Sheng et al., 2023, figures 1 and 4)."""

from __future__ import annotations

from dataclasses import dataclass

from flexgen.errors import CapacityError
from flexgen.plan.policy import Policy
from flexgen.plan.search.bounds import Bounds
from flexgen.plan.search.evaluate import Outcome
from flexgen.plan.search.optimise import Search
from flexgen.plan.search.space import Space

CURVE_POINTS = 8


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
            found.append(search.best(Bounds(request_seconds=seconds)))
        except CapacityError:
            continue  # the search is not exhaustive: it may miss, near the shortest, what it found there
    played = [(solution.policy, search.player.whole(solution.policy)) for solution in found]
    return _undominated(played, space.workload.output_tokens)


def _undominated(played: list[tuple[Policy, Outcome]], output_tokens: int) -> list[ParetoPoint]:
    """Without plans that another one beats in both."""
    kept: list[ParetoPoint] = []
    for policy, outcome in sorted(played, key=lambda each: (each[1].request_seconds, each[1].seconds)):
        rate = output_tokens / max(outcome.seconds, 1e-9)
        if not kept or rate > kept[-1].tokens_per_s:
            kept.append(ParetoPoint(request_seconds=outcome.request_seconds, tokens_per_s=rate, policy=policy))
    return kept
