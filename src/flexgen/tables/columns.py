"""The columns that answers become: their names, and the kinds of their values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from flexgen.tables.values import text_of


class Kind(StrEnum):
    """The kind of the values of a column."""

    TEXT = "text"
    INTEGER = "integer"
    NUMBER = "number"
    BOOLEAN = "boolean"
    JSON = "json"  # lists and objects; text where a format cannot hold them


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of answers.

    Attributes:
        name: The name of the column.
        kind: The kind of its values, any of which may be None.
    """

    name: str
    kind: Kind


_OF_TYPE = {"string": Kind.TEXT, "integer": Kind.INTEGER, "number": Kind.NUMBER, "boolean": Kind.BOOLEAN}
_PYTHON: dict[Kind, tuple[type, ...]] = {Kind.TEXT: (str,), Kind.INTEGER: (int,), Kind.NUMBER: (int, float), Kind.BOOLEAN: (bool,)}
_INTEGER_BITS = 63


def kind_of(schema: Any) -> Kind:
    """Return the kind of the values that a JSON schema describes; JSON unless it is one simple type, with or without null."""
    if not isinstance(schema, Mapping):
        return Kind.JSON
    listed = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(listed, list):
        return Kind.TEXT if all(isinstance(each, str) or each is None for each in listed) else Kind.JSON
    either = schema.get("anyOf", schema.get("oneOf"))
    if isinstance(either, list):
        kinds = {kind_of(each) for each in either if not (isinstance(each, Mapping) and each.get("type") == "null")}
        return kinds.pop() if len(kinds) == 1 else Kind.JSON
    given = schema.get("type")
    types = [each for each in (given if isinstance(given, list) else [given]) if each != "null"]
    return _OF_TYPE.get(types[0], Kind.JSON) if len(types) == 1 and isinstance(types[0], str) else Kind.JSON


def fitted(kind: Kind, value: Any) -> Any:
    """Return a JSON value as one of a kind.

    Raises:
        ValueError: The value is of another kind.
    """
    if value is None or kind is Kind.JSON:
        return value
    if kind is Kind.INTEGER and isinstance(value, float) and value.is_integer():
        value = int(value)
    is_flag = isinstance(value, bool)
    too_large = kind is Kind.INTEGER and isinstance(value, int) and value.bit_length() > _INTEGER_BITS
    if not isinstance(value, _PYTHON[kind]) or is_flag != (kind is Kind.BOOLEAN) or too_large:
        raise ValueError(f"{json.dumps(value)[:60]} is not of type {kind}")
    return float(value) if kind is Kind.NUMBER else value


def flat(column: Column, value: Any) -> Any:
    """Return a value of the column for a format that holds no lists and objects."""
    return text_of(value) if column.kind is Kind.JSON and value is not None else value
