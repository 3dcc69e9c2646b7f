"""Estimates how long a running job still takes: the forecast, corrected by the measured pace and the answers seen so far."""

from __future__ import annotations

from flexgen.plan.play.answer_lengths import OutputLengths, expected
from flexgen.plan.policy import Policy
from flexgen.plan.price.pass_time import Expectation
from flexgen.plan.tell.forecast import Forecast, forecast_again
from flexgen.plan.workload import Workload

# The forecast's pace counts as much as this many measured passes.
ASSUMED_PASSES = 2
# The job is forecast again after this many answers, and then whenever their number has doubled.
FIRST_LOOK = 16


class RemainingTime:
    """Estimates the seconds left of one run."""

    def __init__(self, forecast: Forecast, policy: Policy, expectation: Expectation, workload: Workload) -> None:
        self._forecast, self._policy, self._expectation, self._workload = forecast, policy, expectation, workload
        self._lengths: list[int] = []
        self._next_look = FIRST_LOOK

    def finished(self, num_tokens: int) -> None:
        """Add the length of an answer that might have ended early; now and then the job is played again with the lengths seen so far."""
        if not self._workload.may_end_early or self._next_look > len(self._workload):
            return
        self._lengths.append(num_tokens)
        if len(self._lengths) == self._next_look:
            self._next_look *= 2
            likely = expected(self._workload, OutputLengths().updated(self._lengths))
            self._forecast = forecast_again(self._forecast, self._policy, self._expectation, likely)

    def seconds(self, spent: float, expected_of_spent: float) -> float:
        """Return the seconds left, at the pace so far.

        Args:
            spent: The seconds of the passes so far.
            expected_of_spent: The seconds that these passes were expected to take.
        """
        assumed = ASSUMED_PASSES * self._forecast.pass_seconds
        pace = (spent + assumed) / max(expected_of_spent + assumed, 1e-9)
        return max(self._forecast.seconds - expected_of_spent, 0.0) * pace
