"""Numbers, flags and lists as callers give them: those of Python, JSON, numpy, torch and pandas (which are not imported)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

_PLAIN = (int, float, bool, str, type(None))
_TEXT = "the text "


@runtime_checkable
class _Scalar(Protocol):
    """A number of numpy, or an array or tensor without dimensions."""

    ndim: int

    def item(self) -> Any: ...


@runtime_checkable
class _Array(Protocol):
    """An array, a tensor, or a column of a table."""

    def tolist(self) -> Any: ...


def plain(value: object) -> Any:
    """Return Python's number, flag or text for a scalar of numpy or torch, and any other value as it is."""
    if type(value) not in _PLAIN and isinstance(value, _Scalar) and value.ndim == 0:
        return value.item()
    return value


def as_int(value: object) -> int | None:
    """Return an integer, which may be written as 16.0; None for anything else, flags included."""
    value = plain(value)
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else None


def as_float(value: object) -> float | None:
    """Return a finite number; None for anything else, flags included."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer that no float holds
        return None
    return number if math.isfinite(number) else None


def as_list(value: object) -> list[Any] | None:
    """Return the values of a list, tuple, set, range, generator, array, tensor or column as a list.

    A column is read in its order, whatever its labels are.  For a single value, a text or a mapping the result is None.
    """
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, (str, bytes, bytearray, Mapping)):
        return None
    if isinstance(value, _Array):
        listed = value.tolist()
        return listed if isinstance(listed, list) else None
    return list(value) if isinstance(value, Iterable) else None


def shown(value: object) -> str:
    """Write a value of a request or a file for an error message: short, as JSON has it, and with texts marked as texts."""
    return _short(value, in_json)


def shown_in_python(value: object) -> str:
    """Write a value that only Python's callers can give: as `shown`, but as Python has it."""
    return _short(value, repr)


def in_python(value: object) -> str:
    """Write a value as Python has it, for messages such as `name=value`: short, and a text in quotes."""
    return _short(value, repr).removeprefix(_TEXT)


def _short(value: object, write: Callable[[object], str]) -> str:
    try:
        value = plain(value)
        text = repr(value) if isinstance(value, str) else write(value)
    except Exception:  # noqa: BLE001 - an integer of too many digits, or whatever an object's own repr raises
        return f"a value of type {type(value).__name__}"
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f"{_TEXT}{text}" if isinstance(value, str) else text


def in_json(value: object) -> str:
    """Write a value as JSON; one that JSON does not have as Python writes it."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return repr(value)
