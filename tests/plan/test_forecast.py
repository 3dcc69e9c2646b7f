"""When KV goes to disk: where that gains enough, or was asked for; and what is said about it."""

from __future__ import annotations

import dataclasses

import pytest

from flexgen.base.quantities import GIB
from flexgen.plan.price.pass_time import Expectation
from flexgen.plan.tell.forecast import forecast_again, make_plan
from flexgen.plan.tell.spill import LEAST_SPILL_GAIN, Spill
from flexgen.plan.workload import Workload
from flexgen.report.plans import format_forecast

JOB = Workload(prompt_lens=(1000,) * 400, output_lens=(30,) * 400)
LITTLE, MUCH = 2e12, 5e12  # FLOP/s with which KV on disk gains little, and much


@pytest.fixture(scope="module")
def planned(llama_3b, make_machine, make_limits, make_options, process_bytes):
    def run(flops, disk_bytes=100 * GIB, **options):
        machine = make_machine(
            dense={"bfloat16": [(64, flops)]}, attention={"bfloat16": flops / 4}, elementwise={"bfloat16": 200e9},
            disk_read=4e9, disk_write=4e9, host_memory=200e9,
        )  # fmt: skip
        limits = make_limits(host_bytes=3 * GIB, disk_bytes=disk_bytes)
        return make_plan(make_options(**options), llama_3b, machine, limits, JOB, process_bytes=process_bytes)

    return run


@pytest.fixture(scope="module")
def little(planned):
    return planned(LITTLE)


def test_much_is_written_only_where_it_gains_enough(planned, little, llama_3b):
    spill = little.forecast.spill
    assert (little.policy.kv_disk_bytes, little.forecast.disk_written_bytes) == (0, 0)
    assert not spill.chosen
    assert 0 < spill.gain < LEAST_SPILL_GAIN
    assert spill.written_bytes > llama_3b.checkpoint_bytes
    assert spill.seconds_without == little.forecast.seconds
    much = planned(MUCH)
    assert much.policy.kv_disk_bytes > 0
    assert much.forecast.spill.chosen
    assert much.forecast.spill.gain >= LEAST_SPILL_GAIN
    assert much.forecast.spill.seconds == much.forecast.seconds
    assert little.forecast.budget_bytes["disk"] == much.forecast.budget_bytes["disk"] == 100 * GIB


def test_a_budget_that_was_given_is_used(planned, little):
    asked = planned(LITTLE, disk="100GiB")
    assert asked.policy.kv_disk_bytes > 0
    assert asked.forecast.spill == dataclasses.replace(little.forecast.spill, chosen=True)


def test_what_is_pinned_is_not_weighed(planned):
    pinned = planned(LITTLE, kv="disk=1")
    assert pinned.policy.kv.disk == 1
    assert pinned.forecast.spill is None


def test_without_a_budget_nothing_is_written(planned, little):
    none = planned(LITTLE, disk_bytes=0, disk="0")
    assert none.policy == little.policy
    assert none.forecast.spill is None


def test_another_job_has_another_answer(little, llama_3b):
    again = forecast_again(little.forecast, little.policy, Expectation(llama_3b, little.machine, "bfloat16"), JOB.take(range(4)))
    assert again.spill is None


def told(forecast, **changes):
    return "\n".join(format_forecast(dataclasses.replace(forecast, **changes)))


def test_what_is_written_and_what_it_means_is_said(little):
    forecast = dataclasses.replace(little.forecast, spill=None)
    assert "written" not in told(forecast)
    assert "12.0 GiB of KV will be written to disk: less than 0.1% of what an SSD" in told(forecast, disk_written_bytes=12 * GIB)
    spill = Spill(chosen=True, written_bytes=6e12, seconds=3600.0, seconds_without=4680.0)
    text = told(forecast, disk_written_bytes=6e12, spill=spill)
    for part in ("1.0% of what an SSD rated for 600 TB written", "disk='0' forbids it", "would take 1:18:00 h, 30% longer"):
        assert part in text
    text = told(forecast, spill=dataclasses.replace(spill, chosen=False, seconds_without=3960.0))
    assert "no KV on disk: it would write 5.5 TiB and save 6:00 min (10% more tokens/s, less than 20%); disk= with a size allows it" in text
