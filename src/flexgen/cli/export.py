"""`flexgen export`: writes the answers that a job has so far."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from flexgen.base.quantities import counted
from flexgen.cli.exit_codes import ExitCode, complain
from flexgen.cli.options import check_parent, command
from flexgen.cli.streams import check_stdout
from flexgen.errors import OptionError


@command
def export(
    job: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The output of a run or map, or the folder given as its --state.")],
    order: Annotated[str, typer.Option(metavar="input|done", help="Order of the input, or order in which lines were done.")] = "input",
    to: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write here instead of OUTPUT; - is stdout, for records only."),
    ] = None,
) -> int:
    """Write the answers that are done, also while the job runs."""
    from flexgen.jobs.export import DeliveryError, export_to_stream
    from flexgen.jobs.export import export as write
    from flexgen.jobs.folder import find_job
    from flexgen.jobs.workers.collect import take_in_if_idle

    paths = find_job(job)
    take_in_if_idle(paths)
    if to == Path("-"):
        check_stdout()
        try:
            export_to_stream(paths, sys.stdout.buffer, order)
        except DeliveryError as error:
            return complain(error, ExitCode.RESUMABLE)
        return ExitCode.ALL_ANSWERED
    check_parent(to, "--to")
    target = to or paths.output
    if target is None:
        raise OptionError(f"{job} is the folder of a job: name the file to write with --to")
    count = write(paths, target, order)
    print(f"{target}: {counted(count, 'line')}", file=sys.stderr)
    return ExitCode.ALL_ANSWERED
