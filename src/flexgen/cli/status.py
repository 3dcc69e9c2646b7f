"""`flexgen status`: how far a job is, from another terminal."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexgen.cli.exit_codes import ExitCode
from flexgen.cli.options import command

if TYPE_CHECKING:
    from flexgen.jobs.status import JobStatus


@command
def status(
    job: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The output of a `flexgen run`, or the folder given as its --state.")],
    as_json: Annotated[bool, typer.Option("--json", help="As a JSON object (docs/jobs.md).")] = False,
) -> int:
    """Show how far a job is, whether it runs or not."""
    from flexgen.jobs.folder import find_job
    from flexgen.jobs.status import read_status

    found = read_status(find_job(job))
    print(json.dumps(dataclasses.asdict(found), indent=2) if as_json else format_status(found))
    return ExitCode.ALL_ANSWERED


def format_status(status: JobStatus) -> str:
    """Three lines."""
    from flexgen.durations import format_seconds

    running = f"process {status.process}" if status.process is not None else f"not running ({status.ending or 'killed'})"
    done = status.answered + status.failed
    total = "?" if status.lines is None else f"{status.lines:,}"
    return (
        f"{status.name}: {running}\n"
        f"  {done:,} of {total} lines done ({status.failed:,} with errors), {status.in_progress:,} in progress; "
        f"{status.prompt_tokens:,} prompt and {status.output_tokens:,} output tokens\n"
        f"  latest run: {format_seconds(status.run_seconds)}, {status.lines_per_s:,.2f} lines/s, "
        f"{status.output_tokens_per_s:,.1f} output tokens/s, ETA {format_seconds(status.eta_seconds)}"
    )
