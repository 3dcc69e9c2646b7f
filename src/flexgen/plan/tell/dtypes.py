"""What a number format that was not asked for would gain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flexgen.plan.tell.forecast import Plan

# From this on it is worth a sentence.
WORTH_SAYING = 1.5
# Of gains that differ by less than searches do, the first counts.
ABOUT_EQUAL = 0.97
# Computed dtype -> those that take half the bytes and less time, the one with the wider range first.
NARROWER = {"float64": ("float32", "bfloat16", "float16"), "float32": ("bfloat16", "float16")}


@dataclass(frozen=True, slots=True)
class FasterFormat:
    """A dtype, by torch's name, in which the same job would be done `speedup` times as fast."""

    dtype: str
    speedup: float


def faster_format(plan: Plan, plan_in: Callable[[str], Plan | None]) -> FasterFormat | None:
    """The narrower dtype that gains most, if that is much.

    Args:
        plan: the job, as it was asked for. plan_in: the same job in another dtype; None where rates for that are not known.
    """
    others = {dtype: other for dtype in NARROWER.get(plan.policy.dtype, ()) if (other := plan_in(dtype)) is not None}
    gains = [FasterFormat(dtype, plan.forecast.seconds / max(other.forecast.seconds, 1e-9)) for dtype, other in others.items()]
    least = max([ABOUT_EQUAL * gain.speedup for gain in gains] + [WORTH_SAYING])
    return next((gain for gain in gains if gain.speedup >= least), None)
