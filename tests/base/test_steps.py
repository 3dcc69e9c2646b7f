"""What takes long says so."""

from __future__ import annotations

import logging

import pytest

from flexgen.base.steps import LOGGER, counted_lines, step


def test_a_step_is_a_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, LOGGER):
        step("loading weights")
    assert [(record.name, record.getMessage()) for record in caplog.records] == [(LOGGER, "loading weights ...")]


def test_long_reading_says_how_far_it_is(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    seen: list[int] = []
    with caplog.at_level(logging.INFO, LOGGER):
        for line in counted_lines(range(12), "reading"):
            seen.append(line)
            now += 1.0
    assert seen == list(range(12))
    assert caplog.messages == ["reading ...", "reading: 5 lines so far ...", "reading: 10 lines so far ..."]
