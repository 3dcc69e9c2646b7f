"""The text of values, and the kinds of columns that schemas describe."""

from __future__ import annotations

import datetime
import decimal
import math
from typing import Any

import pytest

from flexgen.errors import RequestError
from flexgen.tables.columns import Kind, fitted, kind_of
from flexgen.tables.values import cell_of, escaped, surrogate_fault, text_of, unicode_text


def test_cells_hold_any_bytes() -> None:
    assert [cell_of(value) for value in (b"caf\xc3\xa9", b"a\xff", None, [b"\xfe"], 2.5)] == ["café", "a\\xff", "", '["\\\\xfe"]', "2.5"]
    with pytest.raises(RequestError, match="not UTF-8"):
        text_of(b"\xff")


def test_text_that_is_not_unicode() -> None:
    assert escaped({"a\ud800": ["ü\udfff", 1, None]}) == {"a\\ud800": ["ü\\udfff", 1, None]}
    assert (surrogate_fault("\U0001f600"), unicode_text("ü", "it")) == (None, "ü")
    with pytest.raises(RequestError, match=r"^the prompt has half of a surrogate pair \(\\ud83d\), which is no character$"):
        unicode_text("a\ud83d", "the prompt")


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (None, ""),
        (math.nan, ""),
        ("007", "007"),
        (7, "7"),
        (3.0, "3.0"),
        (1e-7, "1e-07"),
        (True, "true"),
        (["é", None, 1], '["é", null, 1]'),
        ({"when": datetime.date(2026, 1, 2)}, '{"when": "2026-01-02"}'),
        (datetime.datetime(2026, 1, 2, 3, 4, 5), "2026-01-02 03:04:05"),
        (decimal.Decimal("1.50"), "1.50"),
        (b"abc", "abc"),
    ],
)
def test_text(value: object, wanted: str) -> None:
    assert text_of(value) == wanted


@pytest.mark.parametrize(
    ("schema", "kind"),
    [
        ({"type": "string"}, Kind.TEXT),
        ({"type": "integer"}, Kind.INTEGER),
        ({"type": ["number", "null"]}, Kind.NUMBER),
        ({"type": "boolean"}, Kind.BOOLEAN),
        ({"enum": ["a", "b", None]}, Kind.TEXT),
        ({"enum": [1, "b"]}, Kind.JSON),
        ({"const": "a"}, Kind.TEXT),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, Kind.INTEGER),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, Kind.JSON),
        ({"type": "array"}, Kind.JSON),
        ({"type": ["integer", "string"]}, Kind.JSON),
        ({"$ref": "#/$defs/x"}, Kind.JSON),
        (True, Kind.JSON),
    ],
)
def test_kinds_of_schemas(schema: Any, kind: Kind) -> None:
    assert kind_of(schema) is kind


@pytest.mark.parametrize(
    ("kind", "value", "wanted"),
    [
        (Kind.INTEGER, 3.0, 3),
        (Kind.NUMBER, 3, 3.0),
        (Kind.BOOLEAN, False, False),
        (Kind.TEXT, None, None),
        (Kind.JSON, [1], [1]),
    ],
)
def test_values_that_fit(kind: Kind, value: object, wanted: object) -> None:
    found = fitted(kind, value)
    assert (found, type(found)) == (wanted, type(wanted))


@pytest.mark.parametrize(
    ("kind", "value"),
    [(Kind.INTEGER, 3.5), (Kind.INTEGER, True), (Kind.INTEGER, 1 << 70), (Kind.TEXT, 3), (Kind.BOOLEAN, 1), (Kind.NUMBER, "1")],
)
def test_values_that_do_not_fit(kind: Kind, value: object) -> None:
    with pytest.raises(ValueError, match=kind):
        fitted(kind, value)
