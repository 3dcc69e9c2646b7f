"""Reads dataclasses from JSON, and checks every value against the annotation of its field, since people write and change these files.

An annotation may be int, float, bool, str, Any, another dataclass, dict, tuple, `X | None`, or Annotated with functions. Each function gets
the value that was read, and returns the one to use, or raises ValueError with what is needed. Numbers are finite and not negative.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from flexgen.errors import OptionError

T = TypeVar("T")


def parsed_json(text: str, what: str) -> Any:
    """Parse a JSON text.

    Raises:
        OptionError: The text is not JSON; the message begins with `what`.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{what}: {error}") from error


def dataclass_from_json(kind: type[T], value: Any, what: str) -> T:
    """Return the dataclass that a JSON object describes.

    Raises:
        OptionError: The value is not an object, a key is unknown or missing, or a value is impossible. The message begins with `what`.
    """
    if not isinstance(value, dict):
        raise OptionError(f"{what}: it is not a JSON object")
    _check_keys(kind, value, what)
    return kind(**fields_from_json(kind, value, what))


def fields_from_json(kind: type, fields: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return the values of those fields of a dataclass that a JSON object has.

    Raises:
        OptionError: A value is impossible; the message names the field and the value.
    """
    kinds, found = _kinds(kind), dict[str, Any]()
    for name, value in fields.items():
        try:
            found[name] = _read(kinds[name], value, f"{what}: {name}")
        except (ValueError, OverflowError) as error:
            raise OptionError(f"{what}: {name} is {json.dumps(value)[:80]}: {error}") from error
    return found


def needed(holds: Callable[[Any], object], message: str) -> Callable[[Any], Any]:
    """Return a function for Annotated that refuses values for which `holds` is false."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(message)
        return value

    return check


Positive = Annotated[float, needed(bool, "more than 0 is needed")]


@functools.cache
def _kinds(kind: type) -> dict[str, Any]:
    """Return the annotations of a dataclass's fields."""
    return get_type_hints(kind, include_extras=True)


def _check_keys(kind: type, fields: Mapping[str, Any], what: str) -> None:
    known, given = _kinds(kind).keys(), fields.keys()
    for problem, names in (("unknown keys", given - known), ("missing keys", known - given)):
        if names:
            raise OptionError(f"{what}: {problem}: {', '.join(sorted(names))}")


def _read(kind: Any, value: Any, what: str) -> Any:
    """Return the value that an annotation describes; `what` names it in errors about keys."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return functools.reduce(lambda found, check: check(found), parts[1:], _read(parts[0], value, what))
    if origin in (Union, UnionType):
        return None if value is None else _read(parts[0], value, what)
    if origin is dict:
        return {_read(parts[0], key, what): _read(parts[1], each, what) for key, each in _of(dict, value, "a JSON object").items()}
    if origin is tuple:
        items = _of(list, value, "a list")
        kinds = parts[:1] * len(items) if parts[-1] is ... else parts
        if len(items) != len(kinds):
            raise ValueError(f"a list of {len(kinds)} is needed")
        return tuple(_read(each, item, what) for each, item in zip(kinds, items, strict=True))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        _check_keys(kind, _of(dict, value, "a JSON object"), what)
        return kind(**{name: _read(each, value[name], f"{what}: {name}") for name, each in _kinds(kind).items()})
    return _number(kind, value) if kind in (int, float) else value if kind is Any else _of(kind, value, _NAMES[kind])


_NAMES = {str: "text", bool: "true or false"}


def _of(kind: type, value: Any, name: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{name} is needed")
    return value


def _number(kind: type, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError("a number that is not negative is needed")
    if kind is int and int(value) != value:
        raise ValueError("a whole number is needed")
    return kind(value)
