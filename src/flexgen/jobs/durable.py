"""Answers requests from Python in a job that is kept in a folder, so that the same call goes on where an earlier one was interrupted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flexgen.base.scalars import as_list, plain
from flexgen.errors import FlexGenError, RequestError
from flexgen.jobs.begin import begin_job
from flexgen.jobs.export import read_records
from flexgen.jobs.folder import JobFolder, JobPaths
from flexgen.jobs.identity import Identity
from flexgen.jobs.input_file import copy_input, settle_input
from flexgen.jobs.interrupt import StopRequest
from flexgen.jobs.model import JobModel
from flexgen.jobs.runner import Job
from flexgen.jobs.store import Store
from flexgen.llm import LLM
from flexgen.plan.workload import Workload
from flexgen.report.progress import Progress
from flexgen.request import SamplingParams

_DEFAULTS = SamplingParams()


def answer_lines(
    model: LLM | JobModel,
    lines: Iterable[Mapping[str, Any]],
    folder: str | os.PathLike[str],
    *,
    defaults: SamplingParams = _DEFAULTS,
    accept_changes: bool = False,
    retry_errors: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    stop: StopRequest | None = None,
    identity: Identity | None = None,
) -> Iterator[dict[str, Any]]:
    """Answer lines, as `flexgen run` does, and return their records in the order of the lines.

    All lines are answered before this returns; the records are read from the folder as the iterator is advanced, so that memory use does
    not grow with their number.

    Args:
        model: The model: an `LLM`, or what else answers jobs.
        lines: The lines, as JSON objects: bare lines or OpenAI's batch lines (docs/requests.md).  Numbers, arrays and tensors of numpy and
            torch become numbers and lists.
        folder: The folder of the job, which is created if it does not exist, in a folder that does.  An interrupted call with the same
            lines goes on from there, and a finished one answers nothing again.
        defaults: The sampling parameters of lines that set none.
        accept_changes: Whether to go on although lines that were answered have changed, or the model or the defaults have.
        retry_errors: Whether to answer lines again that ended in an error.
        on_progress: A callback that is called with the progress of the run.
        stop: A request to stop, which another thread may make.
        identity: What `identity_of` returns for the model and the defaults, where the caller knows it already.

    Raises:
        RequestError: A line is not a JSON object; nothing has run then.
        JobError: Lines that were answered have changed, or the model or the defaults have; or another process runs the job.
        StorageError: The folder cannot be used.
        Stopped: The run was asked to stop; what was generated is kept.
        FlexGenError: The engine failed; finished lines are kept.
    """
    model = model.model if isinstance(model, LLM) else model
    with JobFolder(JobPaths(folder=Path(folder), output=None)) as kept:
        try:
            source = copy_input(kept, (_encoded(number, line) for number, line in enumerate(lines, 1)))
            with Store(kept) as store:
                begin_job(store, model, defaults, accept_changes=accept_changes, identity=identity)
                job = Job(model, source, store, defaults=defaults, stop=stop)
                job.match(accept_changes=accept_changes)
                if retry_errors:
                    store.forget_failed()
                workload = job.scan()
                if len(workload):
                    job.open(workload)
                kept.keep()
                job.source = settle_input(kept, source)
                _answer(job, store, workload, on_progress)
        except BaseException:
            kept.undo()  # which does nothing once the run has begun
            raise
        return read_records(kept.paths)


def _answer(job: Job, store: Store, workload: Workload, on_progress: Callable[[Progress], None] | None) -> None:
    """Answer the lines that are left, and record how the run ended."""
    store.start_run(job.num_lines)
    ending = "stopped"
    try:
        job.answer(workload, on_progress=on_progress)
        ending = "finished"
    except FlexGenError as error:
        ending = str(error)
        raise
    finally:
        store.end_run(ending)


def _encoded(number: int, line: object) -> bytes:
    """Return a line as it stands in a file of requests.

    Raises:
        RequestError: It is not a JSON object.
    """
    if not isinstance(line, Mapping):
        raise RequestError(f"line {number} must be a JSON object, such as {{'prompt': 'text'}}, not of type {type(line).__name__}")
    try:
        return json.dumps(dict(line), allow_nan=False, default=_plain).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"line {number} is not a JSON object: {error}") from error


def _plain(value: object) -> Any:
    """Return a value that JSON does not have as one that it has: a number, or a list.

    Raises:
        TypeError: It is neither.
    """
    number = plain(value)
    if number is not value:
        return number
    if isinstance(value, Mapping):
        return dict(value)
    listed = as_list(value)
    if listed is None:
        raise TypeError(f"a value of type {type(value).__name__} is neither a text, a number, a list nor an object")
    return listed
