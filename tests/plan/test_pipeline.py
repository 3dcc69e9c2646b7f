"""The pipeline over time: against a play of one event after the other, and in cases that are done by hand."""

from __future__ import annotations

import numpy as np
import pytest

from flexgen.plan.stages.pipeline import PassTimes, play


def times_of(stages: list[list[float]], links: float = 0.0, exposed: float = 0.0, latency_s: float = 0.0) -> PassTimes:
    seconds = np.array(stages, dtype=np.float64)
    between = np.ones((len(seconds), seconds.shape[1] - 1))
    return PassTimes(stages=seconds, links=links * between, exposed=exposed * between, latency_s=latency_s)


def slowly_played(times: PassTimes, num_blocks: int) -> float:
    """One event after the other: a stage or link takes a pass when it has come and the one before has left."""
    num_passes, num_stages = times.stages.shape
    latency = times.latency_s if num_stages > 1 else 0.0
    stage_free, link_free, ready = [0.0] * num_stages, [0.0] * (num_stages - 1), [0.0] * num_blocks
    for index in range(num_passes):
        for block in range(num_blocks):
            at = ready[block]
            for stage in range(num_stages):
                at = stage_free[stage] = max(at, stage_free[stage]) + times.stages[index, stage]
                if stage < num_stages - 1:
                    left = max(at + times.exposed[index, stage], link_free[stage] + times.links[index, stage])
                    link_free[stage], at = left, left + latency
            ready[block] = at + latency
    return max(ready)


@pytest.mark.parametrize("seed", range(30))
def test_a_play_is_one_event_after_the_other(seed: int) -> None:
    draw = np.random.default_rng(seed)
    passes, stages, blocks = int(draw.integers(1, 12)), int(draw.integers(1, 6)), int(draw.integers(1, 7))
    links = draw.uniform(0, 2, (passes, stages - 1))
    times = PassTimes(
        stages=draw.uniform(0.1, 1, (passes, stages)),
        links=links,
        exposed=links * draw.uniform(0, 1, links.shape),
        latency_s=draw.uniform(0, 0.5),
    )
    played = play(times, blocks)
    assert played.seconds == pytest.approx(slowly_played(times, blocks))
    assert (played.starts[:, 1:] >= played.ends[:, :-1] - 1e-9).all(), "a block's next pass begins when its tokens are back"
    assert played.seconds >= max(blocks * times.stages.sum(axis=0).max(), times.trips.sum()) - 1e-9


def test_filling_and_draining_by_hand() -> None:
    """Three stages of a second each, three blocks, four passes: twelve passes at the slowest, and two seconds to fill."""
    times = times_of([[1.0, 1.0, 1.0]] * 4)
    assert play(times, 3).seconds == 14.0
    assert list(times.rounds(3)) == [3.0] * 4


def test_a_round_trip_that_is_longer_than_a_round_by_hand() -> None:
    """Two blocks need two seconds of a stage, a trip takes 2 + 2 * 0.5: one second of three is a bubble."""
    times = times_of([[1.0, 1.0]] * 5, latency_s=0.5)
    assert list(times.trips) == [3.0] * 5
    assert play(times, 2).seconds == 4 * 3.0 + 3.0 + 1.0


def test_a_slow_link_is_the_bound_by_hand() -> None:
    """Two blocks, and two seconds on the link for each pass, of which one follows the end of the stage's."""
    times = times_of([[1.0, 1.0]] * 6, links=2.0, exposed=1.0)
    assert times.slowest.tolist() == [2.0] * 6
    assert play(times, 2).seconds == 5 * 4.0 + 3.0 + 2.0


def test_one_stage_has_no_latency() -> None:
    times = times_of([[1.0], [2.0]], latency_s=9.0)
    assert play(times, 1).seconds == 3.0


@pytest.mark.parametrize("num_blocks", [1, 3, 5])
def test_equal_passes_take_rounds_and_the_last_trip(num_blocks: int) -> None:
    """Whatever bounds them: the other blocks are behind the first by a pass at the slowest stage each."""
    times = times_of([[0.5, 1.0, 0.75, 0.25]] * 50, links=0.3, exposed=0.1, latency_s=0.2)
    expected = times.rounds(num_blocks)[:-1].sum() + times.trips[-1] + (num_blocks - 1) * times.slowest[-1]
    assert play(times, num_blocks).seconds == pytest.approx(expected)
