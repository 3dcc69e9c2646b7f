"""Several blocks in flight: each has pools of its own, and all of them together keep the budgets."""

from __future__ import annotations

import dataclasses

import pytest
from plan.instances import PROCESS_BYTES, TIERS, instance_of

from flexgen.base.quantities import GIB
from flexgen.errors import CapacityError
from flexgen.options import DTYPE_BYTES, EngineOptions
from flexgen.plan.play.blocks import Blocks
from flexgen.plan.play.simulate import simulate
from flexgen.plan.policy import Fractions
from flexgen.plan.price.copies import hidden_bytes
from flexgen.plan.price.memory import HIDDEN, footprint
from flexgen.plan.price.pass_time import Expectation
from flexgen.plan.price.requests import JobSizes
from flexgen.plan.search.evaluate import Bounds
from flexgen.plan.search.optimise import Search
from flexgen.plan.search.shortage import shortage
from flexgen.plan.search.space import Space
from flexgen.plan.workload import Workload


def test_pools_count_once_for_each_block(make_spec, make_policy, make_limits):
    sizes = {"kv_device_bytes": 100, "kv_host_bytes": 20, "kv_disk_bytes": 3, "kv_tail_bytes": 7, "kv_staging_bytes": 1000}
    one = make_policy(device="cuda", **sizes)
    three = dataclasses.replace(one, num_blocks=3, hidden_bytes=5)
    limits = make_limits(device="cuda", device_bytes=GIB)
    before, after = (footprint(policy, make_spec(), limits, process_bytes=0) for policy in (one, three))
    assert (after["device"]["KV"], after["host"]["KV"], after["disk"]["KV"]) == (300, 60, 9)
    assert (before["host"]["KV staging"], after["host"]["KV staging"]) == (1007, 1021), "pages are read ahead for one pass at a time"
    assert after["host"][HIDDEN] == 5
    assert HIDDEN not in before["host"]
    assert three.kv_bytes == 3 * one.kv_bytes == 369


def test_a_pass_is_priced_for_its_own_block(make_spec, make_policy, make_machine):
    job = Workload(prompt_lens=(30,) * 20, output_lens=(8,) * 20)
    spec, one = make_spec(), make_policy(kv_host_bytes=4000)
    three = dataclasses.replace(one, num_blocks=3)
    expectation = Expectation(spec, make_machine(), "bfloat16")
    seconds = [simulate(spec, policy, job).seconds(expectation, policy).tolist() for policy in (one, three)]
    assert seconds[0] == seconds[1]


def test_room_for_the_hidden_states_of_two_passes(make_spec, make_policy):
    spec, job = make_spec(), Workload(prompt_lens=(30,) * 20, output_lens=(8,) * 20)
    sizes = JobSizes(spec, job, 16)
    policy = make_policy(max_num_seqs=10, prefill_tokens=60, num_blocks=4)
    tokens = 10 + 60 + 30 - 1  # a next token each, and prompts of a quota that the last may overdraw
    least = 2 * tokens * spec.hidden_size * DTYPE_BYTES["bfloat16"]
    assert least <= hidden_bytes(spec, sizes, policy) < least + 4096
    assert hidden_bytes(spec, sizes, dataclasses.replace(policy, num_blocks=1)) == 0


@pytest.mark.matrix(8)
@pytest.mark.parametrize("seed", range(40))
def test_budgets_hold_for_all_blocks_together(seed):
    instance = instance_of(seed)
    limits = dataclasses.replace(instance.limits, host_bytes=2 * instance.limits.host_bytes, device_bytes=2 * instance.limits.device_bytes)
    space = Space(
        instance.options,
        instance.spec,
        instance.machine,
        limits,
        instance.workload,
        PROCESS_BYTES,
        TIERS,
        Blocks(num_blocks=3, num_stages=3),
    )
    try:
        policy = Search(space, patience=0.05).best(Bounds()).policy
    except CapacityError:
        with pytest.raises(CapacityError, match=r"budget|missing|raise "):
            Search(space, patience=0.05).best(Bounds())
        return
    assert policy.num_blocks == 3
    used = footprint(policy, instance.spec, limits, process_bytes=PROCESS_BYTES)
    for tier, parts in used.items():
        assert sum(parts.values()) <= getattr(limits, f"{tier}_bytes"), tier
    assert simulate(instance.spec, policy, instance.workload).num_passes


def test_blocks_of_a_shortage_are_named(make_spec, make_machine, make_limits):
    job = Workload(prompt_lens=(3000,), output_lens=(8,))
    options = EngineOptions(dtype="bfloat16", kv="host=1")
    limits = make_limits(host_bytes=PROCESS_BYTES + 60 * (1 << 20))
    spec = dataclasses.replace(make_spec(), kv_groups=(dataclasses.replace(make_spec().kv_groups[0], bytes_per_token=1 << 13),))
    few, many = (Space(options, spec, make_machine(), limits, job, PROCESS_BYTES, TIERS, Blocks(num_blocks=number)) for number in (1, 4))
    assert "KV of one request in each of 4 blocks" in shortage(many)
    assert "in each of" not in shortage(few)


def test_requests_enter_in_the_passes_of_another_stage(make_spec, make_policy):
    """In homes of the policy's own shares, whatever homes they have there."""
    spec, job = make_spec(), Workload(prompt_lens=(30, 20) * 40, output_lens=(8, 5) * 40)
    narrow = simulate(spec, make_policy(kv_host_bytes=spec.kv_bytes(40) * 7), job)
    pools = {"kv_device_bytes": 1 << 20, "kv_host_bytes": 1 << 20}
    wide = make_policy(device="cuda", kv=Fractions(device=0.25, host=0.75), **pools)
    alike = simulate(spec, wide, job, like=narrow)
    assert simulate(spec, wide, job).num_passes < narrow.num_passes == alike.num_passes
    assert alike.live.tolist() == narrow.live.tolist()
    for name in ("num_tokens", "num_prompt_tokens", "num_sampled", "attention_flops"):
        assert getattr(alike.total(), name) == getattr(narrow.total(), name), name
    on_device, on_host = alike.total().step_bytes, alike.total().host_step_bytes
    assert on_device + on_host == narrow.total().host_step_bytes
    assert on_device / (on_device + on_host) == pytest.approx(0.25, abs=0.05)
