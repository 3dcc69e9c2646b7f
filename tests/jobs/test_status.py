"""How far a job is, from outside."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from jobs.places import opened, paths_of, result

from flexgen.cli.status import format_status
from flexgen.jobs import store as store_module
from flexgen.jobs.saved_progress import ProgressRow
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
        assert not read_status(store.paths).answering
        for number in (1, 2, 3, 4):
            store.add(**result(number, failed=number == 3))
        clock[0] += 8.0
        store.commit([ProgressRow(line_number=9, digest=1, choice=0, start=0, generated=Generated(token_ids=(1,) * 30))])
        found = read_status(store.paths)
        assert (found.process, found.ending, found.lines) == (os.getpid(), None, 20)
        assert (found.answered, found.failed, found.in_progress, found.in_progress_tokens) == (3, 1, 1, 30)
        assert (found.prompt_tokens, found.output_tokens) == (8, 1 + 2 + 3 + 4 + 30)
        assert (found.run_seconds, found.lines_per_s, found.output_tokens_per_s) == (8.0, 0.5, 5.0)
        store.end_run("stopped by SIGTERM")
    found = read_status(paths_of(output))
    assert (found.process, found.ending, found.eta_seconds) == (None, "stopped by SIGTERM", None)


def test_a_run_that_has_finished_no_line_tells_what_it_knows(tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the ramp of a job lines say nothing; the run knows its plan and what is left."""
    output, now = tmp_path / "out.jsonl", [1000.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    with opened(output) as store:
        store.start_run(num_lines=20)
        clock[0] += 10.0
        store.run.tell(output_tokens=4500, in_progress=256, eta_seconds=540.0, planned_seconds=780.0)
        now[0] += 3.0
        found = read_status(store.paths)
    assert found.answering
    assert (found.in_progress, found.in_progress_tokens, found.output_tokens) == (256, 4500, 4500)
    assert (found.run_seconds, found.planned_seconds, found.output_tokens_per_s) == (10.0, 780.0, 450.0)
    assert (found.eta_seconds, found.eta_age_seconds) == (537.0, 3.0)
    said = format_status(found)
    assert "256 in progress with 4,500 tokens" in said
    assert "10.0 s (13:00 min planned)" in said
    assert "ETA 8:57 min, as the run itself estimated 3.0 s ago" in said
    after = read_status(paths_of(output))  # killed: what was not stored is gone
    assert (after.process, after.answering, after.in_progress, after.output_tokens, after.eta_seconds) == (None, False, 0, 0, None)
    assert after.planned_seconds == 780.0


def test_a_job_that_only_scores_has_a_pace_of_prompts(tmp_path: Path, clock: list[float]) -> None:
    """Those of earlier runs are not counted, and a run that has not told what there was has none."""
    output = tmp_path / "out.jsonl"
    for first in (1, 11):
        with opened(output) as store:
            store.start_run(num_lines=30)
            for number in range(first, first + 10):
                store.add(**{**result(number), "prompt_tokens": 100 * first, "output_tokens": 0})
            clock[0] += 4.0
            store.commit()
            assert read_status(store.paths).prompt_tokens_per_s is None
            store.run.tell(output_tokens=0, in_progress=2, eta_seconds=3.0, planned_seconds=None)
            found = read_status(store.paths)
            assert found.prompt_tokens_per_s == 1000 * first / 4
            assert f"lines/s, {250 * first:,.1f} prompt tokens/s\n" in format_status(found)
            store.end_run("finished")
    assert "2,750.0 prompt tokens/s" in format_status(read_status(paths_of(output)))


def test_before_the_first_line_is_done_prompts_have_a_pace(tmp_path: Path, clock: list[float]) -> None:
    with opened(tmp_path / "out.jsonl") as store:
        store.start_run(num_lines=30)
        assert "/s, no tokens yet" in format_status(read_status(store.paths))
        clock[0] += 4.0
        store.run.tell(output_tokens=0, in_progress=30, eta_seconds=3.0, planned_seconds=None, prompt_tokens=1000)
        found = read_status(store.paths)
    assert (found.output_tokens_per_s, found.prompt_tokens_per_s) == (0.0, 250.0)
    assert "0.00 lines/s, 250.0 prompt tokens/s\n" in format_status(found)


def test_answers_that_are_done_are_no_longer_in_progress(tmp_path: Path) -> None:
    with opened(tmp_path / "out.jsonl") as store:
        store.start_run(num_lines=20)
        store.run.tell(output_tokens=50, in_progress=2, eta_seconds=None, planned_seconds=None)
        store.add(**result(30))
        store.commit()
        found = read_status(store.paths)
    assert (found.output_tokens, found.in_progress_tokens, found.eta_seconds) == (50, 20, None)


def test_what_an_earlier_run_told_is_not_this_one_s(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with opened(output) as store:
        store.start_run(num_lines=20)
        store.run.tell(output_tokens=9, in_progress=5, eta_seconds=60.0, planned_seconds=70.0)
    with opened(output) as store:
        store.start_run(num_lines=20)
        found = read_status(store.paths)
    assert (found.answering, found.in_progress, found.eta_seconds, found.planned_seconds) == (False, 0, None, None)
    assert "not answering yet" in format_status(found)


def test_a_job_of_an_earlier_version(tmp_path: Path) -> None:
    """It has no table for what runs tell: it is read without one, and the next run makes it."""
    output = tmp_path / "out.jsonl"
    with opened(output) as store:
        store.start_run(num_lines=3)
        store.add(**result(1))
        store.commit()
        store._connection.execute("DROP TABLE snapshot")
    found = read_status(paths_of(output))
    assert (found.answered, found.lines, found.planned_seconds) == (1, 3, None)
    with opened(output) as store:
        store.start_run(num_lines=3)
        store.run.tell(output_tokens=1, in_progress=1, eta_seconds=2.0, planned_seconds=None)
        assert read_status(store.paths).answering
        assert store.num_found == 1


def test_a_word_that_cannot_be_kept_stops_nothing(tmp_path: Path) -> None:
    with opened(tmp_path / "out.jsonl") as store:
        store.start_run(num_lines=3)
        store._connection.execute("DROP TABLE snapshot")
        store.run.tell(output_tokens=1, in_progress=1, eta_seconds=2.0, planned_seconds=None)
        store.add(**result(1))
        store.commit()
        assert read_status(store.paths).answered == 1


def test_a_run_that_had_nothing_to_answer_does_not_hide_the_pace_of_the_one_before(tmp_path: Path, clock: list[float]) -> None:
    """It may have found more lines, all of them bad, which it answered itself when it read them."""
    output = tmp_path / "out.jsonl"
    with opened(output) as store:
        store.start_run(num_lines=10)
        store.run.tell(output_tokens=0, in_progress=10, eta_seconds=None, planned_seconds=6.0)
        for number in range(1, 11):
            store.add(**result(number))
        clock[0] += 5.0
        store.commit()
        store.end_run("stopped by SIGTERM")
    before = read_status(paths_of(output))
    assert (before.run_seconds, before.lines_per_s, before.output_tokens_per_s, before.prompt_tokens_per_s) == (5.0, 2.0, 11.0, 4.0)
    with opened(output) as store:
        for number in range(11, 14):
            store.add(**{**result(number, failed=True), "prompt_tokens": 0, "output_tokens": 0})
        store.commit()
        store.start_run(num_lines=13)
        assert read_status(store.paths).lines_per_s == 0, "it might have something to answer yet"
        store.end_run("finished")
    after = read_status(paths_of(output))
    assert (after.ending, after.lines, after.answered, after.failed) == ("finished", 13, 10, 3)
    told = ("run_seconds", "lines_per_s", "output_tokens_per_s", "prompt_tokens_per_s", "planned_seconds", "updated")
    assert {name: getattr(after, name) for name in told} == {name: getattr(before, name) for name in told}
    assert "latest run: 5.0 s (6.0 s planned), 2.00 lines/s, 11.0 output tokens/s" in format_status(after)


def test_a_later_run_has_its_own_pace(tmp_path: Path, clock: list[float]) -> None:
    """What earlier runs did, and the tokens that they left, are not this one's speed."""
    output = tmp_path / "out.jsonl"
    for first, seconds in ((1, 100.0), (11, 5.0)):
        with opened(output) as store:
            store.start_run(num_lines=30)
            for number in range(first, first + 10):
                store.add(**result(number))
            clock[0] += seconds
            store.commit([ProgressRow(line_number=25, digest=1, choice=0, start=first, generated=Generated(token_ids=(1, 2)))])
            found = read_status(store.paths)
    assert (found.answered, found.run_seconds, found.lines_per_s) == (20, 5.0, 2.0)
    assert found.output_tokens_per_s == (sum(range(11, 21)) + 2) / 5.0
