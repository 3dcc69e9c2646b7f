"""Data frames in memory: their rows, and the same frame with more columns.  None of their libraries is needed by this package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flexgen.errors import OptionError
from flexgen.tables.arrays import ArrayFrames, python_value
from flexgen.tables.arrow import with_answers
from flexgen.tables.columns import Column, Kind, flat

Values = Mapping[str, Sequence[Any]]  # name of a column -> its values


class PandasFrames:
    """DataFrames of pandas.  The index stays."""

    def columns(self, frame: Any) -> list[str]:
        """Return the names of the columns."""
        return [str(name) for name in frame.columns]

    def values(self, frame: Any, place: int) -> list[Any]:
        """Return the values of a column, None where pandas has no value."""
        column = frame.iloc[:, place]
        return [None if missing else python_value(value) for value, missing in zip(column.tolist(), column.isna(), strict=True)]

    def with_columns(self, frame: Any, columns: Sequence[Column], values: Values) -> Any:
        """Return a copy of the frame with more columns."""
        import pandas  # pyright: ignore[reportMissingImports]

        types = {Kind.INTEGER: "Int64", Kind.NUMBER: "float64", Kind.BOOLEAN: "boolean"}
        series = {
            column.name: pandas.Series(list(values[column.name]), index=frame.index, dtype=types.get(column.kind, "object"))
            for column in columns
        }
        return frame.assign(**series)


class PolarsFrames:
    """DataFrames of polars."""

    def columns(self, frame: Any) -> list[str]:
        """Return the names of the columns."""
        return list(frame.columns)

    def values(self, frame: Any, place: int) -> list[Any]:
        """Return the values of a column."""
        return frame.to_series(place).to_list()

    def with_columns(self, frame: Any, columns: Sequence[Column], values: Values) -> Any:
        """Return a frame with more columns."""
        import polars  # pyright: ignore[reportMissingImports]

        types = {Kind.INTEGER: polars.Int64, Kind.NUMBER: polars.Float64, Kind.BOOLEAN: polars.Boolean}
        return frame.with_columns(
            [polars.Series(column.name, values[column.name], dtype=types.get(column.kind, polars.String)) for column in columns]
        )


class ArrowFrames:
    """Tables of pyarrow."""

    def columns(self, frame: Any) -> list[str]:
        """Return the names of the columns."""
        return list(frame.column_names)

    def values(self, frame: Any, place: int) -> list[Any]:
        """Return the values of a column."""
        return frame.column(place).to_pylist()

    def with_columns(self, frame: Any, columns: Sequence[Column], values: Values) -> Any:
        """Return a table with more columns."""
        for column in columns:
            frame = with_answers(frame, column, values[column.name])
        return frame


_FRAMES: Mapping[tuple[str, str], type[PandasFrames] | type[PolarsFrames] | type[ArrowFrames] | type[ArrayFrames]] = {
    ("pandas", "DataFrame"): PandasFrames,
    ("polars", "DataFrame"): PolarsFrames,
    ("pyarrow", "Table"): ArrowFrames,
    ("builtins", "dict"): ArrayFrames,
}


class Frame:
    """A data frame of any of the known libraries.

    Args:
        given: The data frame.

    Attributes:
        columns: The names of its columns, in order.

    Raises:
        OptionError: It is of no known type, or a dict whose values are not arrays of one length.
    """

    def __init__(self, given: Any) -> None:
        kind = next((each for each in type(given).__mro__ if (each.__module__.partition(".")[0], each.__name__) in _FRAMES), None)
        if kind is None:
            known = ", ".join("dict of numpy arrays" if name == "dict" else f"{library}.{name}" for library, name in _FRAMES)
            lazy = " (collect() makes one of a LazyFrame)" if type(given).__name__ == "LazyFrame" else ""
            raise OptionError(f"the table is a {type(given).__name__}; known: {known}{lazy}")
        self._given = given
        self._frames = _FRAMES[kind.__module__.partition(".")[0], kind.__name__]()
        self.columns = self._frames.columns(given)

    def rows(self, columns: Sequence[str]) -> list[dict[str, Any]]:
        """Return every row with its values in some of the columns."""
        values = [self._frames.values(self._given, self.columns.index(name)) for name in columns]
        return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]

    def with_columns(self, columns: Sequence[Column], answers: Sequence[Mapping[str, Any]]) -> Any:
        """Return the frame with more columns, whose values are those of the answers, one for each row."""
        values = {column.name: [flat(column, answer[column.name]) for answer in answers] for column in columns}
        return self._frames.with_columns(self._given, columns, values)
