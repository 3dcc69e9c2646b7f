"""Divides a model among machines that are the stages of a pipeline, so that the slowest stage is as fast as possible.

With K stages there are K blocks of sequences in flight, or some more where that is faster, whose passes follow each other through the
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
from itertools import pairwise

from flexgen.errors import CapacityError, OptionError
from flexgen.plan.search.evaluate import Bounds, Outcome
from flexgen.plan.search.optimise import SHORTEST, too_slow
from flexgen.plan.stages.cut import Cost, Layers, best_cut, dearest, proportional_cut
from flexgen.plan.stages.forecast import ROUND_TRIP, forecast_stages
from flexgen.plan.stages.job import StagedJob
from flexgen.plan.stages.plans import StagesPlan, told
from flexgen.plan.stages.search import NO_PLAN, Common, StageSearch
from flexgen.plan.tell.forecast import Forecast
from flexgen.plan.tell.spill import LEAST_SPILL_GAIN

# How often the stage that is slowest decides anew, and how often bounds on time are tightened until the whole keeps them.
ROUNDS, ATTEMPTS = 4, 4
# The share of the usual effort of a search for a plan that is only compared with others.
HASTY = 0.1
# More blocks than stages are tried where a pass comes back so much later than a round of blocks would take, or where so many times as
# many passes serve the job; up to so many times as many.
LEAST_MORE_BLOCKS, MOST_BLOCKS = 1.05, 4
# How closely the most sequences with which all stages fit are found.
CLOSE = 1.1
# The most machines for which borders are moved one by one.
MOST_MOVED = 8
# Machines on which nothing fits count as so many times slower than the fastest, in the first cut.
LEAST_RATE = 1e-3


def divide(job: StagedJob, *, hasty: bool = False) -> StagesPlan:
    """Return the best plans of a pipeline's stages.

    There are as many blocks in flight as stages, or more where blocks would be back at the first stage too late to keep it busy, or where
    more of them serve a small job in fewer passes.

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
    """Return the best plan of those with as many blocks as stages, and with as many more as promise to be faster."""
    plan = _divided(job, job.num_stages, hasty=hasty)
    for num_blocks in _more_blocks(job, plan):
        with contextlib.suppress(CapacityError):
            other = _divided(job, num_blocks, hasty=hasty)
            if _cost_of(other.forecast) < _cost_of(plan.forecast):
                plan = other
    return plan


def _more_blocks(job: StagedJob, plan: StagesPlan) -> list[int]:
    """Return the numbers of blocks that promise to be faster than as many as stages.

    With so many that a round of blocks lasts as long as a trip, no stage waits for what is on its way; half as many more may be enough.
    A small job whose last blocks are not full, 60 requests in 2 times 3 blocks of up to 16, is served by fewer passes of 4 full blocks.
    """
    number, requests = job.num_stages, len(job.workload)
    most = min(MOST_BLOCKS * number, requests)
    if number == 1 or most <= number:
        return []
    more = list[int]()
    needed = min(plan.blocks_per_trip, float(most))
    if needed >= LEAST_MORE_BLOCKS * number:
        more += [math.ceil(number + share * (needed - number)) for share in (0.5, 1.0)]
    full = math.ceil(requests / plan.stages[0].plan.policy.max_num_seqs)
    turns = math.ceil(full / number)
    if turns > 1:
        fewer = math.ceil(full / (turns - 1))
        if fewer <= most and number * turns >= LEAST_MORE_BLOCKS * fewer * (turns - 1):
            more.append(fewer)
    return sorted(set(more))


def _cost_of(forecast: Forecast) -> Cost:
    return forecast.num_refused, forecast.seconds


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

    def plan_of(cut: Layers) -> StagesPlan:
        return told(cut, [search.plan(*each, common, hasty=hasty) for each in enumerate(cut)], search.job.link, search.job.workload)

    plan = plan_of(cut)
    if search.job.num_stages <= MOST_MOVED and (search.are_unequal or plan.bound_by == ROUND_TRIP):
        plan = plan_of(_moved(search, edges, cut, common))
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
        common, cost, cut = _fitting(search, edges, common, cut)
        found[common] = cost, cut
        costs = [search.cost(stage, layers, common) for stage, layers in enumerate(cut)]
        deciding = sorted(range(len(cut)), key=costs.__getitem__, reverse=True)[:1]
    common = min(found, key=lambda each: found[each][0])
    return found[common][1], common


def _fitting(search: StageSearch, edges: Sequence[int], common: Common, begin: Layers) -> tuple[Common, Cost, Layers]:
    """Return the same for about the most sequences with which all stages fit, and the best cut for it."""
    cost, cut = _cut_for(search, edges, common, begin)
    least, most = common.max_num_seqs, common.max_num_seqs
    tried = common
    while cost == NO_PLAN and least > 1:
        least, most = least // 2, least
        tried = common.of_sequences(least)
        cost, cut = _cut_for(search, edges, tried, cut)
    while cost != NO_PLAN and most > max(CLOSE * least, least + 1):
        middle = (least + most) // 2
        other = common.of_sequences(middle)
        dearer, its_cut = _cut_for(search, edges, other, cut)
        if dearer == NO_PLAN:
            most = middle
        else:
            tried, cost, cut, least = other, dearer, its_cut, middle
    return tried, cost, cut


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
