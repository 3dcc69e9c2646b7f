"""Tables of JSON lines: an object for each row, whose values stay as they stand."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flexgen.base.steps import counted_lines
from flexgen.base.strict_json import strict_json
from flexgen.base.text_input import READ_ERRORS, open_input
from flexgen.errors import JobError, StorageError
from flexgen.tables.arrow import Schema, inferred_schema
from flexgen.tables.batch import Batch, Row, RowBatch, Table
from flexgen.tables.columns import Column
from flexgen.tables.values import cell_of

_BATCH_ROWS = 1024
_BOM = b"\xef\xbb\xbf"


class JsonLinesTable:
    """A file with a JSON object on each line; blank lines are skipped.

    The columns are those that any row has, in the order in which they first appear, which takes a reading of the whole file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        rows = counted_lines(self._rows(), f"looking for the columns of {path}")
        self.columns = list(dict.fromkeys(name for row in rows for name in row))
        if not self.columns:
            raise JobError(f"{path} has no rows with columns: a row is a JSON object on a line")

    def _rows(self) -> Iterator[dict[str, Any]]:
        try:
            with open_input(self.path) as file:
                for number, line in enumerate(file, start=1):
                    if line.strip() and line.strip() != _BOM:
                        yield self._row(number, line)
        except READ_ERRORS as error:
            raise StorageError(f"{self.path} cannot be read: {error}") from error

    def _row(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            return strict_json(line)
        except UnicodeDecodeError as error:
            raise JobError(f"{self.path}: line {number} is not UTF-8 (0x{line[error.start]:02x} at byte {error.start:,})") from error
        except ValueError as error:
            what = f"{self.path}: line {number} is not a row, a JSON object with the names of columns and their values"
            raise JobError(f"{what}: {error}") from error

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[Batch]:
        """Yield all rows in order."""
        rows = self._rows()
        while some := list(itertools.islice(rows, _BATCH_ROWS)):
            yield RowBatch(some)

    def schema(self) -> Schema:
        """Return the types of the columns, which takes another reading of the file."""
        return inferred_schema(self.path, self.columns, (batch.rows() for batch in self.batches()))


class JsonLinesWriter:
    """Writes JSON lines; values that JSON has no form for, such as dates, are text."""

    def __init__(self, file: io.RawIOBase, table: Table, added: Sequence[Column]) -> None:
        self._file = file
        self.num_escaped = 0  # JSON has escapes of its own

    def write(self, batch: Batch, answers: Sequence[Row]) -> None:
        """Write some rows."""
        for row, answer in zip(batch.rows(), answers, strict=True):
            self._file.write(_encoded({**row, **answer}))

    def close(self) -> None:
        """Do nothing: every line is written."""


def _encoded(row: Row) -> bytes:
    text = json.dumps(row, ensure_ascii=False, default=cell_of)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write and UTF-8 cannot
        return json.dumps(row, default=cell_of).encode() + b"\n"
