"""Answers the lines of an evaluation in durable jobs, one folder for each set of lines.  Knows lines and records, not what they mean."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen.base.quantities import counted
from flexgen.errors import OptionError, RequestError, StorageError
from flexgen.jobs.durable import answer_lines
from flexgen.jobs.identity import identity_of
from flexgen.jobs.interrupt import StopRequest
from flexgen.llm import LLM
from flexgen.options import EngineOptions
from flexgen.report.progress import Progress

Line = Mapping[str, Any]
Record = dict[str, Any]


def check_formats(options: EngineOptions) -> None:
    """Refuse formats of weights and KV that are to be chosen by speed: a result has to be that of formats that are known beforehand.

    Raises:
        OptionError: They are.
    """
    if options.allow_formats is not None:
        raise OptionError(
            f"allow_formats={options.allow_formats!r} would evaluate what is fast on this machine: name weight_format and kv_format"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """A model, and the place where the answers to its lines are kept.

    Attributes:
        llm: The model.
        state: The folder of the jobs, which is created if it does not exist, in a folder that does.  The same lines for the same model
            are found there by a later call, and only those that are missing are answered.  None for a temporary folder.
        on_progress: A callback that is called with the progress of each job.
        stop: A request to stop, which another thread or a signal may make.

    Raises:
        OptionError: See `check_formats`.
    """

    llm: LLM
    state: Path | None = None
    on_progress: Callable[[Progress], None] | None = None
    stop: StopRequest | None = None

    def __post_init__(self) -> None:
        check_formats(self.llm.options)

    def of(self, kind: str, lines: Sequence[Line]) -> list[Record]:
        """Return the records of lines, in their order.

        Args:
            kind: A word for the name of the job's folder.
            lines: The lines.

        Raises:
            RequestError: Lines ended in an error.  The answers to the others are kept, and the same call tries the failed ones again.
            StorageError: The folder cannot be used.
            Stopped: The run was asked to stop; what was done is kept.
            FlexGenError: The engine failed; what was done is kept.
        """
        if not lines:
            return []
        defaults = self.llm.get_default_sampling_params()
        identity = identity_of(self.llm.model, defaults)
        with self._folder() as folder:
            job = folder / f"{kind}-{_digest([dict(identity.answers), *lines])}"
            answered = answer_lines(
                self.llm, lines, job, defaults=defaults, retry_errors=True, on_progress=self.on_progress, stop=self.stop,
                identity=identity,
            )  # fmt: skip
            records = list(answered)
        _check(kind, records)
        return records

    def with_progress(self, on_progress: Callable[[Progress], None]) -> Answers:
        """Return the same with another callback."""
        return dataclasses.replace(self, on_progress=on_progress)

    @contextlib.contextmanager
    def _folder(self) -> Iterator[Path]:
        try:
            if self.state is None:
                with tempfile.TemporaryDirectory(prefix="flexgen-eval-") as folder:
                    yield Path(folder)
                return
            self.state.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{self.state or 'a temporary folder'} cannot be used for the state: {error.strerror or error}") from error
        yield self.state


def _digest(values: Iterable[Any]) -> str:
    hasher = hashlib.blake2b(digest_size=8)
    for value in values:
        hasher.update(json.dumps(value, sort_keys=True).encode() + b"\n")
    return hasher.hexdigest()


def _check(kind: str, records: Sequence[Record]) -> None:
    failed = [record for record in records if "error" in record]
    if failed:
        error = failed[0]["error"]
        raise RequestError(
            f"{len(failed):,} of {counted(len(records), 'line')} of {kind} ended in an error, the first of them line {failed[0]['index']}: "
            f"{error['message']}",
            code=error["code"],
        )
