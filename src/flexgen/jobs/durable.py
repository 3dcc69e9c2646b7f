"""Answers requests from Python in a job that is kept in a folder, so that the same call goes on where an earlier one was interrupted."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flexgen.errors import FlexGenError
from flexgen.jobs.export import read_records
from flexgen.jobs.folder import JobFolder, JobPaths
from flexgen.jobs.identity import identity_of
from flexgen.jobs.input_file import keep_input, settle_input
from flexgen.jobs.interrupt import StopRequest
from flexgen.jobs.model import JobModel
from flexgen.jobs.runner import Job
from flexgen.jobs.store import Store
from flexgen.report.progress import Progress
from flexgen.request import SamplingParams

_DEFAULTS = SamplingParams()


def answer_lines(
    model: JobModel,
    lines: Iterable[Mapping[str, Any]],
    folder: Path,
    *,
    defaults: SamplingParams = _DEFAULTS,
    accept_changes: bool = False,
    retry_errors: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    stop: StopRequest | None = None,
) -> Iterator[dict[str, Any]]:
    """Answer lines, as `flexgen run` does, and return their records in the order of the lines.

    All lines are answered before this returns; the records are read from the folder as the iterator is advanced, so that memory use does
    not grow with their number.

    Args:
        model: The model, such as an `LLM`.
        lines: The lines, as JSON objects: bare lines or OpenAI's batch lines (docs/jobs.md).
        folder: The folder of the job, which is created if it does not exist, in a folder that does.  An interrupted call with the same
            lines goes on from there, and a finished one answers nothing again.
        defaults: The sampling parameters of lines that set none.
        accept_changes: Whether to go on although lines that were answered have changed, or the model or the defaults have.
        retry_errors: Whether lines that ended in an error in an earlier call are answered again.
        on_progress: A callback that is called with the progress of the run.
        stop: A request to stop, which another thread may make.

    Raises:
        JobError: Lines that were answered have changed, or the model or the defaults have; or another process runs the job.
        StorageError: The folder cannot be used.
        Stopped: The run was asked to stop; what was generated is kept.
        FlexGenError: The engine failed; finished lines are kept.
    """
    with JobFolder(JobPaths(folder=folder, output=None)) as kept:
        try:
            source = keep_input(kept, io.BufferedReader(_Lines(lines)))
            with Store(kept) as store:
                store.begin(identity_of(model, defaults), model.name, accept_changes=accept_changes)
                job = Job(model, source, store, defaults=defaults, stop=stop)
                job.match(accept_changes=accept_changes)
                if retry_errors:
                    store.forget_failed()
                workload = job.scan()
                if len(workload):
                    job.open(workload)
                kept.keep()
                job.source = settle_input(kept, source)
                store.start_run(job.num_lines)
                job.answer(workload, on_progress=on_progress)
                store.end_run("finished")
        except FlexGenError:
            kept.undo()
            raise
        return read_records(kept.paths)


class _Lines(io.RawIOBase):
    """A readable stream of JSON objects, one per line."""

    def __init__(self, lines: Iterable[Mapping[str, Any]]) -> None:
        self._lines = iter(lines)
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest and (line := next(self._lines, None)) is not None:
            self._rest = json.dumps(line, allow_nan=False).encode() + b"\n"
        piece, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(piece)] = piece
        return len(piece)
