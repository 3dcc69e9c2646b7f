import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen.plan.play.answer_lengths import CONVERSATION_QUANTILES, OutputLengths, expected
from flexgen.plan.play.simulate import simulate
from flexgen.plan.price.pass_time import Expectation
from flexgen.plan.search.solve import solve, space_of
from flexgen.plan.tell.forecast import forecast, forecast_again, make_plan
from flexgen.plan.tell.remaining import RemainingTime
from flexgen.plan.workload import Workload

JOB = Workload(prompt_lens=(256,) * 96, output_lens=(32,) * 96)


@given(share=st.floats(0, 1), quantiles=st.lists(st.integers(1, 5000), min_size=1, max_size=40))
def test_quantiles_lie_within_the_distribution_and_rise(share, quantiles):
    lengths = OutputLengths(tuple(sorted(quantiles)))
    assert min(quantiles) <= lengths.at(share) <= max(quantiles)
    assert lengths.at(share / 2) <= lengths.at(share)


def test_certain_lengths_stay():
    assert expected(JOB) is JOB
    known = Workload(prompt_lens=(5,), output_lens=(9,), expected_lens=(3,), may_end_early=True)
    assert expected(known) is known


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 900)), min_size=1, max_size=300))
def test_no_answer_is_expected_to_be_longer_than_it_may(lengths):
    job = expected(Workload(prompt_lens=tuple(s for s, _ in lengths), output_lens=tuple(n for _, n in lengths), may_end_early=True))
    for most, likely, reserved in zip(job.output_lens, job.expected_lens, job.reserved_lens, strict=True):
        assert 1 <= likely <= most
        assert reserved <= most


def test_only_what_may_end_early_is_expected_to():
    lengths = {"prompt_lens": (1,) * 4, "output_lens": (4096, 4096, 4096, 9)}
    job = expected(Workload(**lengths, least_lens=(0, 4096, 1000, 9), may_end_early=True))
    assert job.expected_lens[0] < 600
    assert job.expected_lens[1:] == (4096, 1000, 9)
    assert (job.reserved_lens[0] < 600, job.reserved_lens[1:]) == (True, (4096, 1000, 9))
    assert job.least_lens == ()
    assert Workload(**lengths, least_lens=(0,) * 4, may_end_early=True) == Workload(**lengths, may_end_early=True)
    assert Workload(**lengths, least_lens=lengths["output_lens"]) == Workload(**lengths)


def test_likely_lengths_have_the_distribution():
    job = expected(Workload(prompt_lens=(1,) * 2000, output_lens=(4096,) * 2000, may_end_early=True))
    ranked = sorted(job.expected_lens)
    for share, quantile in zip(
        (0.025, 0.475, 0.975), (CONVERSATION_QUANTILES[0], CONVERSATION_QUANTILES[9], CONVERSATION_QUANTILES[-1]), strict=True
    ):
        assert ranked[int(share * 2000)] == pytest.approx(quantile, rel=0.05)
    halves = [sum(job.expected_lens[start::2]) for start in (0, 1)]
    assert halves[0] == pytest.approx(halves[1], rel=0.05)


def test_what_was_seen_replaces_what_was_assumed():
    lengths = OutputLengths()
    assert lengths.updated([]) is lengths
    means = [sum(each.quantiles) / len(each.quantiles) for each in (lengths.updated([10] * number) for number in (4, 16, 64, 4096))]
    assert means == sorted(means, reverse=True)
    assert means[-1] == pytest.approx(10, rel=0.1)
    assert len(lengths.updated(range(1, 100_000)).quantiles) == 1000


def test_room_that_was_kept_falls_free_when_an_answer_ends(make_spec, make_policy):
    spec = make_spec()  # 30 bytes of KV per token
    lengths = {"prompt_lens": (10,) * 20, "output_lens": (50,) * 20}
    policy = make_policy(kv_host_bytes=30 * 60 * 2)  # two whole requests
    certain = simulate(spec, policy, Workload(**lengths))
    early = simulate(spec, policy, Workload(**lengths, expected_lens=(5,) * 20, reserved_lens=(50,) * 20, may_end_early=True))
    assert certain.live.max() == early.live.max() == 2
    assert (certain.num_passes, early.num_passes) == (500, 50)
    daring = simulate(spec, policy, Workload(**lengths, expected_lens=(5,) * 20, reserved_lens=(5,) * 20, may_end_early=True))
    assert daring.live.max() > 2
    assert daring.kv_bytes["host"].max() <= 30 * 60 * 2


def test_a_forecast_says_what_the_simulation_does(llama_3b, make_machine, make_limits, make_options, process_bytes):
    arguments = make_options(), llama_3b, make_machine(), make_limits(), JOB
    plan = make_plan(*arguments, process_bytes=process_bytes)
    told, played = plan.forecast, simulate(llama_3b, plan.policy, JOB)
    seconds = played.seconds(Expectation(llama_3b, make_machine(), "bfloat16"), plan.policy)
    assert told.seconds == pytest.approx(seconds.sum())
    assert told.num_passes == played.num_passes
    assert told.output_tokens_per_s == pytest.approx(96 * 32 / seconds.sum())
    assert told.output_tokens_per_s < told.full_block_tokens_per_s
    assert told.seconds / told.num_passes * 32 * 0.5 < told.request_seconds < told.seconds
    assert told.bottleneck == max(told.resource_seconds, key=told.resource_seconds.get)
    assert sum(told.memory_bytes["host"].values()) <= told.budget_bytes["host"]
    assert told.gain_per_gib["host"] >= 0
    assert told.disk_written_bytes == 0
    again = forecast(solve(space_of(*arguments, process_bytes=process_bytes)), *arguments[1:], process_bytes=process_bytes)
    assert again == told
    longer = forecast_again(
        told, plan.policy, Expectation(llama_3b, make_machine(), "bfloat16"), Workload(prompt_lens=(256,), output_lens=(8,))
    )
    assert (longer.num_passes, longer.memory_bytes) == (8, told.memory_bytes)


@pytest.fixture
def planned(llama_3b, make_machine, make_limits, make_options, process_bytes):
    plan = make_plan(make_options(), llama_3b, make_machine(), make_limits(), JOB, process_bytes=process_bytes)
    return plan, Expectation(llama_3b, make_machine(), "bfloat16")


def test_the_time_left_follows_the_pace(planned):
    plan, expectation = planned
    left = RemainingTime(plan.forecast, plan.policy, expectation, JOB)
    assert left.seconds(0, 0) == pytest.approx(plan.forecast.seconds)
    half = plan.forecast.seconds / 2
    assert left.seconds(half, half) == pytest.approx(half)
    assert half < left.seconds(2 * half, half) < 2 * half  # twice as slow: nearly twice the rest
    assert left.seconds(0.01, plan.forecast.seconds + 1) == 0


def test_the_time_left_learns_lengths(planned):
    plan, expectation = planned
    job = Workload(prompt_lens=(256,) * 96, output_lens=(400,) * 96, may_end_early=True)
    left = RemainingTime(forecast_again(plan.forecast, plan.policy, expectation, job), plan.policy, expectation, job)
    before = left.seconds(0, 0)
    for _ in range(64):
        left.finished(4)
    assert left.seconds(0, 0) < before / 2
