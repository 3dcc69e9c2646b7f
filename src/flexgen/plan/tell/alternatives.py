"""Alternatives to a plan: faster number formats, and shorter requests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from flexgen.errors import CapacityError
from flexgen.options import DTYPE_BYTES
from flexgen.plan.model import ModelSpec, UnitSpec
from flexgen.plan.policy import Policy
from flexgen.plan.price.pass_time import Expectation
from flexgen.plan.search.evaluate import Bounds, Outcome
from flexgen.plan.search.optimise import Search
from flexgen.plan.search.space import Space
from flexgen.plan.tell.forecast import Plan, forecast_again

# The least speedup that is worth mentioning.
WORTH_SAYING = 1.5
# Among gains that differ by less than the searches themselves vary, the first counts.
ABOUT_EQUAL = 0.97
# The number of plans on the curve of shorter requests.
CURVE_POINTS = 8
# Dtype of computing -> the dtypes that take at most half its bytes and less time, those with a wider range first.
NARROWER = {"float64": ("float32", "bfloat16", "float16"), "float32": ("bfloat16", "float16")}


# Format that weights can be converted to, the most exact first -> bytes of a number, scales included, and the name that its decoding has.
CONVERSIONS = {"int8": (1.05, "int8"), "int4": (0.59, "int4")}


@dataclass(frozen=True, slots=True, kw_only=True)
class FasterFormat:
    """A format of numbers in which the same job would be faster.

    Attributes:
        dtype: The dtype of computing, by torch's name; None if it stays.
        weight_format: The format to convert the weights to; None if they stay as they are.
        speedup: How many times as fast the job would be.
    """

    dtype: str | None = None
    weight_format: str | None = None
    speedup: float


def faster_format(plan: Plan, plan_in: Callable[[str], Plan | None]) -> FasterFormat | None:
    """Return the narrower dtype that gains most; None if the gain is small.

    Args:
        plan: The plan of the job in the dtype that was chosen.
        plan_in: Plans the same job in another dtype; returns None where rates for that dtype are not known.
    """
    others = {dtype: other for dtype in NARROWER.get(plan.policy.dtype, ()) if (other := plan_in(dtype)) is not None}
    return _fastest(
        FasterFormat(dtype=dtype, speedup=plan.forecast.seconds / max(other.forecast.seconds, 1e-9)) for dtype, other in others.items()
    )


def faster_weights(plan: Plan, space: Space, formats: Iterable[str], space_of: Callable[[ModelSpec], Space]) -> FasterFormat | None:
    """Return the format to convert the weights to that gains most; None if the gain is small.

    No other plan is made: the gain is that of this plan's policy with the other weights, or of steady states if that is more.

    Args:
        plan: The plan for the model as it is; weights in low-bit formats are not converted.
        space: The policies that it was chosen from.
        formats: The names in CONVERSIONS to compare.
        space_of: Returns the policies for another model and the same job.
    """
    if plan.spec.number_format not in DTYPE_BYTES:
        return None
    own_rate, own_seconds = Search(space).steady_rate(), max(plan.forecast.seconds, 1e-9)
    gains: list[FasterFormat] = []
    for name in (name for name in CONVERSIONS if name in formats):
        other = space_of(converted(plan.spec, name))
        expectation = Expectation(other.spec, plan.machine, plan.policy.dtype)
        seconds = forecast_again(plan.forecast, plan.policy, expectation, space.workload).seconds
        speedup = max(own_seconds / max(seconds, 1e-9), Search(other).steady_rate() / own_rate if own_rate else 0.0)
        gains.append(FasterFormat(weight_format=name, speedup=speedup))
    return _fastest(gains)


def converted(spec: ModelSpec, weight_format: str) -> ModelSpec:
    """Return a model of plain weights about as a conversion would store it: all units but the head are encoded."""
    number_bytes, decoding = CONVERSIONS[weight_format]

    def unit_in(unit: UnitSpec) -> UnitSpec:
        stored = int(unit.decoded_bytes / DTYPE_BYTES[spec.dtype] * number_bytes)
        return unit if unit.head else dataclasses.replace(unit, disk_bytes=stored, encoded_bytes=stored, plain=False)

    units = tuple(map(unit_in, spec.units))
    decoded = sum(unit.decoded_bytes for unit in units if not unit.head)
    return dataclasses.replace(spec, units=units, number_format=weight_format, decoded_from={decoding: decoded})


def _fastest(gains: Iterable[FasterFormat]) -> FasterFormat | None:
    """Return the first of the gains that are about the largest; None if that is not worth mentioning."""
    found = list(gains)
    least = max([ABOUT_EQUAL * gain.speedup for gain in found] + [WORTH_SAYING])
    return next((gain for gain in found if gain.speedup >= least), None)


def fastest_plan(plans: Mapping[str, Plan]) -> str:
    """Return the key of the first of the plans that are about the fastest."""
    least = min(plan.forecast.seconds for plan in plans.values())
    return next(name for name, plan in plans.items() if ABOUT_EQUAL * plan.forecast.seconds <= least)


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
