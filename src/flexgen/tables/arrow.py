"""What tables share that go through Arrow: types of columns, and record batches of rows.  The only place that imports pyarrow."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from flexgen.errors import JobError, OptionError
from flexgen.tables.columns import Column, Kind, flat
from flexgen.tables.values import escaped

# Classes of pyarrow, which is an extra: types are checked without it.
Schema = Any
RecordBatch = Any
Array = Any
DataType = Any

_TYPES = {Kind.TEXT: "string", Kind.INTEGER: "int64", Kind.NUMBER: "float64", Kind.BOOLEAN: "bool_", Kind.JSON: "string"}


def pyarrow(module: str = "pyarrow") -> ModuleType:
    """Import pyarrow, or one of its modules.

    Raises:
        OptionError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise OptionError(f"Parquet needs pyarrow, which is not installed ({error}): pip install 'flexgen-engine[tables]'") from error


def text_schema(columns: Iterable[str]) -> Schema:
    """Return the schema of a table whose cells are all text."""
    arrow = pyarrow()
    return arrow.schema([(name, arrow.string()) for name in columns])


def inferred_schema(path: Path, columns: Sequence[str], batches: Iterable[Sequence[Mapping[str, Any]]]) -> Schema:
    """Return the schema that holds all rows of a file of JSON lines.

    Raises:
        JobError: A column has values of different types.
    """
    arrow = pyarrow()
    found: Any = arrow.schema([(name, arrow.null()) for name in columns])
    number = 0
    for rows in batches:
        try:
            own = _schema_of([{name: row.get(name) for name in columns} for row in rows])
            found = arrow.unify_schemas([found, own], promote_options="permissive")
        except (arrow.ArrowException, OverflowError) as error:
            where = f"rows {number + 1:,} to {number + len(rows):,}"
            raise JobError(
                f"{path}: a column has values of different types, which Parquet cannot hold ({where}: {error}): write .jsonl"
            ) from error
        number += len(rows)
    return found


def _schema_of(rows: list[dict[str, Any]]) -> Schema:
    arrow = pyarrow()
    try:
        return arrow.RecordBatch.from_pylist(rows).schema
    except UnicodeEncodeError:
        return arrow.RecordBatch.from_pylist(escaped(rows)).schema


def with_columns(schema: Schema, added: Sequence[Column]) -> Schema:
    """Return the schema with the columns of answers at its end."""
    arrow = pyarrow()
    for column in added:
        schema = schema.append(arrow.field(column.name, _type(column)))
    return schema


def with_answers(table: Any, column: Column, values: Iterable[Any]) -> Any:
    """Return a table of pyarrow with a column of answers at its end."""
    return table.append_column(pyarrow().field(column.name, _type(column)), answers_of(column, values))


def answers_of(column: Column, values: Iterable[Any]) -> Array:
    """Return the values of a column of answers as an array."""
    return pyarrow().array([flat(column, value) for value in values], _type(column))


def _type(column: Column) -> DataType:
    return getattr(pyarrow(), _TYPES[column.kind])()


def record_batch(rows: Sequence[Mapping[str, Any]], schema: Schema) -> RecordBatch:
    """Return rows as a record batch; columns that a row lacks are null.

    Raises:
        JobError: A value is not of its column's type.
        UnicodeEncodeError: A text is not Unicode.
    """
    arrow = pyarrow()
    try:
        return arrow.RecordBatch.from_arrays(
            [arrow.array([row.get(field.name) for row in rows], field.type) for field in schema], schema=schema
        )
    except (arrow.ArrowException, OverflowError) as error:
        raise JobError(f"the rows cannot be written as Parquet: {error}") from error
