"""Tables that are dicts of numpy's arrays, as Ray Data has them, and values of numpy wherever they stand in a table, as Python has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from flexgen.errors import OptionError
from flexgen.tables.columns import Column, Kind

_PLAIN = (str, int, float, bool, bytes, type(None))


class ArrayFrames:
    """Dicts from the names of columns to arrays of the same length."""

    def columns(self, frame: Mapping[str, Any]) -> list[str]:
        """Return the names of the columns.

        Raises:
            OptionError: A value is not an array, or two differ in length.
        """
        for name, column in frame.items():
            if not isinstance(column, np.ndarray) or not column.ndim:
                raise OptionError(f"the table is a dict, and its column {name!r} is a {type(column).__name__}: give arrays of numpy")
        if len({len(column) for column in frame.values()}) > 1:
            lengths = ", ".join(f"{name!r}: {len(column)}" for name, column in frame.items())
            raise OptionError(f"the table is a dict of arrays that differ in length ({lengths})")
        return [str(name) for name in frame]

    def values(self, frame: Mapping[str, Any], place: int) -> list[Any]:
        """Return the values of a column."""
        return python_value(list(frame.values())[place])

    def with_columns(self, frame: Mapping[str, Any], columns: Sequence[Column], values: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Return a dict with more columns."""
        return {**frame, **{column.name: _array(column.kind, values[column.name]) for column in columns}}


def _array(kind: Kind, values: Sequence[Any]) -> np.ndarray:
    """Return values as an array: numbers that are missing are NaN, and other kinds of which some are missing are objects."""
    if kind is Kind.NUMBER:
        return np.array([np.nan if each is None else each for each in values], np.float64)
    whole = kind in (Kind.INTEGER, Kind.BOOLEAN) and None not in values
    array = np.empty(len(values), (np.int64 if kind is Kind.INTEGER else np.bool_) if whole else object)
    array[:] = values
    return array


def python_value(value: Any) -> Any:
    """Return a value without numpy, within lists and objects, too: arrays are lists, and a time that is missing is None."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, np.ndarray):
        return [python_value(each) for each in value] if value.ndim else python_value(value[()])
    if isinstance(value, (np.datetime64, np.timedelta64)):
        return _time(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {name: python_value(each) for name, each in cast("dict[Any, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [python_value(each) for each in cast("Sequence[Any]", value)]
    return value


def _time(value: np.datetime64 | np.timedelta64) -> Any:
    """Return a time as one of Python's; those are exact to a microsecond."""
    if np.isnat(value):
        return None
    found = value.item()
    if not isinstance(found, int):
        return found
    kind = "datetime64" if isinstance(value, np.datetime64) else "timedelta64"
    return value.astype(f"{kind}[us]").item()
