"""How far a job is, seen from outside: read from its database, also while another process runs it."""

from __future__ import annotations

import dataclasses
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass

from flexgen.jobs import snapshot
from flexgen.jobs.database import connect, translated
from flexgen.jobs.folder import JobPaths, running_process
from flexgen.jobs.snapshot import Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """A snapshot of a job; figures about its latest run are as of the run's last word.

    Attributes:
        process: id of the process that runs it now, None if none does. answering: whether that process has begun to answer.
        ending: how the latest run ended; None while it runs, and where it was killed.
        lines: that are not blank; None before the first scan of the input.
        in_progress: answers being generated; where no process does, lines that have tokens and no result.
        in_progress_tokens: generated for those. output_tokens: by all runs, those of lines in progress included.
        run_seconds: how long the latest run has been answering. planned_seconds: what its plan had expected, if that is known.
        updated: the run's last word, seconds since 1970.
        output_tokens_per_s, lines_per_s: of the latest run.
        eta_seconds: from now on, by the run's own estimate; None where there is none. eta_age_seconds: how old that is.
    """

    name: str
    process: int | None
    answering: bool
    ending: str | None
    lines: int | None
    answered: int
    failed: int
    in_progress: int
    in_progress_tokens: int
    prompt_tokens: int
    output_tokens: int
    run_seconds: float
    planned_seconds: float | None
    updated: float | None
    output_tokens_per_s: float
    lines_per_s: float
    eta_seconds: float | None
    eta_age_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """A row of the table `runs`."""

    id: int = 0
    seconds: float = 0.0
    lines: int | None = None
    lines_before: int = 0
    tokens_before: int = 0
    tokens: int = 0
    updated: float | None = None
    ending: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Results:
    """What is durable.

    Attributes:
        begun, begun_tokens: lines without a result that have tokens, and these.
    """

    done: int
    failed: int
    prompt_tokens: int
    output_tokens: int
    begun: int
    begun_tokens: int


def read_status(paths: JobPaths) -> JobStatus:
    """How far the job is.

    Raises:
        StorageError: its state cannot be read.
    """
    with closing(connect(paths.database)) as connection, translated(paths.database):
        connection.execute("BEGIN")  # one snapshot
        run, results, told = _latest_run(connection), _results(connection), snapshot.read(connection)
    process = running_process(paths)
    if told is not None and told.run != run.id:
        told = None
    if told is not None and told.updated >= (run.updated or 0.0):
        run = dataclasses.replace(run, seconds=told.run_seconds, tokens=told.output_tokens, updated=told.updated)
    is_live = told is not None and process is not None and told.process == process and run.ending is None
    return _status(paths.name, process, run, results, told, is_live=is_live)


def _status(name: str, process: int | None, run: _Run, results: _Results, told: Snapshot | None, *, is_live: bool) -> JobStatus:
    live = told if is_live else None
    in_progress, tokens = results.begun, results.begun_tokens
    if live is not None:  # more than what is durable
        in_progress, tokens = live.in_progress, max(live.output_tokens - results.output_tokens, 0)
    age = None if live is None or live.eta_seconds is None else max(time.time() - live.updated, 0.0)
    return JobStatus(
        name=name,
        process=process,
        answering=live is not None,
        ending=run.ending,
        lines=run.lines,
        answered=results.done - results.failed,
        failed=results.failed,
        in_progress=in_progress,
        in_progress_tokens=tokens,
        prompt_tokens=results.prompt_tokens,
        output_tokens=results.output_tokens + tokens,
        run_seconds=run.seconds,
        planned_seconds=None if told is None else told.planned_seconds,
        updated=run.updated,
        output_tokens_per_s=(run.tokens - run.tokens_before) / run.seconds if run.seconds > 0 else 0.0,
        lines_per_s=(results.done - run.lines_before) / run.seconds if run.seconds > 0 else 0.0,
        eta_seconds=None if live is None or live.eta_seconds is None or age is None else max(live.eta_seconds - age, 0.0),
        eta_age_seconds=age,
    )


def _results(connection: sqlite3.Connection) -> _Results:
    query = "SELECT count(*), total(failed), total(prompt_tokens), total(output_tokens) FROM results"
    done, failed, prompt_tokens, output_tokens = map(int, connection.execute(query).fetchone())
    begun, begun_tokens = map(int, connection.execute("SELECT count(DISTINCT line), total(tokens) FROM begun").fetchone())
    return _Results(
        done=done, failed=failed, prompt_tokens=prompt_tokens, output_tokens=output_tokens, begun=begun, begun_tokens=begun_tokens
    )


def _latest_run(connection: sqlite3.Connection) -> _Run:
    names = [field.name for field in dataclasses.fields(_Run)]
    row = connection.execute(f"SELECT {', '.join(names)} FROM runs ORDER BY id DESC LIMIT 1").fetchone()
    return _Run(**dict(zip(names, row, strict=True))) if row is not None else _Run()
