"""How far a job is, from outside."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from jobs.places import opened, paths_of, result

from flexgen.jobs import store as store_module
from flexgen.jobs.begun import Begun
from flexgen.jobs.status import read_status
from flexgen.request import Generated


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that tests let pass."""
    now = [100.0]
    monkeypatch.setattr(store_module.time, "monotonic", lambda: now[0])
    return now


def test_a_job_that_was_never_scanned(tmp_path: Path) -> None:
    with opened(tmp_path / "out.jsonl") as store:
        found = read_status(store.paths)
    assert (found.lines, found.answered, found.eta_seconds, found.ending) == (None, 0, None, None)


def test_a_job_while_it_runs_and_afterwards(tmp_path: Path, clock: list[float]) -> None:
    output = tmp_path / "out.jsonl"
    with opened(output) as store:
        store.start_run(num_lines=20)
        assert read_status(store.paths).eta_seconds is None
        for number in (1, 2, 3, 4):
            store.add(result(number, failed=number == 3))
        clock[0] += 8.0
        store.commit([Begun(line_number=9, digest=1, choice=0, start=0, generated=Generated(token_ids=(1,) * 30))])
        found = read_status(store.paths)
        assert (found.process, found.ending, found.lines) == (os.getpid(), None, 20)
        assert (found.answered, found.failed, found.in_progress) == (3, 1, 1)
        assert (found.prompt_tokens, found.output_tokens) == (8, 1 + 2 + 3 + 4 + 30)
        assert (found.run_seconds, found.lines_per_s, found.output_tokens_per_s) == (8.0, 0.5, 5.0)
        assert found.eta_seconds == 32.0
        store.end_run("stopped by SIGTERM")
    found = read_status(paths_of(output))
    assert (found.process, found.ending, found.eta_seconds) == (None, "stopped by SIGTERM", None)


def test_a_later_run_has_its_own_pace(tmp_path: Path, clock: list[float]) -> None:
    """What earlier runs did, and the tokens that they left, are not this one's speed."""
    output = tmp_path / "out.jsonl"
    for first, seconds in ((1, 100.0), (11, 5.0)):
        with opened(output) as store:
            store.start_run(num_lines=30)
            for number in range(first, first + 10):
                store.add(result(number))
            clock[0] += seconds
            store.commit([Begun(line_number=25, digest=1, choice=0, start=first, generated=Generated(token_ids=(1, 2)))])
            found = read_status(store.paths)
    assert (found.answered, found.run_seconds, found.lines_per_s, found.eta_seconds) == (20, 5.0, 2.0, 5.0)
    assert found.output_tokens_per_s == (sum(range(11, 21)) + 2) / 5.0
