"""Alternatives to a plan: a narrower dtype of computing, and shorter requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flexgen.errors import CapacityError
from flexgen.plan.policy import Policy
from flexgen.plan.search.evaluate import Bounds, Outcome
from flexgen.plan.search.optimise import Search
from flexgen.plan.search.space import Space
from flexgen.plan.tell.forecast import Plan

# The least speedup that is worth mentioning.
WORTH_SAYING = 1.5
# Among gains that differ by less than the searches themselves vary, the first counts.
ABOUT_EQUAL = 0.97
# The number of plans on the curve of shorter requests.
CURVE_POINTS = 8
# Dtype of computing -> the dtypes that take at most half its bytes and less time, those with a wider range first.
NARROWER = {"float64": ("float32", "bfloat16", "float16"), "float32": ("bfloat16", "float16")}


@dataclass(frozen=True, slots=True, kw_only=True)
class FasterDtype:
    """A dtype of computing in which the same job would be faster.

    Attributes:
        dtype: The dtype, by torch's name.
        speedup: How many times as fast the job would be.
    """

    dtype: str
    speedup: float


def faster_dtype(plan: Plan, plan_in: Callable[[str], Plan | None]) -> FasterDtype | None:
    """Return the first of the narrower dtypes that gain about most; None if the gain is small.

    Args:
        plan: The plan of the job in the dtype that was chosen.
        plan_in: Plans the same job in another dtype; returns None where rates for that dtype are not known.
    """
    others = {dtype: other for dtype in NARROWER.get(plan.policy.dtype, ()) if (other := plan_in(dtype)) is not None}
    found = [FasterDtype(dtype=dtype, speedup=plan.forecast.seconds / max(other.forecast.seconds, 1e-9)) for dtype, other in others.items()]
    least = max([ABOUT_EQUAL * gain.speedup for gain in found] + [WORTH_SAYING])
    return next((gain for gain in found if gain.speedup >= least), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParetoPoint:
    """One plan of the curve.

    Attributes:
        request_seconds: The time of the request that takes longest, from its first pass to its last.
        tokens_per_s: The output tokens per second, from end to end; the prompt tokens where nothing is generated.
        policy: The policy of the plan.
    """

    request_seconds: float
    tokens_per_s: float
    policy: Policy


def pareto(space: Space, *, num_points: int = CURVE_POINTS) -> list[ParetoPoint]:
    """Return the curve from the plan with the shortest requests to the plan with the most tokens/s.

    Both numbers rise along it, and no point is dominated by another.

    Raises:
        CapacityError: No plan fits the budgets.
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
            continue  # the search is not exhaustive: close to the shortest requests it may miss the plan that it found for them
    played = [(solution.policy, search.player.whole(solution.policy)) for solution in found]
    return _undominated(played, space.workload.paced_tokens)


def _undominated(played: list[tuple[Policy, Outcome]], num_tokens: int) -> list[ParetoPoint]:
    """Return the plans that no other plan beats in both numbers."""
    kept: list[ParetoPoint] = []
    for policy, outcome in sorted(played, key=lambda each: (each[1].request_seconds, each[1].seconds)):
        rate = num_tokens / max(outcome.seconds, 1e-9)
        if not kept or rate > kept[-1].tokens_per_s:
            kept.append(ParetoPoint(request_seconds=outcome.request_seconds, tokens_per_s=rate, policy=policy))
    return kept
