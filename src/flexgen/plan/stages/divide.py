"""Divides a model among machines that are the stages of a pipeline, so that the slowest stage is as fast as possible.

With K stages there are K blocks of sequences in flight, or some more where links are slow, whose passes follow each other through the
stages. Each pass takes the slowest stage's time, so what is best for that stage by itself, a block's job and a K-th of the memory for its
KV (search.py), is best for all: it decides how many sequences a block has and how large passes and micro-batches are. All other stages
keep to that, each with homes of its own for weights and KV. The layers are cut so that the slowest stage is fastest (cut.py); where another
one is the slowest then, it decides in turn, and the better of both counts. What comes of it is played as a whole (forecast.py).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from flexgen.errors import CapacityError, OptionError
from flexgen.plan.search.evaluate import Bounds, Outcome
from flexgen.plan.search.optimise import SHORTEST, too_slow
from flexgen.plan.stages.cut import Cost, Layers, best_cut, dearest, proportional_cut
from flexgen.plan.stages.forecast import ROUND_TRIP, StagesForecast, forecast_stages
from flexgen.plan.stages.job import StagedJob
from flexgen.plan.stages.pipeline import LinkRate
from flexgen.plan.stages.search import NO_PLAN, Common, StageSearch
from flexgen.plan.tell.forecast import Forecast, Plan
from flexgen.plan.tell.spill import LEAST_SPILL_GAIN
from flexgen.plan.workload import Workload

__all__ = ["ROUND_TRIP", "StagePlan", "StagesPlan", "again", "divide"]

# How often the stage that is slowest decides anew, and how often bounds on time are tightened until the whole keeps them.
ROUNDS, ATTEMPTS = 4, 4
# The share of the usual effort of a search for a plan that is only compared with others.
HASTY = 0.1
# More blocks than stages are tried where a pass comes back so much later than a round of blocks would take, up to so many times as many.
LEAST_MORE_BLOCKS, MOST_BLOCKS = 1.05, 4
# The most machines for which borders are moved one by one.
MOST_MOVED = 8
# Machines on which nothing fits count as so many times slower than the fastest, in the first cut.
LEAST_RATE = 1e-3


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


def divide(job: StagedJob, *, hasty: bool = False) -> StagesPlan:
    """Return the best plans of a pipeline's stages.

    There are as many blocks in flight as stages, or more where blocks would be back at the first stage too late to keep it busy.

    Unless the options place KV, plans that write more bytes of KV to disk than the weights have are chosen only if that gains at least
    LEAST_SPILL_GAIN, or if the options give a budget on disk.

    Args:
        job: The job and the machines.
        hasty: Whether to look for a plan that is only compared with others, in a tenth of the time.

    Raises:
        OptionError: There are more stages than the model can be cut into, or an option cannot be honoured.
        CapacityError: A stage does not fit its machine (the message names both), or the job takes longer than it may.
    """
    plan = _with_enough_blocks(job, hasty=hasty)
    options = job.options
    if options.kv is not None or options.disk is not None or plan.forecast.disk_written_bytes <= job.spec.checkpoint_bytes:
        return plan
    try:
        without = _with_enough_blocks(job.without_kv_on_disk(), hasty=hasty)
    except CapacityError:
        return plan
    gain = without.forecast.seconds / max(plan.forecast.seconds, 1e-9) - 1
    return plan if gain >= LEAST_SPILL_GAIN or without.forecast.num_refused > plan.forecast.num_refused else without


def _with_enough_blocks(job: StagedJob, *, hasty: bool) -> StagesPlan:
    """Return the best plan of those with as many blocks as stages, and with as many as make a round of blocks last as long as a trip."""
    plan = _divided(job, job.num_stages, hasty=hasty)
    needed = min(plan.blocks_per_trip, MOST_BLOCKS * job.num_stages, float(len(job.workload)))
    if job.num_stages == 1 or needed < LEAST_MORE_BLOCKS * job.num_stages:
        return plan
    for share in (0.5, 1.0):
        num_blocks = math.ceil(job.num_stages + share * (needed - job.num_stages))
        with contextlib.suppress(CapacityError):
            other = _divided(job, num_blocks, hasty=hasty)
            if _cost_of(other.forecast) < _cost_of(plan.forecast):
                plan = other
    return plan


def _cost_of(forecast: Forecast) -> Cost:
    return forecast.num_refused, forecast.seconds


def again(plan: StagesPlan, workload: Workload, link: LinkRate | None = None) -> StagesPlan:
    """Return the same stages with the forecast of another job, or over another link."""
    return _told([stage.layers for stage in plan.stages], [stage.plan for stage in plan.stages], link or plan.link, workload)


def _divided(job: StagedJob, num_blocks: int, *, hasty: bool) -> StagesPlan:
    search, options = StageSearch(job, num_blocks), job.options
    edges = _edges(search.num_layers, job.cut_points)
    if len(edges) <= job.num_stages:
        raise OptionError(f"{job.spec.name} can be cut into at most {len(edges) - 1} stages, not into {job.num_stages}")
    whole = functools.partial(_whole, search, edges, hasty=hasty)
    asked = Bounds(request_seconds=options.max_request_seconds, job_seconds=options.max_job_seconds)
    return _within(asked, whole, 1 / num_blocks) if asked.are_given else whole(asked)


def _within(asked: Bounds, whole: Callable[[Bounds], StagesPlan], share: float) -> StagesPlan:
    """Return the best plan that keeps the bounds.

    Args:
        asked: The bounds on the whole.
        whole: Returns the best plan under bounds on the passes of a block at one stage.
        share: The share of a request's and the job's time that those take, about.

    Raises:
        CapacityError: Nothing fits, or no plan is as fast as the bounds require.
    """

    def excess(forecast: Forecast) -> float:
        return asked.excess(forecast.request_seconds, forecast.seconds)

    bounds, tried = asked.tightened(share, share), list[Forecast]()
    for _ in range(ATTEMPTS):
        try:
            plan = whole(bounds)
        except CapacityError:
            break
        if not excess(plan.forecast):
            return plan
        tried.append(plan.forecast)
        tighter = ((asked.request_seconds, plan.forecast.request_seconds), (asked.job_seconds, plan.forecast.seconds))
        bounds = bounds.tightened(*(1.0 if most is None else most / seconds for most, seconds in tighter))
    # A stage by itself tells only about what the whole will take: the plan with the shortest requests may keep the bounds all the same.
    plan = whole(Bounds() if asked.request_seconds is None else SHORTEST)
    if not excess(plan.forecast):
        return plan
    nearest = min([*tried, plan.forecast], key=excess)
    raise CapacityError(too_slow(asked, Outcome(refused=0.0, seconds=nearest.seconds, request_seconds=nearest.request_seconds)))


def _whole(search: StageSearch, edges: Sequence[int], bounds: Bounds, *, hasty: bool) -> StagesPlan:
    """Return the best plan under bounds on the passes of a block at one stage.

    Raises:
        CapacityError: A stage does not fit, or none is as fast as the bounds require.
    """
    cut, common = _chosen(search, edges, bounds, hasty=hasty)

    def told(cut: Layers) -> StagesPlan:
        return _told(cut, [search.plan(*each, common, hasty=hasty) for each in enumerate(cut)], search.job.link, search.job.workload)

    plan = told(cut)
    if search.job.num_stages <= MOST_MOVED and (search.are_unequal or plan.bound_by == ROUND_TRIP):
        plan = told(_moved(search, edges, cut, common))
    return plan


def _moved(search: StageSearch, edges: Sequence[int], cut: Layers, common: Common) -> Layers:
    """Return the cut from which no move of one border makes the whole faster, beginning with one that is best for the slowest stage.

    That is not the same where a block is back at the first stage later than all others need, and where the costs of unequal machines
    were found with too little effort.
    """

    def cost(borders: Sequence[int]) -> Cost:
        layers = [range(edges[start], edges[stop]) for start, stop in pairwise(borders)]
        try:
            plans = [search.plan(*each, common, hasty=True) for each in enumerate(layers)]
        except CapacityError:
            return NO_PLAN
        return _cost_of(forecast_stages(plans, search.job.link, search.job.workload).forecast)

    borders = [edges.index(each.start) for each in cut] + [len(edges) - 1]
    best = cost(borders)
    for step in (4, 2, 1):
        for place in range(1, len(borders) - 1):
            for move in (step, -step):
                while borders[place - 1] < borders[place] + move < borders[place + 1]:
                    other = [*borders[:place], borders[place] + move, *borders[place + 1 :]]
                    found = cost(other)
                    if found >= best:
                        break
                    borders, best = other, found
    return tuple(range(edges[start], edges[stop]) for start, stop in pairwise(borders))


def _edges(num_layers: int, cut_points: Sequence[int] | None) -> list[int]:
    """Return the layers at which stages may begin or end."""
    inner = range(1, num_layers) if cut_points is None else cut_points
    return [0, *sorted({layer for layer in inner if 0 < layer < num_layers}), num_layers]


def _chosen(search: StageSearch, edges: Sequence[int], bounds: Bounds, *, hasty: bool) -> tuple[Layers, Common]:
    """Return the best cut, and what all stages do alike.

    Raises:
        CapacityError: A stage does not fit, or none is as fast as the bounds require.
    """
    cut = _first_cut(search, edges)
    found: dict[Common, tuple[Cost, Layers]] = {}
    rates = [search.rate(stage, layers) for stage, layers in enumerate(cut)]
    deciding = sorted(range(len(cut)), key=rates.__getitem__)  # slowest first
    for _ in range(ROUNDS):
        common = _decided(search, cut, deciding, bounds, hasty=hasty)
        if common in found:
            break
        cost, cut = _cut_for(search, edges, common, cut)
        while cost == NO_PLAN and common.max_num_seqs > 1:
            common = common.halved()
            cost, cut = _cut_for(search, edges, common, cut)
        found[common] = cost, cut
        costs = [search.cost(stage, layers, common) for stage, layers in enumerate(cut)]
        deciding = sorted(range(len(cut)), key=costs.__getitem__, reverse=True)[:1]
    common = min(found, key=lambda each: found[each][0])
    return found[common][1], common


def _cut_for(search: StageSearch, edges: Sequence[int], common: Common, begin: Layers) -> tuple[Cost, Layers]:
    cost = functools.partial(search.cost, common=common)
    cut = best_cut(cost, edges, begin)
    return dearest(cost, cut), cut


def _decided(search: StageSearch, cut: Layers, deciding: Sequence[int], bounds: Bounds, *, hasty: bool) -> Common:
    """Return what is best for the first of these stages that has a plan by itself."""
    problem: CapacityError | None = None
    for stage in deciding:
        try:
            return search.common(stage, cut[stage], bounds, HASTY if hasty else None)
        except CapacityError as error:
            problem = problem or CapacityError(f"{search.name(stage, cut[stage])}: {error}")
    assert problem is not None
    raise problem


def _first_cut(search: StageSearch, edges: Sequence[int]) -> Layers:
    """Return a cut in proportion to the rates of the machines, each by itself with an equal part of the layers."""
    number, last = search.job.num_stages, len(edges) - 1
    begin, length = (last - last // number) // 2, max(last // number, 1)
    part = range(edges[begin], edges[min(begin + length, last)])
    rates = [search.rate(stage, part) for stage in range(number)]
    weights = [max(rate, LEAST_RATE * max(rates)) or 1.0 for rate in rates]
    return proportional_cut(weights, edges)


def _told(cut: Sequence[range], plans: Sequence[Plan], link: LinkRate, workload: Workload) -> StagesPlan:
    """Return the plans of the stages with the forecast of the whole."""
    told = forecast_stages(plans, link, workload)
    return StagesPlan(
        stages=tuple(
            StagePlan(
                layers=layers,
                plan=plan,
                bound_by=_bound_by(told, stage, plan),
                seconds_per_pass=told.seconds_per_pass[stage],
                busy_share=told.busy_shares[stage],
            )
            for stage, (layers, plan) in enumerate(zip(cut, plans, strict=True))
        ),
        forecast=told.forecast,
        link=link,
        bound_by=told.bound_by,
        bubble_share=max(1 - max(told.busy_shares), 0.0),
        round_trip_seconds=told.round_trip_seconds,
        blocks_per_trip=told.round_trip_seconds / max(*told.seconds_per_pass, *told.link_seconds_per_pass, 1e-9),
    )


def _bound_by(told: StagesForecast, stage: int, plan: Plan) -> str:
    sent = told.link_seconds_per_pass[stage] if stage < len(told.link_seconds_per_pass) else 0.0
    return "link" if sent > told.seconds_per_pass[stage] else plan.forecast.bottleneck
