"""`flexgen status`: shows the progress of a job, also from another terminal."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexgen.base.quantities import counted
from flexgen.cli.exit_codes import ExitCode
from flexgen.cli.options import command
from flexgen.cli.spelling import in_flags

if TYPE_CHECKING:
    from flexgen.jobs.status import JobStatus
    from flexgen.jobs.workers.status import WorkerStatus


@command
def status(
    job: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The output of a run or map, or the folder given as its --state.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object (docs/jobs.md).")] = False,
) -> int:
    """Show how far a job is, whether it runs or not."""
    from flexgen.jobs.folder import find_job
    from flexgen.jobs.status import read_status

    found = read_status(find_job(job))
    print(json.dumps(dataclasses.asdict(found), indent=2) if as_json else format_status(found))
    return ExitCode.ALL_ANSWERED


def format_status(status: JobStatus) -> str:
    """Return the progress of a job as a few lines of text."""
    done = status.answered + status.failed
    total = "? lines" if status.lines is None else counted(status.lines, "line")
    in_progress = f"{status.in_progress:,} in progress"
    if status.in_progress_tokens:
        in_progress += f" with {counted(status.in_progress_tokens, 'token')}"
    return (
        f"{status.name}: {_process(status)}\n"
        f"  {done:,} of {total} done ({status.failed:,} with errors), {in_progress}; "
        f"{status.prompt_tokens:,} prompt and {counted(status.output_tokens, 'output token')}\n"
        f"  latest run: {_times(status)}, {status.lines_per_s:,.2f} lines/s, {_tokens_per_s(status)}{_eta(status)}"
    ) + "".join(f"\n  {_worker(each)}" for each in status.workers)


def _worker(worker: WorkerStatus) -> str:
    leases = f", leases {', '.join(worker.leases)}" if worker.leases else ""
    reason = f" ({in_flags(worker.reason)})" if worker.reason else ""
    return (
        f"worker {worker.process} on {worker.host}: {worker.state}{reason}; {counted(worker.lines, 'line')} stored, "
        f"{worker.in_progress:,} in progress, {counted(worker.output_tokens, 'output token')}{leases}"
    )


def _tokens_per_s(status: JobStatus) -> str:
    """Return the pace of the latest run in tokens: those of prompts where it has generated none, as in a job that only scores."""
    if status.output_tokens_per_s:
        return f"{status.output_tokens_per_s:,.1f} output tokens/s"
    return f"{status.prompt_tokens_per_s:,.1f} prompt tokens/s" if status.prompt_tokens_per_s else "no tokens yet"


def _process(status: JobStatus) -> str:
    if status.process is None:
        return f"not running ({in_flags(status.ending or 'killed')})"
    return f"process {status.process}" + ("" if status.answering else ", which is not answering yet")


def _times(status: JobStatus) -> str:
    from flexgen.base.quantities import format_seconds

    planned = "" if status.planned_seconds is None else f" ({format_seconds(status.planned_seconds)} planned)"
    return format_seconds(status.run_seconds) + planned


def _eta(status: JobStatus) -> str:
    from flexgen.base.quantities import format_seconds

    if status.eta_seconds is None or status.eta_age_seconds is None:
        return ""
    return f"\n  ETA {format_seconds(status.eta_seconds)}, as the run itself estimated {format_seconds(status.eta_age_seconds)} ago"
