"""`flexgen run`: answers a file of requests."""

from __future__ import annotations

import sys

from flexgen.cli.exit_codes import complain
from flexgen.cli.job import JobCommand
from flexgen.cli.options import engine_command, takes
from flexgen.cli.reading import Reading
from flexgen.cli.run_flags import RunFlags, check
from flexgen.cli.signals import StopSignals
from flexgen.cli.terminal import showing
from flexgen.jobs.interrupt import Stopped
from flexgen.options import EngineOptions


@engine_command
@takes("flags", RunFlags)
@takes("reading", Reading)
def run(flags: RunFlags, reading: Reading, options: EngineOptions) -> int:
    """Answer a file of requests.

    A line is {"prompt": text or token ids, "id", and sampling parameters as
    in vLLM}, or an OpenAI batch line. Each answer is stored when it is done.
    If the run is interrupted, the same command goes on where it stopped.
    `flexgen status OUTPUT` shows how far the job is.
    """
    reading.check()
    check(flags)
    messages = sys.stdout if flags.dry_run else sys.stderr  # a dry run's plan is its result
    results = None if flags.output is not None else sys.stderr
    shown = "plain" if flags.dry_run and flags.progress == "none" else flags.progress
    with showing(shown, messages=messages, results=results, steps=flags.progress != "none") as display, StopSignals() as signals:
        command = JobCommand(flags=flags, reading=reading, options=options, display=display, signals=signals)
        try:
            return command.show_plan() if flags.dry_run else command.answer()
        except Stopped:
            display.close()  # because the line of the last step would remain otherwise
            return complain("stopped", signals.exit_code)
