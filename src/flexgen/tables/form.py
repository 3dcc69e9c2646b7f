"""The form of a job's output that is a table: the table that was read, what was asked of its rows, and the format to write.

A job keeps it beside its answers, so that the table can be made at any time.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from flexgen.base.from_json import dataclass_from_json, parsed_json
from flexgen.errors import OptionError, StorageError
from flexgen.tables.batch import Table
from flexgen.tables.formats import format_of, open_table
from flexgen.tables.task import Task

_WHAT = "the form of the job's output"


@dataclass(frozen=True, slots=True, kw_only=True)
class TableForm:
    """A table whose rows are the lines of a job.

    Attributes:
        source: The path of the table.
        format: The name of its format.
        size_bytes: The size of its file when it was read.
        changed_ns: The time at which the file had changed last by then, in nanoseconds since 1970.
        output_format: The format of the output; None for the one that its name stands for.
        task: What is asked of each row.
    """

    source: str
    format: str
    size_bytes: int
    changed_ns: int
    output_format: str | None
    task: Task

    @classmethod
    def of(cls, table: Table, form: str, output_format: str | None, task: Task) -> TableForm:
        """Return the form for a table that is open now."""
        found = table.path.stat()
        return cls(
            source=str(table.path.absolute()), format=form, size_bytes=found.st_size, changed_ns=found.st_mtime_ns,
            output_format=output_format, task=task,
        )  # fmt: skip

    def to_json(self) -> str:
        """Return the form as the text of a JSON object."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps({**fields, "task": self.task.to_json()})

    @classmethod
    def from_json(cls, text: str) -> TableForm:
        """Return the form that `to_json` has written."""
        return dataclass_from_json(cls, parsed_json(text, _WHAT), _WHAT)

    def open(self) -> Table:
        """Open the table.

        Raises:
            StorageError: It is gone, or it is not the file that was read.
        """
        path = Path(self.source)
        try:
            found = path.stat()
        except OSError as error:
            raise StorageError(
                f"the table {path} cannot be read ({error.strerror or error}), and the answers belong to its rows"
            ) from error
        if (found.st_size, found.st_mtime_ns) != (self.size_bytes, self.changed_ns):
            raise StorageError(f"the table {path} changed since the job read it, and the answers belong to its rows: run the job again")
        return open_table(path, self.format)

    def format_for(self, target: Path) -> str:
        """Return the format in which to write a file."""
        if self.output_format is not None:
            return self.output_format
        try:
            return format_of(target, "the output")
        except OptionError:
            return self.format  # `flexgen export --to NAME` takes any name
