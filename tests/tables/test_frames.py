"""Data frames of every known library: their rows, and the same kind of frame with more columns."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from flexgen.errors import OptionError
from flexgen.tables.columns import Column, Kind
from flexgen.tables.frames import Frame

ADDED = [
    Column(name="answer", kind=Kind.TEXT), Column(name="age", kind=Kind.INTEGER), Column(name="p", kind=Kind.NUMBER),
    Column(name="ok", kind=Kind.BOOLEAN), Column(name="tags", kind=Kind.JSON),
]  # fmt: skip
ANSWERS: list[dict[str, Any]] = [
    {"answer": "x", "age": 3, "p": 0.5, "ok": True, "tags": ["a"]},
    dict.fromkeys(["answer", "age", "p", "ok", "tags"]),
]


def test_pyarrow() -> None:
    table = pa.table({"text": ["a", None], "n": pa.array([1, 2], pa.int8())})
    frame = Frame(table)
    assert frame.columns == ["text", "n"]
    assert frame.rows(["n", "text"]) == [{"n": 1, "text": "a"}, {"n": 2, "text": None}]
    more = frame.with_columns(ADDED, ANSWERS)
    assert more.select(["text", "n"]).equals(table)
    assert more.select([column.name for column in ADDED]).to_pylist() == [{**ANSWERS[0], "tags": '["a"]'}, ANSWERS[1]]


def test_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"text": ["a", None], "n": [1.0, float("nan")], "when": [datetime.datetime(2026, 1, 2), None]}, index=[7, 7])
    frame = Frame(table)
    rows = frame.rows(["text", "n", "when"])
    assert rows[1] == {"text": None, "n": None, "when": None}
    assert str(rows[0]["when"]) == "2026-01-02 00:00:00"
    more = frame.with_columns(ADDED, ANSWERS)
    assert list(table.columns) == ["text", "n", "when"]  # the given frame is as it was
    assert list(more.index) == [7, 7]
    assert list(more.columns) == ["text", "n", "when", "answer", "age", "p", "ok", "tags"]
    assert [more.iloc[0][name] for name in ("answer", "age", "p", "ok", "tags")] == ["x", 3, 0.5, True, '["a"]']
    assert more[["answer", "age", "p", "ok", "tags"]].iloc[1].isna().all()
    assert str(more["age"].dtype) == "Int64"


def test_polars() -> None:
    polars = pytest.importorskip("polars")
    table = polars.DataFrame({"text": ["a", None], "n": [1, 2]}, schema_overrides={"n": polars.Int8})
    frame = Frame(table)
    assert frame.rows(["text"]) == [{"text": "a"}, {"text": None}]
    more = frame.with_columns(ADDED, ANSWERS)
    assert more.select(table.columns).equals(table)
    assert more.select([column.name for column in ADDED]).to_dicts() == [{**ANSWERS[0], "tags": '["a"]'}, ANSWERS[1]]
    assert more.schema["age"] == polars.Int64
    with pytest.raises(OptionError, match="collect"):
        Frame(table.lazy())


def test_arrays_in_cells_of_pandas() -> None:
    """pandas reads the lists of a Parquet file as arrays of numpy."""
    pandas = pytest.importorskip("pandas")
    cells = [np.array(["a", "b"], dtype=object), np.array([{"n": np.array([1, 2])}], dtype=object), None]
    assert Frame(pandas.DataFrame({"tags": cells})).rows(["tags"]) == [{"tags": ["a", "b"]}, {"tags": [{"n": [1, 2]}]}, {"tags": None}]


@pytest.mark.parametrize("given", [[{"text": "a"}], "reviews.csv", None])
def test_what_is_no_frame(given: object) -> None:
    with pytest.raises(OptionError, match=r"known: pandas\.DataFrame, polars\.DataFrame, pyarrow\.Table, dict of numpy arrays"):
        Frame(given)
