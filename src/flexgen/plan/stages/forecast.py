"""The forecast of a job on several stages: the passes of a block at every stage, played through the pipeline."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flexgen.options import DTYPE_BYTES
from flexgen.plan.play.answer_lengths import expected
from flexgen.plan.play.sampling import PlayedSample, Samples
from flexgen.plan.play.simulate import Queue, Simulation, simulate
from flexgen.plan.price.pass_time import Expectation
from flexgen.plan.price.requests import Floats
from flexgen.plan.stages.pipeline import LinkRate, PassTimes, Played, play
from flexgen.plan.stages.search import block_of
from flexgen.plan.tell.forecast import FULL_BLOCK, Forecast, Plan
from flexgen.plan.workload import Workload

ROUND_TRIP = "round trip"


@dataclass(frozen=True, slots=True, kw_only=True)
class StagesForecast:
    """What is expected of all stages together.

    Attributes:
        forecast: The course of the whole job. Memory and bytes are those of all stages, the resources of a pass those of the slowest stage.
        seconds_per_pass: The mean seconds of a pass at each stage.
        link_seconds_per_pass: The mean seconds for which a pass keeps each link busy.
        busy_shares: The share of the job's time in which each stage computes.
        round_trip_seconds: The mean seconds of a pass through all stages and back.
        bound_by: What decides the time of most rounds: "stage 3", "link 0" (behind stage 0), or "round trip", where blocks are back at the
            first stage too late to keep it busy.
    """

    forecast: Forecast
    seconds_per_pass: tuple[float, ...]
    link_seconds_per_pass: tuple[float, ...]
    busy_shares: tuple[float, ...]
    round_trip_seconds: float
    bound_by: str


def forecast_stages(plans: Sequence[Plan], link: LinkRate, workload: Workload) -> StagesForecast:
    """Return what is expected of stages together.

    Args:
        plans: The plans of the stages, in order.
        link: The link between a stage and the next.
        workload: The whole job.
    """
    workload, policy = expected(workload), plans[0].policy
    block, active = block_of(workload, policy.num_blocks), min(policy.num_blocks, len(workload))
    sample = Samples.played_once(block).of(policy.max_num_seqs)
    courses = [_Course.of(plans, link, queue) for queue in (sample.queue, sample.half) if queue is not None]
    course, played = courses[0], play(courses[0].times, active)
    whole = PlayedSample(tuple(each.leader for each in courses), sample.scale)
    seconds = whole.extrapolated([played.seconds, *(play(each.times, active).seconds for each in courses[1:])])
    busy = np.array([each.times.stages.sum(axis=0) for each in courses])
    busy_seconds = [active * whole.extrapolated(column) for column in busy.T.tolist()]
    slowest = int(np.argmax(busy_seconds))
    passes, outputs = round(course.times.num_passes * sample.scale) * active, workload.output_tokens
    told = [plan.forecast for plan in plans]
    forecast = dataclasses.replace(
        told[slowest],
        seconds=seconds,
        num_passes=passes,
        num_requests=len(workload),
        num_refused=min(round(course.leader.num_refused * sample.scale) * active, len(workload)),
        prompt_tokens=workload.prompt_tokens,
        output_tokens=outputs,
        scored_tokens=workload.scored_tokens,
        output_tokens_per_s=outputs / max(seconds, 1e-9),
        full_block_tokens_per_s=course.full_rate(active),
        live_mean=float(course.leader.live.mean()) if passes else 0.0,
        request_seconds=_longest_request(course.leader, played),
        pass_seconds=seconds / max(passes, 1),
        memory_bytes=_memory(each.memory_bytes for each in told),
        budget_bytes=_summed(each.budget_bytes for each in told),
        weights_bytes_per_pass=_summed(each.weights_bytes_per_pass for each in told),
        disk_written_bytes=active * sum(each.disk_written_bytes for each in told),
        gain_per_gib={},
        gain_per_rate={},  # faster resources of one stage are worth what the next slowest leaves of that
        spill=None,
    )
    means = course.times
    return StagesForecast(
        forecast=forecast,
        seconds_per_pass=_means(means.stages),
        link_seconds_per_pass=_means(means.links),
        busy_shares=tuple(each / max(seconds, 1e-9) for each in busy_seconds),
        round_trip_seconds=float(means.trips.mean()) if passes else 0.0,
        bound_by=_bound_by(means, active),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Course:
    """A block's passes at all stages.

    Attributes:
        leader: The passes at the stage whose pools let requests enter latest; at the others they enter in the same passes.
        times: The times of the passes.
    """

    leader: Simulation
    times: PassTimes

    @classmethod
    def of(cls, plans: Sequence[Plan], link: LinkRate, queue: Queue) -> _Course:
        different = {id(plan.policy): plan for plan in plans}  # stages that are alike share a policy
        alone = {key: simulate(plan.spec, plan.policy, queue) for key, plan in different.items()}
        leading = max(alone, key=lambda key: (alone[key].num_refused, alone[key].num_passes))
        leader = alone[leading]
        played = {key: simulate(plan.spec, plan.policy, queue, like=leader) for key, plan in different.items()} | {leading: leader}
        seconds = {key: _pass_seconds(plan, played[key]) for key, plan in different.items()}
        stages = _columns([seconds[id(plan.policy)] for plan in plans], leader)
        sent = [_sent(plan, played[id(plan.policy)], link) for plan in plans[:-1]]
        exposed = [_exposed(plan, played[id(plan.policy)], busy, seconds[id(plan.policy)]) for plan, busy in zip(plans, sent, strict=False)]
        times = PassTimes(stages=stages, links=_columns(sent, leader), exposed=_columns(exposed, leader), latency_s=link.latency_s)
        return cls(leader=leader, times=times)

    def full_rate(self, num_blocks: int) -> float:
        """Return the output tokens/s while blocks are full."""
        live = self.leader.live
        full = live >= FULL_BLOCK * live.max(initial=0)
        sampled = num_blocks * np.broadcast_to(self.leader.work.num_sampled, live.shape)
        return float(sampled[full].sum() / max(self.times.rounds(num_blocks)[full].sum(), 1e-9)) if full.any() else 0.0


def _pass_seconds(plan: Plan, played: Simulation) -> Floats:
    return played.seconds(Expectation(plan.spec, plan.machine, plan.policy.dtype), plan.policy)


def _sent(plan: Plan, played: Simulation, link: LinkRate) -> Floats:
    """Return the seconds for which the hidden states of each pass keep the link behind a stage busy."""
    row = plan.spec.hidden_size * DTYPE_BYTES[plan.policy.dtype]
    return np.broadcast_to(np.asarray(played.work.num_tokens, dtype=np.float64) * row / link.bytes_per_s, (played.num_passes,))


def _exposed(plan: Plan, played: Simulation, sent: Floats, seconds: Floats) -> Floats:
    """Return the seconds of them that follow the end of the pass.

    Micro-batches leave one after the other, while the stage's last unit is at hand; the last of them leaves when the pass is over.
    """
    number = np.maximum(played.work.num_micro_batches, 1)
    early = seconds / max(len(plan.spec.units), 1) * (1 - 1 / number)
    return np.maximum(sent / number, sent - early)


def _columns(seconds: Sequence[Floats], leader: Simulation) -> Floats:
    """Return the seconds of each pass as an array of shape (passes, stages or links)."""
    return np.array(seconds, dtype=np.float64).reshape(len(seconds), leader.num_passes).T


def _longest_request(leader: Simulation, played: Played) -> float:
    """Return the time from first to last pass of the request that takes longest, in any block."""
    if not len(leader.first_passes):
        return 0.0
    return float((played.ends[:, leader.end_passes - 1] - played.starts[:, leader.first_passes]).max())


def _bound_by(times: PassTimes, num_blocks: int) -> str:
    rounds = times.rounds(num_blocks)
    waits = times.trips > num_blocks * times.slowest
    if not times.num_passes or len(times.stages[0]) == 1:
        return "stage 0"
    if rounds[waits].sum() > rounds.sum() / 2:
        return ROUND_TRIP
    columns = np.concatenate([times.stages, times.links], axis=1)
    place, stages = int(columns.sum(axis=0).argmax()), times.stages.shape[1]
    return f"stage {place}" if place < stages else f"link {place - stages}"


def _means(seconds: Floats) -> tuple[float, ...]:
    return tuple(seconds.mean(axis=0).tolist()) if len(seconds) else (0.0,) * seconds.shape[1]


def _summed(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total = Counter[str]()
    for each in parts:
        total.update(each)
    return dict(total)


def _memory(stages: Iterable[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """Return the bytes reserved on all stages together, by tier and part."""
    tiers: dict[str, list[Mapping[str, int]]] = {}
    for stage in stages:
        for tier, parts in stage.items():
            tiers.setdefault(tier, []).append(parts)
    return {tier: _summed(parts) for tier, parts in tiers.items()}
