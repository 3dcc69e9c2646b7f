"""What the workers of a job answer, and how: written by the run before workers can find it, and never changed."""

from __future__ import annotations

import dataclasses
import os
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen.base.failpoints import failpoint
from flexgen.base.text_input import READ_ERRORS, open_input
from flexgen.errors import JobError, StorageError
from flexgen.jobs.identity import Identity
from flexgen.jobs.lines import Line, read_lines
from flexgen.jobs.workers.leases import ATTEMPTS
from flexgen.jobs.workers.members import LEASE_SECONDS
from flexgen.jobs.workers.place import SharedFolder, read_json, replace_json, translated
from flexgen.options import EngineOptions
from flexgen.request import SamplingParams

_FORMAT = 1  # of the folder; workers of another version may not understand it


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedTask:
    """What workers have to know.

    Attributes:
        name: The name of the job in messages.
        model: The name of the model, a path of this host or a hub id.
        source: The path of the input.
        options: The options of the engine, as the run has them.
        keywords: The keywords of `LLM` that are not options of the engine.
        defaults: The sampling parameters of lines that set none.
        input_format: The format of the input, see `Forms`.
        output_form: What says which answers are errors of their lines, see `Store.keep_output_form`; None where every answer counts.
        identity: The identity of the job, which every worker must share.
        created: The time written into answers.
        model_name: The name of the model that is written into answers.
        num_workers: The number of workers that the run expects, at least 1; plans are for so great a part of the job.
        checkpoint_seconds: The least time between two checkpoints.
        lease_seconds: The silence after which a worker counts as dead.
        attempts: The number of workers after whose deaths a line ends in an error.
        reports: Whether workers leave reports of their engines.
    """

    name: str
    model: str
    source: str
    options: EngineOptions
    keywords: Mapping[str, Any]
    defaults: SamplingParams
    input_format: str
    output_form: str | None
    identity: Identity
    created: int
    model_name: str
    num_workers: int = 1
    checkpoint_seconds: float = 30.0
    lease_seconds: float = LEASE_SECONDS
    attempts: int = ATTEMPTS
    reports: bool = False

    def write(self, folder: SharedFolder) -> None:
        """Write the task.

        Raises:
            StorageError: It cannot be written.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        given = {
            "options": dataclasses.asdict(self.options), "defaults": dataclasses.asdict(self.defaults), "identity": self.identity.to_json(),
        }  # fmt: skip
        with translated(folder.task):
            replace_json(folder.task, {**fields, **given, "format": _FORMAT}, durable=True)

    @classmethod
    def read(cls, folder: SharedFolder) -> SharedTask:
        """Read the task.

        Raises:
            StorageError: It cannot be read.
            JobError: It was written by another version of flexgen.
        """
        with translated(folder.task):
            fields = read_json(folder.task)
        if fields.pop("format", None) != _FORMAT:
            raise JobError(f"{folder.path} was written by another version of flexgen")
        try:
            return cls(**{
                **fields, "options": EngineOptions(**fields["options"]), "defaults": SamplingParams(**fields["defaults"]),
                "identity": Identity.from_json(fields["identity"]),
            })  # fmt: skip
        except (TypeError, KeyError, ValueError) as error:
            raise JobError(f"{folder.path} was written by another version of flexgen: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLines:
    """The lines that a run has left for its workers, in the order of the input.

    Attributes:
        numbers: Their numbers.
        digests: Their digests.
    """

    numbers: Sequence[int]
    digests: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def index_of(self, line_number: int) -> int | None:
        """Return the index of a line among them; None if it is not there."""
        index = bisect_left(self.numbers, line_number)
        return index if index < len(self) and self.numbers[index] == line_number else None

    def write(self, folder: SharedFolder) -> None:
        """Write them.

        Raises:
            StorageError: They cannot be written.
        """
        with translated(folder.lines), folder.lines.open("wb") as file:
            for values in (self.numbers, self.digests):
                array("Q", values).tofile(file)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: SharedFolder) -> OpenLines:
        """Read them.

        Raises:
            StorageError: They cannot be read.
        """
        values = array("Q")
        with translated(folder.lines):
            values.frombytes(folder.lines.read_bytes())
        half = len(values) // 2
        return cls(numbers=values[:half], digests=values[half:])


class LineReader:
    """Reads open lines from the input by their indices, in one sweep as long as these ascend.

    Args:
        source: The input.
        lines: The open lines.
    """

    def __init__(self, source: Path, lines: OpenLines) -> None:
        self._source, self._lines = source, lines
        self._sweep: Iterator[tuple[int, Line]] = iter(())
        self._next = len(lines)  # the index of the line that the sweep meets next; no sweep has begun yet

    def read(self, indices: Sequence[int]) -> Iterator[Line]:
        """Yield lines.

        Args:
            indices: Their indices, in ascending order.

        Raises:
            StorageError: The input cannot be read, or has changed.
        """
        for index in indices:
            if index < self._next:
                self._sweep = self._begin()
            for found, line in self._sweep:
                self._next = found + 1
                if found == index:
                    yield line
                    break
            else:
                raise StorageError(f"{self._source} changed while it was being answered")

    def _begin(self) -> Iterator[tuple[int, Line]]:
        """Yield the index of every open line, and the line."""
        index = 0
        try:
            with open_input(self._source) as file:
                for line in read_lines(file):
                    if index == len(self._lines):
                        return
                    if line.number == self._lines.numbers[index]:
                        failpoint("input.read")
                        if line.digest != self._lines.digests[index]:
                            raise StorageError(f"{self._source} changed while it was being answered")
                        yield index, line
                        index += 1
        except READ_ERRORS as error:
            raise StorageError(f"{self._source} cannot be read: {error}") from error
