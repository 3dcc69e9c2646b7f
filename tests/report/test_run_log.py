"""The books of a run: the time left within a pass that takes long."""

from __future__ import annotations

from typing import Any

import pytest

from flexgen.plan.price.work import PassWork
from flexgen.report import clock
from flexgen.report import run_log as record
from flexgen.report.pass_log import Trace
from flexgen.report.progress import Progress
from flexgen.report.run_log import Record


class Meters:
    def bytes_moved(self) -> dict[str, int]:
        return {}

    def disk_busy_seconds(self) -> float:
        return 0.0


class Remaining:
    """Of a job of 100 expected seconds, at the pace so far."""

    def seconds(self, spent: float, expected_of_spent: float) -> float:
        return max(100 - expected_of_spent, 0) * (spent / expected_of_spent if expected_of_spent else 1)


class Now:
    seconds = 1000.0

    def perf_counter(self) -> float:
        return self.seconds


@pytest.mark.parametrize(
    ("unit", "elapsed", "expected"),
    [(0, 1.0, 100.0), (5, 20.0, 80.0), (5, 80.0, 320.0), (10, 80.0, 120.0), (10, 20.0, 30.0)],
)
def test_the_time_left_goes_on_within_a_pass(monkeypatch: pytest.MonkeyPatch, unit: int, elapsed: float, expected: float) -> None:
    """The first pass should take 40 seconds; it is as fast as expected, four times or twice as slow, or twice as fast."""
    now = Now()
    monkeypatch.setattr(record, "time", now)
    monkeypatch.setattr(clock, "time", now)
    told: list[Progress] = []
    trace: Any = Trace.__new__(Trace)
    trace.seconds, trace.expected_seconds, trace.num_passes = 0.0, 0.0, 0
    monkeypatch.setattr(Trace, "expected_of", lambda self, work: 40.0)
    monkeypatch.setattr(clock.ProgressClock, "_shares", lambda *_: {})
    books = Record(Meters(), trace, remaining=Remaining(), on_progress=told.append)  # type: ignore[arg-type]
    books.begins(PassWork())
    now.seconds += elapsed
    books.tell(3, (unit, 10))
    assert told[-1].eta_seconds == pytest.approx(expected)


def test_what_the_forecast_left_out_is_at_least_the_rest_of_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    trace: Any = Trace.__new__(Trace)
    trace.seconds, trace.expected_seconds = 120.0, 120.0
    monkeypatch.setattr(Trace, "expected_of", lambda self, work: 40.0)
    books = Record(Meters(), trace, remaining=Remaining())  # type: ignore[arg-type]
    books.begins(PassWork())
    assert books._seconds_left(0.25) == pytest.approx(30.0)
