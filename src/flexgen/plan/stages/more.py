"""What one machine more would bring to a model that is divided among several."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from flexgen.errors import CapacityError, OptionError
from flexgen.plan.stages.divide import divide
from flexgen.plan.stages.job import StagedJob
from flexgen.plan.stages.plans import StagesPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class OneMore:
    """What one machine more would bring.

    Attributes:
        like: The machine that it is a copy of: that of the slowest stage.
        speedup: How many times as fast the job would be.
    """

    like: str
    speedup: float


def one_more(plan: StagesPlan, job: StagedJob) -> OneMore | None:
    """Return about what one machine more would bring, a copy of the slowest stage's behind it; None where there is no layer for it.

    Args:
        plan: The plan without it.
        job: The job of that plan.
    """
    slowest = max(range(job.num_stages), key=lambda stage: plan.stages[stage].busy_share)
    machines = (*job.machines[: slowest + 1], *job.machines[slowest:])
    try:
        other = divide(dataclasses.replace(job, machines=machines), hasty=True)
    except (CapacityError, OptionError):
        return None
    return OneMore(like=job.machines[slowest].machine.name, speedup=plan.forecast.seconds / max(other.forecast.seconds, 1e-9))
