"""The middle of a job as the plan plays it: the passes that are neither ramp nor tail, and those of them that stand for all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexgen.errors import OptionError
from flexgen.plan.play.simulate import simulate
from flexgen.plan.price.pass_time import Expectation
from flexgen.plan.tell.forecast import Plan
from flexgen.plan.workload import Workload

# Relative differences of rates below this do not count, so that of equal passes the earliest are chosen.
NO_DIFFERENCE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Middle:
    """Some consecutive passes in the middle of a job.

    Attributes:
        first: The index of the first of them.
        num_passes: The number of passes of the whole middle: from the end of the first answer to the last admission.
        output_tokens_per_s: The output tokens per second that are expected in all of the middle.
    """

    first: int
    num_passes: int
    output_tokens_per_s: float


def find_middle(plan: Plan, workload: Workload, num_passes: int, *, num_before: int = 0) -> Middle:
    """Return the passes whose expected output tokens per second are nearest to those of the whole middle; of several, the earliest.

    Where many prompts enter at once, again and again, a few passes may have more or less than their share of them.

    Args:
        plan: The plan.
        workload: The job.
        num_passes: The number of passes.
        num_before: The number of passes that must come before them.

    Raises:
        OptionError: The middle of the job has fewer passes.
    """
    played = simulate(plan.spec, plan.policy, workload)
    begin = max(int(played.end_passes.min()) if len(played.end_passes) else 0, num_before)
    end = int(played.first_passes.max(initial=-1)) + 1
    if end - begin < num_passes:
        raise OptionError(
            f"{len(workload)} requests make a job of {played.num_passes} passes, of which {max(end - begin, 0)} are neither its beginning "
            f"nor its end, and {num_passes} are to be measured: raise num_prompts"
        )
    seconds = played.seconds(Expectation(plan.spec, plan.machine, plan.policy.dtype), plan.policy)[begin:end]
    sampled = np.broadcast_to(np.asarray(played.work.num_sampled, dtype=np.float64), (played.num_passes,))[begin:end]
    rate = float(sampled.sum() / seconds.sum())
    tokens_until, seconds_until = (np.concatenate([[0.0], np.cumsum(each)]) for each in (sampled, seconds))
    rates = (tokens_until[num_passes:] - tokens_until[:-num_passes]) / (seconds_until[num_passes:] - seconds_until[:-num_passes])
    difference = np.round(np.abs(rates / rate - 1) / NO_DIFFERENCE)
    return Middle(first=begin + int(difference.argmin()), num_passes=end - begin, output_tokens_per_s=rate)
