"""Models divided among machines: against all cuts, within budgets and bounds, and the forecast against simpler pictures."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from plan.instances import PROCESS_BYTES, instance_of

from flexgen.base.quantities import GIB
from flexgen.errors import CapacityError, OptionError
from flexgen.options import EngineOptions
from flexgen.plan.known.machines import find_machine, limits_of
from flexgen.plan.known.models import catalogue_spec
from flexgen.plan.model import KVGroupSpec
from flexgen.plan.play.blocks import ALONE, Blocks
from flexgen.plan.price.memory import footprint
from flexgen.plan.search import solve
from flexgen.plan.search.optimise import Search
from flexgen.plan.stages.divide import divide
from flexgen.plan.stages.forecast import ROUND_TRIP
from flexgen.plan.stages.job import StagedJob, StageMachine
from flexgen.plan.stages.more import one_more
from flexgen.plan.stages.pipeline import LinkRate, PassTimes, play
from flexgen.plan.stages.plans import again
from flexgen.plan.stages.search import block_of
from flexgen.plan.stages.spec import num_layers_of
from flexgen.plan.tell.forecast import make_plan
from flexgen.plan.workload import Workload

FAST = LinkRate(bytes_per_s=1e12, latency_s=0.0)
PATIENCE = 0.1


@pytest.fixture(scope="module", autouse=True)
def hasty_plans():
    """Here plans are compared with plans of as little effort."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(Search.__init__.__kwdefaults__, "patience", PATIENCE)
        patch.setattr(solve, "EFFORT", PATIENCE * solve.EFFORT)
        yield


def job_of(options, spec, machines, limits, workload, *, link=FAST, process_bytes=PROCESS_BYTES):
    places = zip(machines, limits, strict=True)
    stages = tuple(StageMachine(machine=machine, limits=each, process_bytes=process_bytes) for machine, each in places)
    return StagedJob(options=options, spec=spec, machines=stages, workload=workload, link=link)


def problem_of(seed, number):
    """A small problem on so many machines, some of which are alike."""
    instance = instance_of(seed)
    device = instance.machine.device
    machines = [instance_of(seed + 1000 * (place // 2), device).machine for place in range(number)]
    machines = [replace(machine, name=f"box {place}") for place, machine in enumerate(machines)]
    room = {name: 2 * getattr(instance.limits, name) for name in ("host_bytes", "device_bytes")}
    limits = [replace(instance.limits, **room)] * number
    options = EngineOptions(dtype="bfloat16", device=device)
    return job_of(options, instance.spec, machines, limits, instance.workload, link=LinkRate(bytes_per_s=1e8, latency_s=1e-3))


@pytest.mark.matrix(4, always=["17"])
@pytest.mark.parametrize("seed", [*range(40)])
def test_no_cut_is_faster(seed):
    """Every cut by itself, with what is best for it, on machines of which only some are alike."""
    number = 2 + seed % 2
    job = problem_of(seed, number)
    layers = num_layers_of(job.spec)
    if not number < layers < 7:
        pytest.skip("too many cuts, or one")
    others = []
    for inner in itertools.combinations(range(1, layers), number - 1):
        try:
            others.append(divide(replace(job, cut_points=inner), hasty=True))
        except CapacityError:
            continue
    if not others:
        with pytest.raises(CapacityError, match="stage "):
            divide(job)
        return
    found = divide(job, hasty=True)
    refused = min(other.forecast.num_refused for other in others)
    assert found.forecast.num_refused <= refused
    best = min(other.forecast.seconds for other in others if other.forecast.num_refused == refused)
    assert found.forecast.seconds <= 1.1 * best  # all are found with a tenth of the usual effort


def large(names, *, link=FAST, **changes):
    """OPT-30B on known machines."""
    options = EngineOptions(dtype="float16", **changes)
    machines = [find_machine(name) for name in names]
    budgets = replace(options, max_job_seconds=None, max_request_seconds=None)
    job = Workload(prompt_lens=(512,) * 600, output_lens=(32,) * 600)
    limits = [limits_of(machine, budgets) for machine in machines]
    return job_of(options, catalogue_spec("opt-30b"), machines, limits, job, link=link, process_bytes=int(1.5e9))


def alone_of(job):
    """The plan of the first machine by itself."""
    first = job.machines[0]
    return make_plan(job.options, job.spec, first.machine, first.limits, job.workload, process_bytes=first.process_bytes)


@pytest.fixture(scope="module")
def four():
    job = large(["t4-gcp"] * 4, link=LinkRate(bytes_per_s=1.25e9, latency_s=1e-4))
    return job, divide(job)


def test_stages_have_all_layers_and_agree_on_passes(four):
    job, plan = four
    assert [layer for stage in plan.stages for layer in stage.layers] == list(range(48))
    common = (
        "max_num_seqs",
        "prefill_tokens",
        "micro_batch_tokens",
        "schedule",
        "page_tokens",
        "kv_format",
        "longest_sequence",
        "num_blocks",
    )
    for name in common:
        assert len({getattr(stage.plan.policy, name) for stage in plan.stages}) == 1, name
    assert plan.stages[0].plan.policy.num_blocks == 4
    assert all(stage.plan.policy.host_attention for stage in plan.stages)
    assert sum(stage.plan.spec.decoded_bytes for stage in plan.stages) == job.spec.decoded_bytes
    for stage, given in zip(plan.stages, job.machines, strict=True):
        used = footprint(stage.plan.policy, stage.plan.spec, given.limits, process_bytes=given.process_bytes)
        for tier, parts in used.items():
            assert sum(parts.values()) <= getattr(given.limits, f"{tier}_bytes"), tier
        assert stage.plan.forecast.memory_bytes == used


def test_the_forecast_of_the_whole(four):
    job, plan = four
    told = plan.forecast
    assert (told.num_requests, told.output_tokens, told.num_refused) == (600, 600 * 32, 0)
    assert told.output_tokens_per_s == pytest.approx(told.output_tokens / told.seconds)
    assert 0 < plan.bubble_share < 0.5
    assert max(stage.busy_share for stage in plan.stages) == pytest.approx(1 - plan.bubble_share)
    assert plan.round_trip_seconds >= sum(stage.seconds_per_pass for stage in plan.stages)
    assert told.request_seconds <= told.seconds
    assert told.memory_bytes["host"]["KV"] == sum(stage.plan.forecast.memory_bytes["host"]["KV"] for stage in plan.stages)
    assert plan.bound_by.startswith(("stage ", "round trip"))
    slowest = max(plan.stages, key=lambda stage: stage.seconds_per_pass)
    rounds = told.num_passes * slowest.seconds_per_pass
    assert rounds <= told.seconds <= 1.6 * rounds
    assert again(plan, job.workload) == plan


def test_four_machines_are_more_than_three_times_as_fast_as_one(four):
    """The paper's measured 3.2 times: each holds more of its part of the weights."""
    job, plan = four
    alone = alone_of(job)
    assert plan.forecast.output_tokens_per_s > 3 * alone.forecast.output_tokens_per_s


def test_a_slower_link_is_never_faster_and_says_what_binds(four):
    job, plan = four
    slow, late = (again(plan, job.workload, LinkRate(bytes_per_s=rate, latency_s=latency)) for rate, latency in ((1e6, 1e-4), (1e10, 60.0)))
    assert slow.forecast.seconds > 2 * plan.forecast.seconds
    assert slow.bound_by.startswith("link ")
    assert slow.stages[0].bound_by == "link"
    assert slow.stages[3].bound_by != "link", "the last sends tokens only"
    assert late.bound_by == ROUND_TRIP
    assert late.bubble_share > plan.bubble_share
    hidden = (600 * (512 + 31)) * 7168 * 2 / 1e6  # every row of every request over each link
    assert slow.forecast.seconds == pytest.approx(hidden, rel=0.1)


def test_one_more_machine_is_worth_something(four):
    job, plan = four
    more = one_more(plan, job)
    assert more is not None
    assert more.like == "t4-gcp"
    assert 1.0 < more.speedup < 1.6


def test_a_faster_machine_has_more_layers():
    job = large(["t4-64gb", "rtx4090-64gb"])
    plan = divide(job)
    slow, fast = (len(stage.layers) for stage in plan.stages)
    assert fast > 1.3 * slow
    assert min(stage.busy_share for stage in plan.stages) > 0.7 * max(stage.busy_share for stage in plan.stages)


def test_cut_points_are_the_only_cuts():
    job = large(["t4-gcp"] * 2)
    plan = divide(replace(job, cut_points=(10, 40)))
    assert plan.stages[0].layers in (range(10), range(40))
    with pytest.raises(OptionError, match="can be cut into at most 1 stages, not into 2"):
        divide(replace(job, cut_points=()))


def test_options_hold_for_every_stage():
    job = large(["t4-gcp"] * 2, max_num_seqs=40, weights="host=1", kv="host=1", schedule="zigzag", micro_batch_tokens=2048)
    for stage in divide(job).stages:
        policy = stage.plan.policy
        assert (policy.max_num_seqs, policy.schedule, policy.micro_batch_tokens) == (40, "zigzag", 2048)
        assert policy.weights.host == policy.kv.host == 1
    refused = large(["t4-gcp"] * 2, host_attention="off")
    with pytest.raises(OptionError, match="on several stages the host attends"):
        divide(refused)


def test_bounds_on_time_are_those_of_the_whole():
    free = divide(large(["t4-gcp"] * 2), hasty=True).forecast
    kept = divide(large(["t4-gcp"] * 2, max_request_seconds=0.8 * free.request_seconds), hasty=True).forecast
    assert kept.request_seconds <= 0.8 * free.request_seconds
    with pytest.raises(CapacityError, match="no plan keeps max_job_seconds=60: the one that comes nearest takes"):
        divide(large(["t4-gcp"] * 2, max_job_seconds=60), hasty=True)


def test_the_plan_that_comes_nearest_has_the_shortest_requests():
    """Every pass streams half of the weights, so no request can be arbitrarily short; just above the shortest, there is a plan."""
    with pytest.raises(CapacityError, match=r"the one that comes nearest takes 1:4\d min for its longest request"):
        divide(large(["t4-gcp"] * 2, max_request_seconds=60), hasty=True)
    kept = divide(large(["t4-gcp"] * 2, max_request_seconds=110), hasty=True).forecast
    assert kept.request_seconds <= 110


def test_prompts_in_waves_drain_the_pipeline_which_a_stage_alone_would_not_know():
    """A pass that is shorter than the one before finds the last stage busy with that; a longer one waits for nobody."""
    times, number = np.array([1.0, 4.0, 2.0, 2.5, 0.5]), 3
    passes = PassTimes(stages=np.tile(times[:, None], number), links=np.zeros((5, 2)), exposed=np.zeros((5, 2)), latency_s=0.0)
    assert number * Blocks(num_blocks=number, num_stages=number).with_drains(times).sum() == pytest.approx(play(passes, number).seconds)
    more = (number + 2) * Blocks(num_blocks=number + 2, num_stages=number).with_drains(times).sum()
    assert 1.0 <= more / play(passes, number + 2).seconds < 1.1
    assert ALONE.with_drains(times).tolist() == times.tolist()


def test_a_stage_that_does_not_fit_is_named(make_spec, make_machine, make_limits, make_options):
    groups = (KVGroupSpec(num_layers=4, bytes_per_token=1 << 20, attention_flops_per_pair=4.0),)
    spec = make_spec(layers=4, unit_bytes=1 << 20, groups=groups)
    job = Workload(prompt_lens=(2000,) * 4, output_lens=(4,) * 4)
    machines = [make_machine(name="roomy"), make_machine(name="narrow")]
    limits = [make_limits(host_bytes=64 * GIB), make_limits(host_bytes=PROCESS_BYTES + (1 << 30))]
    with pytest.raises(CapacityError, match=r"stage 1 of 2 \(layers \d to 3 on narrow\): .* GiB are missing"):
        divide(job_of(make_options(kv="host=1"), spec, machines, limits, job))


def test_a_job_that_is_smaller_than_the_pipeline(make_spec, make_machine, make_limits, make_options):
    """Two requests on three stages: two blocks are in flight, and the third is empty."""
    spec, job = make_spec(layers=6, unit_bytes=1 << 20), Workload(prompt_lens=(8, 8), output_lens=(5, 5))
    limits, machines = [make_limits()] * 3, [make_machine()] * 3
    plan = divide(job_of(make_options(), spec, machines, limits, job))
    assert plan.forecast.num_passes == 2 * 5
    assert plan.bound_by == ROUND_TRIP
    empty = divide(job_of(make_options(), spec, machines, limits, Workload(prompt_lens=(), output_lens=())))
    assert (empty.forecast.seconds, empty.forecast.num_passes) == (0.0, 0)


def test_blocks_share_the_requests_evenly():
    job = Workload(prompt_lens=tuple(range(1, 11)), output_lens=(3, 9) * 5)
    blocks = [block_of(job.take([*range(shift, 10), *range(shift)]), 5) for shift in range(2)]
    assert [len(block) for block in blocks] == [2, 2]
    assert sorted(blocks[0].output_lens) == [3, 9], "short and long answers"
    assert len(block_of(job, 3)) == 4


def test_one_machine_is_a_pipeline_of_one_stage():
    job = large(["t4-gcp"], link=LinkRate(bytes_per_s=1.0, latency_s=100.0))
    plan, alone = divide(job), alone_of(job)
    assert plan.forecast.seconds == pytest.approx(alone.forecast.seconds, rel=0.05)
    assert (len(plan.stages), plan.bound_by, plan.stages[0].plan.policy.hidden_bytes) == (1, "stage 0", 0)


def test_many_machines_are_planned_in_seconds():
    """Machines that are alike share what is found: few stages are looked for, however many there are."""
    job = large(["t4-gcp"] * 48, link=LinkRate(bytes_per_s=1.25e8, latency_s=0.01))
    searched = []
    with pytest.MonkeyPatch.context() as patch:
        best = Search.best
        patch.setattr(Search, "best", lambda self, bounds: searched.append(1) or best(self, bounds))
        plan = divide(job)
    assert [len(stage.layers) for stage in plan.stages] == [1] * 48
    assert len(searched) < 60
