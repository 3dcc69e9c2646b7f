"""Plans of all stages of a pipeline, with what is expected of them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexgen.plan.stages.forecast import StagesForecast, forecast_stages
from flexgen.plan.stages.pipeline import LinkRate
from flexgen.plan.tell.forecast import Forecast, Plan
from flexgen.plan.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """The plan of one stage.

    Attributes:
        layers: Its decoder layers. The first stage has the embedding as well, the last the final norm and the head.
        plan: Its plan, with the forecast of a block's passes there.
        bound_by: What decides the time of its passes: a resource of its machine, or "link", where what it sends takes longer.
        seconds_per_pass: The mean time of a pass there.
        busy_share: The share of the job's time in which it computes.
    """

    layers: range
    plan: Plan
    bound_by: str
    seconds_per_pass: float
    busy_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StagesPlan:
    """The plans of all stages, with the forecast of the whole.

    Attributes:
        stages: The stages, in order.
        forecast: What is expected of all together: memory and bytes are those of all stages, the resources of a pass those of the slowest.
        link: The link between stages.
        bound_by: What decides the time of most rounds: "stage 3", "link 0", or "round trip" (see `StagesForecast`).
        bubble_share: The share of the job's time in which even the busiest stage waits: while the pipeline fills and drains, and for what
            is still on its way through the others.
        round_trip_seconds: The mean seconds of a pass through all stages and back.
        blocks_per_trip: How many passes the slowest stage or link could serve in that time.
    """

    stages: tuple[StagePlan, ...]
    forecast: Forecast
    link: LinkRate
    bound_by: str
    bubble_share: float
    round_trip_seconds: float
    blocks_per_trip: float


def told(cut: Sequence[range], plans: Sequence[Plan], link: LinkRate, workload: Workload) -> StagesPlan:
    """Return the plans of the stages with the forecast of the whole."""
    whole = forecast_stages(plans, link, workload)
    return StagesPlan(
        stages=tuple(
            StagePlan(
                layers=layers,
                plan=plan,
                bound_by=_bound_by(whole, stage, plan),
                seconds_per_pass=whole.seconds_per_pass[stage],
                busy_share=whole.busy_shares[stage],
            )
            for stage, (layers, plan) in enumerate(zip(cut, plans, strict=True))
        ),
        forecast=whole.forecast,
        link=link,
        bound_by=whole.bound_by,
        bubble_share=max(1 - max(whole.busy_shares), 0.0),
        round_trip_seconds=whole.round_trip_seconds,
        blocks_per_trip=whole.round_trip_seconds / max(*whole.seconds_per_pass, *whole.link_seconds_per_pass, 1e-9),
    )


def again(plan: StagesPlan, workload: Workload, link: LinkRate | None = None) -> StagesPlan:
    """Return the same stages with the forecast of another job, or over another link."""
    return told([stage.layers for stage in plan.stages], [stage.plan for stage in plan.stages], link or plan.link, workload)


def _bound_by(whole: StagesForecast, stage: int, plan: Plan) -> str:
    sent = whole.link_seconds_per_pass[stage] if stage < len(whole.link_seconds_per_pass) else 0.0
    return "link" if sent > whole.seconds_per_pass[stage] else plan.forecast.bottleneck
