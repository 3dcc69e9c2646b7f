"""Tables in Parquet files.  Columns are copied as Arrow has them, so that their types and metadata stay."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flexgen.errors import JobError
from flexgen.tables.arrow import Array, RecordBatch, Schema, answers_of, pyarrow, with_columns
from flexgen.tables.batch import Batch, Row, RowBatch, Table
from flexgen.tables.columns import Column
from flexgen.tables.values import escaped

_BATCH_ROWS = 8192  # also the rows of a row group of the output


class ParquetTable:
    """A Parquet file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._schema = self._opened().schema_arrow
        self.columns = list(self._schema.names)

    def _opened(self) -> Any:
        arrow, parquet = pyarrow(), pyarrow("pyarrow.parquet")
        try:
            return parquet.ParquetFile(self.path)
        except (arrow.ArrowException, OSError) as error:
            raise JobError(f"{self.path} cannot be read as a Parquet file: {error}") from error

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[Batch]:
        """Yield all rows in order."""
        arrow = pyarrow()
        few = columns if columns is not None and not any("." in name for name in self.columns) else None  # a dot is a path to pyarrow
        with self._opened() as file:
            try:
                for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=few):
                    yield ArrowBatch(batch, self.path)
            except (arrow.ArrowException, OSError) as error:
                raise JobError(f"{self.path} is damaged: {error}") from error

    def schema(self) -> Schema:
        """Return the types of the columns."""
        return self._schema


class ArrowBatch:
    """Rows of a record batch."""

    def __init__(self, batch: RecordBatch, path: Path) -> None:
        self._batch, self._path = batch, path
        self._rows: list[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return self._batch.num_rows

    def rows(self) -> Sequence[Row]:
        """Return the rows as values of Python; times lose what is below a microsecond, which Python cannot hold.

        Raises:
            JobError: A value is none that Python can hold, such as a date after the year 9999, or a text that is not UTF-8.
        """
        if self._rows is None:
            columns = {name: self._values(name, column) for name, column in zip(self._batch.schema.names, self._batch.columns, strict=True)}
            names = list(columns)
            self._rows = [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return self._rows

    def _values(self, name: str, column: Array) -> list[Any]:
        try:
            return _in_python(column)
        except (pyarrow().ArrowException, ValueError, OverflowError) as error:
            raise JobError(f"{self._path}: the column {name!r} has a value that cannot be read: {error}") from error

    def arrow(self, schema: Schema) -> RecordBatch:
        """Return the record batch itself."""
        return self._batch


def _in_python(column: Array) -> list[Any]:
    arrow = pyarrow()
    if arrow.types.is_timestamp(column.type) and column.type.unit == "ns":
        column = column.cast(arrow.timestamp("us", tz=column.type.tz), safe=False)
    elif arrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.to_pylist()


class ParquetWriter:
    """Writes a Parquet file, a row group for each batch that comes."""

    def __init__(self, file: io.RawIOBase, table: Table, added: Sequence[Column]) -> None:
        self._own, self._added = table.schema(), added
        self._schema = with_columns(self._own, added)
        self._writer = pyarrow("pyarrow.parquet").ParquetWriter(file, self._schema)
        self._waiting: list[RecordBatch] = []
        self._num_waiting = self.num_escaped = 0

    def write(self, batch: Batch, answers: Sequence[Row]) -> None:
        """Write some rows."""
        try:
            own = batch.arrow(self._own)
        except UnicodeEncodeError:
            rows = [escaped(row) for row in batch.rows()]
            self.num_escaped += sum(row != given for row, given in zip(rows, batch.rows(), strict=True))
            own = RowBatch(rows).arrow(self._own)
        added = [answers_of(column, (answer[column.name] for answer in answers)) for column in self._added]
        self._waiting.append(pyarrow().RecordBatch.from_arrays([*own.columns, *added], schema=self._schema))
        self._num_waiting += len(batch)
        if self._num_waiting >= _BATCH_ROWS:
            self._write_waiting()

    def _write_waiting(self) -> None:
        if self._waiting:
            self._writer.write_table(pyarrow().Table.from_batches(self._waiting, schema=self._schema))
        self._waiting, self._num_waiting = [], 0

    def close(self) -> None:
        """Write what is left, and the end of the file."""
        self._write_waiting()
        self._writer.close()
