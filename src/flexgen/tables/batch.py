"""Rows of a table, a few at a time, and the interfaces of what reads and writes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from flexgen.tables.arrow import RecordBatch, Schema, record_batch
from flexgen.tables.columns import Column, flat

Row = Mapping[str, Any]


class Batch(Protocol):
    """Some consecutive rows of a table."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def rows(self) -> Sequence[Row]:
        """Return the rows as values of Python; a row may lack columns."""
        ...

    def arrow(self, schema: Schema) -> RecordBatch:
        """Return the rows as a record batch of that schema.

        Raises:
            JobError: They cannot be written so.
        """
        ...


class Table(Protocol):
    """A table in a file, which is read several times.

    Attributes:
        path: The file.
        columns: The names of the columns, in order.

    Raises:
        JobError: The file is not such a table.
    """

    path: Path
    columns: Sequence[str]

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[Batch]:
        """Yield all rows in order.

        Args:
            columns: The columns that are needed; None for all of them.

        Raises:
            JobError: The file is damaged; the message says where.
        """
        ...

    def schema(self) -> Schema:
        """Return the types of the columns, for Parquet.

        Raises:
            JobError: The columns have no types that Parquet can hold.
        """
        ...


class TableWriter(Protocol):
    """Writes rows with their answers into an open file.

    Attributes:
        num_escaped: The number of rows with text that the format cannot hold, half of a surrogate pair, which is written as an escape such
            as \\ud800.
    """

    num_escaped: int

    def write(self, batch: Batch, answers: Sequence[Row]) -> None:
        """Write some rows; `answers` has the values of the new columns for each."""
        ...

    def close(self) -> None:
        """Write what is left.  The file stays open."""
        ...


class RowBatch:
    """Rows that are values of Python already."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self) -> Sequence[Row]:
        """Return the rows."""
        return self._rows

    def arrow(self, schema: Schema) -> RecordBatch:
        """Return the rows as a record batch."""
        return record_batch(self._rows, schema)


def merged(row: Row, columns: Sequence[Column], answers: Row) -> dict[str, Any]:
    """Return a row with its answers, flat values only."""
    return {**row, **{column.name: flat(column, answers[column.name]) for column in columns}}
