"""The middle of a job: which passes stand for it, and jobs that have none."""

from __future__ import annotations

import numpy as np
import pytest
from machines import machine_of

from flexgen.errors import OptionError
from flexgen.plan.play.simulate import simulate
from flexgen.plan.policy import Fractions
from flexgen.plan.price.pass_time import Expectation
from flexgen.plan.tell.forecast import Plan
from flexgen.plan.tell.middle import find_middle
from flexgen.plan.workload import Workload


@pytest.fixture
def plan_of(make_spec, make_policy):
    def make(**changes) -> Plan:
        policy = make_policy(kv=Fractions(host=1.0), kv_host_bytes=1 << 40, page_tokens=16, micro_batch_tokens=512, **changes)
        return Plan(spec=make_spec(), machine=machine_of(), policy=policy, forecast=None)  # type: ignore[arg-type]

    return make


def job(count: int, prompt: int = 64, answer: int = 8) -> Workload:
    return Workload(prompt_lens=(prompt,) * count, output_lens=(answer,) * count)


def rates(plan: Plan, workload: Workload, num_passes: int):
    """Expected tokens per second of the passes from each pass on."""
    played = simulate(plan.spec, plan.policy, workload)
    seconds = played.seconds(Expectation(plan.spec, plan.machine, plan.policy.dtype), plan.policy)
    sampled = np.array([each.num_sampled for each in played.passes()], dtype=float)
    return [sampled[at : at + num_passes].sum() / seconds[at : at + num_passes].sum() for at in range(len(sampled) - num_passes + 1)]


def test_equal_passes_are_found_early(plan_of) -> None:
    """Two prompts enter in every pass and two answers end: from the end of the first answer on, all passes are alike."""
    plan = plan_of(schedule="diagonal", max_num_seqs=64, prefill_tokens=128)
    found = find_middle(plan, job(100), 5)
    assert (found.first, found.num_passes) == (8, 42)
    assert found.output_tokens_per_s == pytest.approx(rates(plan, job(100), 5)[20])
    assert find_middle(plan, job(100), 5, num_before=11).first == 11


@pytest.mark.parametrize("schedule", ["diagonal", "zigzag"])
def test_passes_that_stand_for_all(schedule: str, plan_of) -> None:
    """Where a block enters at once, some passes have all prompts and others none."""
    plan, workload = plan_of(schedule=schedule, max_num_seqs=16, prefill_tokens=1024), job(400)
    found = find_middle(plan, workload, 8)
    of_each = rates(plan, workload, 8)
    assert of_each[found.first] == pytest.approx(found.output_tokens_per_s, rel=0.05)
    few = find_middle(plan, workload, 3)
    of_few = [abs(each / few.output_tokens_per_s - 1) for each in rates(plan, workload, 3)]
    begin, end = 8, 8 + few.num_passes - 3
    assert of_few[few.first] == pytest.approx(min(of_few[begin : end + 1]))


def test_a_short_job_has_no_middle(plan_of) -> None:
    plan = plan_of(schedule="diagonal", max_num_seqs=64, prefill_tokens=128)
    with pytest.raises(
        OptionError, match=r"16 requests make a job of 15 passes, of which 0 are .* 5 are to be measured: raise num_prompts"
    ):
        find_middle(plan, job(16), 5)
    with pytest.raises(OptionError, match="of which 4 are"):
        find_middle(plan, job(24), 5)
