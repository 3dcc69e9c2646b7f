"""What one machine more would bring to a model that is divided among several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexgen.errors import CapacityError, OptionError
from flexgen.options import EngineOptions
from flexgen.plan.machine import Limits, Machine
from flexgen.plan.model import ModelSpec
from flexgen.plan.stages.divide import StagesPlan, divide
from flexgen.plan.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class OneMore:
    """What one machine more would bring.

    Attributes:
        like: The machine that it is a copy of: that of the slowest stage.
        speedup: How many times as fast the job would be.
    """

    like: str
    speedup: float


def one_more(
    plan: StagesPlan,
    options: EngineOptions,
    spec: ModelSpec,
    machines: Sequence[Machine],
    limits: Sequence[Limits],
    workload: Workload,
    *,
    process_bytes: Sequence[int],
    cut_points: Sequence[int] | None = None,
) -> OneMore | None:
    """Return about what one machine more would bring, a copy of the slowest stage's behind it; None where there is no layer for it.

    Args:
        plan: The plan without it; the other arguments are those of `divide`.
    """
    slowest = max(range(len(machines)), key=lambda stage: plan.stages[stage].busy_share)
    places = [*range(slowest + 1), *range(slowest, len(machines))]
    try:
        other = divide(
            options, spec, [machines[place] for place in places], [limits[place] for place in places], workload,
            process_bytes=[process_bytes[place] for place in places], link=plan.link, cut_points=cut_points, hasty=True,
        )  # fmt: skip
    except (CapacityError, OptionError):
        return None
    return OneMore(like=machines[slowest].name, speedup=plan.forecast.seconds / max(other.forecast.seconds, 1e-9))
