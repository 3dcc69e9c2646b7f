"""`flexgen run`: answers a file of requests."""

from __future__ import annotations

from flexgen.cli.job import run_job
from flexgen.cli.options import engine_command, takes
from flexgen.cli.reading import Reading
from flexgen.cli.request_lines import RequestLines
from flexgen.cli.run_flags import RunFlags, check
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
    return run_job(flags, lambda: RequestLines(flags=flags, reading=reading), options)
