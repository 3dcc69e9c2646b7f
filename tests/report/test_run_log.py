"""The log of a run: what it counts, and the time left within a pass that takes long."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from flexgen.errors import RequestError
from flexgen.plan.price.work import PassWork
from flexgen.report.pass_log import PassLog
from flexgen.report.progress import Progress
from flexgen.report.run_log import RunCounts, RunLog
from flexgen.request import Generated, TokenLogprobs, TokenRequest, TokenResult


class Meters:
    def bytes_moved(self) -> dict[str, int]:
        return {}

    def disk_busy_seconds(self) -> float:
        return 0.0

    def values_attended(self) -> dict[str, int]:
        return {"seen": 0, "unread": 0}


class Remaining:
    """Of a job of 100 expected seconds, at the pace so far."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def finished(self, num_tokens: int) -> None:
        self.lengths.append(num_tokens)

    def seconds(self, spent: float, expected_of_spent: float) -> float:
        return max(100 - expected_of_spent, 0) * (spent / expected_of_spent if expected_of_spent else 1)


class Passes(PassLog):
    """Passes of 40 expected seconds, whatever they carry."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.expected_seconds, self.num_passes = seconds, seconds, 0

    def work_of(self, load: Any) -> PassWork:
        return PassWork()

    def expected_of(self, work: PassWork) -> float:
        return 40.0


class Now:
    seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def new_log(**how: Any) -> RunLog:
    return RunLog(Meters(), Passes(how.pop("seconds", 0.0)), **how)


@pytest.mark.parametrize(
    ("unit", "elapsed", "expected"),
    [(0, 1.0, 100.0), (5, 20.0, 80.0), (5, 80.0, 320.0), (10, 80.0, 120.0), (10, 20.0, 30.0)],
)
def test_the_time_left_goes_on_within_a_pass(monkeypatch: pytest.MonkeyPatch, unit: int, elapsed: float, expected: float) -> None:
    """The first pass should take 40 seconds; it is as fast as expected, four times or twice as slow, or twice as fast."""
    now = Now()
    monkeypatch.setattr(RunLog, "_link_shares", lambda *_: {})
    told: list[Progress] = []
    log = new_log(remaining=Remaining(), on_progress=told.append, now=now)
    log.begins(None)  # type: ignore[arg-type]
    now.seconds += elapsed
    log.tell(3, unit, 10)
    assert told[-1].eta_seconds == pytest.approx(expected)


def test_what_the_forecast_left_out_is_at_least_the_rest_of_the_pass() -> None:
    log = new_log(seconds=120.0, remaining=Remaining())
    log.begins(None)  # type: ignore[arg-type]
    assert log._seconds_left(0.25) == pytest.approx(30.0)


def request(*earlier: int) -> TokenRequest:
    ends = frozenset({6})
    return TokenRequest(index=7, prompt_token_ids=(1, 2), generated=Generated(token_ids=earlier), max_tokens=5, stop_token_ids=ends)


def test_an_earlier_run_s_tokens_are_given_not_generated() -> None:
    remaining = Remaining()
    log = new_log(remaining=remaining)
    log.entered(recomputed_tokens=4, shared_tokens=1)
    log.finished(TokenResult(index=7, token_ids=(3, 4, 9, 5, 6), finish_reason="stop"), request(3, 4, 9), 1)
    assert (list(log.given), list(log.generated), list(log.found)) == ([5], [2], [1])
    assert log.counts == RunCounts(requests=1, prompt_tokens=2, output_tokens=2, recomputed_tokens=4, shared_prompt_tokens=1)
    assert remaining.lengths == [2]


def test_the_length_of_an_answer_that_cannot_end_early_says_nothing() -> None:
    remaining = Remaining()
    log = new_log(remaining=remaining)
    log.finished(TokenResult(index=7, token_ids=(3,) * 5), dataclasses.replace(request(), stop_token_ids=frozenset()), 0)
    assert (list(log.generated), remaining.lengths) == ([5], [])


def test_errors_are_counted() -> None:
    remaining = Remaining()
    log = new_log(remaining=remaining)
    log.finished(TokenResult(index=7, token_ids=(5,), finish_reason="error", error=RequestError("no")), request(), 0)
    assert (log.counts.requests, log.counts.errors, log.finish_reasons["error"]) == (1, 1, 1)
    assert remaining.lengths == [], "the length of an answer that failed says nothing"


def test_a_prompt_that_is_only_scored_has_no_length_of_an_answer() -> None:
    remaining = Remaining()
    log = new_log(remaining=remaining)
    asked = TokenRequest(index=0, prompt_token_ids=(1, 2, 3, 4), max_tokens=0, num_prompt_logprobs=0, first_scored=2)
    score = TokenLogprobs(token_ids=(3,), logprobs=(-1.0,), rank=None)
    log.finished(TokenResult(index=0, prompt_logprobs=(score, score)), asked, 0)
    log.finished(TokenResult(index=0, finish_reason="error", error=RequestError("no")), asked, 0)
    assert (list(log.given), list(log.generated), list(log.scored)) == ([3, 3], [0, 0], [2, 0])
    assert (log.counts.scored_tokens, log.counts.output_tokens, remaining.lengths) == (2, 0, [])


def test_a_pass_counts_as_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told only once some time has passed since it was told last."""
    now = Now()
    monkeypatch.setattr(RunLog, "_link_shares", lambda *_: {})
    monkeypatch.setattr(Passes, "add", lambda *_: None)
    monkeypatch.setattr(Passes, "work_of", lambda *_: PassWork(num_prompt_tokens=6, num_sampled=2, num_scored=4))
    told: list[Progress] = []
    log = new_log(on_progress=told.append, num_requests=3, now=now)
    work = log.begins(None)  # type: ignore[arg-type]
    log.passed(1.0, work, {})
    log.tell(1, 0, 10)
    assert told == []
    now.seconds += 10
    log.tell(1, 4, 10)
    log.tell(1, 5, 10)
    assert [
        (each.num_requests, each.unit, each.prompt_tokens, each.output_tokens, each.scored_tokens, each.eta_seconds) for each in told
    ] == [(3, 4, 6, 2, 4, None)]
