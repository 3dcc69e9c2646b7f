"""Tables of comma- or tab-separated values.  Their cells are text, and stay as they stand."""

from __future__ import annotations

import csv
import io
import itertools
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexgen.base.quantities import counted
from flexgen.base.text_input import READ_ERRORS, open_input
from flexgen.errors import JobError, StorageError
from flexgen.tables.arrow import Schema, text_schema
from flexgen.tables.batch import Batch, Row, RowBatch, Table, merged
from flexgen.tables.columns import Column
from flexgen.tables.values import cell_of, escaped

_BATCH_ROWS = 1024
_MAX_CELL_CHARS = 64 << 20  # the module's own limit is 128 Ki, less than a long document
_OTHER_DELIMITERS = (";", "\t")  # of a file called .csv whose header has no comma


class CsvTable:
    """A file of comma-separated values with a header; blank lines are skipped.

    Args:
        path: The file: UTF-8 or UTF-16, plain or compressed by gzip.
        delimiter: What separates cells; None for a comma, or what a header without commas has in its place.
    """

    def __init__(self, path: Path, delimiter: str | None = None) -> None:
        self.path = path
        self.delimiter = delimiter or ","
        if delimiter is None and "," not in (header := self._header_line()):
            self.delimiter = next((each for each in _OTHER_DELIMITERS if each in header), ",")
        with self._reader() as reader:
            self.columns = next(reader, [])
        if not self.columns:
            raise JobError(f"{path} is empty: a table begins with the names of its columns")

    def _header_line(self) -> str:
        with self._opened() as file:
            return file.readline()

    @contextmanager
    def _opened(self) -> Iterator[io.TextIOWrapper]:
        try:
            with open_input(self.path) as file:
                yield io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        except UnicodeDecodeError as error:
            hint = f"iconv -f WINDOWS-1252 -t UTF-8 {shlex.quote(str(self.path))} converts it if it is in Windows-1252 or Latin-1"
            raise JobError(f"{self.path} is not UTF-8 (0x{error.object[error.start]:02x}); {hint}") from error
        except READ_ERRORS as error:
            raise StorageError(f"{self.path} cannot be read: {error}") from error

    @contextmanager
    def _reader(self) -> Iterator[Any]:
        csv.field_size_limit(_MAX_CELL_CHARS)
        with self._opened() as file:
            reader = csv.reader(file, delimiter=self.delimiter, strict=True)
            try:
                yield (cells for cells in reader if cells)
            except csv.Error as error:
                raise JobError(f"{self.path}: line {reader.line_num}: {error}") from error

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[Batch]:
        """Yield all rows in order.  A row with fewer cells than the header lacks the last columns."""
        with self._reader() as reader:
            next(reader, None)
            numbered = enumerate(reader, start=1)
            while some := list(itertools.islice(numbered, _BATCH_ROWS)):
                yield RowBatch([self._row(number, cells) for number, cells in some])

    def _row(self, number: int, cells: list[str]) -> Row:
        if len(cells) > len(self.columns):
            there = f"row {number}, which begins {cells[0][:40]!r}, has {len(cells)} cells"
            columns = counted(len(self.columns), "column")
            raise JobError(f"{self.path}: {there}, and the header has {columns}: a cell with {self.delimiter!r} in it needs quotes")
        return dict(zip(self.columns, cells, strict=False))

    def schema(self) -> Schema:
        """Return the types of the columns: text."""
        return text_schema(self.columns)


class CsvWriter:
    """Writes comma-separated values, with quotes where they are needed; None is an empty cell."""

    def __init__(self, file: io.RawIOBase, table: Table, added: Sequence[Column], delimiter: str | None = None) -> None:
        self._text = io.TextIOWrapper(io.BufferedWriter(file), encoding="utf-8", newline="")
        self._added = added
        self.num_escaped = 0
        self._columns = [*table.columns, *(column.name for column in added)]
        delimiter = delimiter or (table.delimiter if isinstance(table, CsvTable) and table.delimiter != "\t" else ",")
        self._writer = csv.writer(self._text, delimiter=delimiter, lineterminator="\n")
        self._writer.writerow(self._columns)

    def write(self, batch: Batch, answers: Sequence[Row]) -> None:
        """Write some rows."""
        for row, answer in zip(batch.rows(), answers, strict=True):
            whole = merged(row, self._added, answer)
            cells = [cell_of(whole.get(name)) for name in self._columns]
            try:
                self._writer.writerow(cells)
            except UnicodeEncodeError:  # nothing of the row is written then
                self._writer.writerow([escaped(cell) for cell in cells])
                self.num_escaped += 1

    def close(self) -> None:
        """Write what is left."""
        self._text.flush()
        self._text.detach().detach()
