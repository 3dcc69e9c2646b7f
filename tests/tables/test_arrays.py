"""Tables that are dicts of arrays, and values of numpy as Python has them."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pytest

from flexgen.errors import OptionError
from flexgen.tables.arrays import python_value
from flexgen.tables.columns import Column, Kind
from flexgen.tables.frames import Frame

ADDED = [
    Column(name="answer", kind=Kind.TEXT), Column(name="age", kind=Kind.INTEGER), Column(name="p", kind=Kind.NUMBER),
    Column(name="ok", kind=Kind.BOOLEAN), Column(name="tags", kind=Kind.JSON),
]  # fmt: skip
ANSWER: dict[str, Any] = {"answer": "x", "age": 3, "p": 0.5, "ok": True, "tags": ["a"]}


def objects(*values: Any) -> np.ndarray:
    """An array of objects, also of values that numpy would make further dimensions of."""
    array = np.empty(len(values), object)
    array[:] = values
    return array


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (np.str_("a"), "a"),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.array(7), 7),
        (np.array([["a", "b"]]), [["a", "b"]]),
        (objects({"role": "user", "parts": objects("x", None)}), [{"role": "user", "parts": ["x", None]}]),
        ((np.int8(1), {"a": np.float64(2)}), [1, {"a": 2.0}]),
        (np.datetime64("2026-01-31T12:00:00.000000001", "ns"), datetime.datetime(2026, 1, 31, 12)),
        (np.datetime64("2026-01-31", "D"), datetime.date(2026, 1, 31)),
        (np.datetime64("NaT", "ns"), None),
        (np.timedelta64(1_500_000_000, "ns"), datetime.timedelta(seconds=1.5)),
        (datetime.date(2026, 1, 31), datetime.date(2026, 1, 31)),
        (None, None),
    ],
)
def test_values(value: Any, wanted: Any) -> None:
    found = python_value(value)
    assert found == wanted
    assert type(found) is type(wanted)


def test_a_dict_of_arrays() -> None:
    table = {"text": objects("a", None), "n": np.array([1, 2], np.int8), "grid": np.zeros((2, 2))}
    frame = Frame(table)
    assert frame.columns == ["text", "n", "grid"]
    assert frame.rows(["n", "text"]) == [{"n": 1, "text": "a"}, {"n": 2, "text": None}]
    assert frame.rows(["grid"])[0] == {"grid": [0.0, 0.0]}
    more = frame.with_columns(ADDED, [ANSWER, dict.fromkeys(ANSWER)])
    assert list(table) == ["text", "n", "grid"]  # the given dict is as it was
    assert {name: more[name][0] for name in ANSWER} == {**ANSWER, "tags": '["a"]'}
    assert np.isnan(more["p"][1])
    assert [more[name][1] for name in ("answer", "age", "ok", "tags")] == [None] * 4


def test_columns_without_gaps_have_their_own_types() -> None:
    more = Frame({"text": objects("a", "b")}).with_columns(ADDED, [ANSWER, ANSWER])
    assert [more[column.name].dtype for column in ADDED] == [object, np.int64, np.float64, np.bool_, object]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"text": ["a"]}, "its column 'text' is a list: give arrays of numpy"),
        ({"text": np.array("a")}, "its column 'text' is a ndarray"),
        ({"text": objects("a"), "n": np.array([1, 2])}, r"differ in length \('text': 1, 'n': 2\)"),
    ],
)
def test_what_is_no_table(table: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        Frame(table)
