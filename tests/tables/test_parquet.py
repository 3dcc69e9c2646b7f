"""Parquet: types and metadata stay, and other formats become it and come from it."""

from __future__ import annotations

import datetime
import decimal
import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flexgen.base.files import Hashed
from flexgen.errors import JobError, OptionError
from flexgen.tables.columns import Column, Kind
from flexgen.tables.formats import check_writable, open_table, open_writer

ADDED = [
    Column(name="answer", kind=Kind.TEXT), Column(name="age", kind=Kind.INTEGER), Column(name="p", kind=Kind.NUMBER),
    Column(name="ok", kind=Kind.BOOLEAN), Column(name="tags", kind=Kind.JSON),
]  # fmt: skip
ANSWER = {"answer": "x", "age": 3, "p": 0.5, "ok": True, "tags": ["a"]}
NOTHING: dict[str, Any] = dict.fromkeys(ANSWER)
NANOSECONDS = 1_700_000_000_123_456_789


@pytest.fixture
def typed() -> Any:
    """A column of every kind that a conversion to Python and back would spoil."""
    columns = {
        "int8": pa.array([1, None, 3], pa.int8()),
        "float": pa.array([1.5, None, 2.0], pa.float32()),
        "when": pa.array([NANOSECONDS, None, 0], pa.timestamp("ns", "UTC")),
        "day": pa.array([datetime.date(2026, 1, 2), None, None]),
        "price": pa.array([decimal.Decimal("1.50"), None, None], pa.decimal128(9, 2)),
        "kind": pa.array(["a", "b", "a"]).dictionary_encode(),
        "list": pa.array([[1], None, []], pa.list_(pa.int16())),
        "object": pa.array([{"a": 1}, None, {"a": None}]),
        "text.de": pa.array(["Grüße", None, "zwei"], pa.large_string()),
        "bytes": pa.array([b"\xff", None, b"ab"]),
    }
    return pa.table(columns).replace_schema_metadata({"origin": "here"})


def rewritten(path: Path, form: str, target: str, answers: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    table, place = open_table(path, form), 0
    writer = open_writer(Hashed(file), target, table, ADDED)
    for batch in table.batches():
        writer.write(batch, answers[place : place + len(batch)])
        place += len(batch)
    writer.close()
    assert place == len(answers)
    return file.getvalue()


def test_types_and_metadata_stay(tmp_path: Path, typed: Any) -> None:
    pq.write_table(typed, tmp_path / "t.parquet")
    found = pq.read_table(io.BytesIO(rewritten(tmp_path / "t.parquet", "parquet", "parquet", [ANSWER, NOTHING, ANSWER])))
    assert found.select(typed.column_names).cast(typed.schema).equals(typed)
    assert [found.schema.field(name).type for name in typed.column_names] == [field.type for field in typed.schema]
    assert found.schema.metadata[b"origin"] == b"here"
    assert found.select(list(ANSWER)).to_pylist()[:2] == [{**ANSWER, "tags": '["a"]'}, NOTHING]
    assert [found.schema.field(name).type for name in ANSWER] == [pa.string(), pa.int64(), pa.float64(), pa.bool_(), pa.string()]


def test_rows_as_values_of_python(tmp_path: Path, typed: Any) -> None:
    pq.write_table(typed, tmp_path / "t.parquet")
    table = open_table(tmp_path / "t.parquet", "parquet")
    (batch,) = table.batches(["text.de", "when"])
    assert [row["text.de"] for row in batch.rows()] == ["Grüße", None, "zwei"]
    assert str(batch.rows()[0]["when"]).startswith("2023-11-14 22:13:20.123456")
    assert (batch.rows()[0]["kind"], batch.rows()[0]["object"]) == ("a", {"a": 1})


def test_many_rows_in_row_groups(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": range(20_000)}), tmp_path / "t.parquet", row_group_size=700)
    content = rewritten(tmp_path / "t.parquet", "parquet", "parquet", [{**ANSWER, "age": n} for n in range(20_000)])
    found = pq.ParquetFile(io.BytesIO(content))
    assert found.metadata.num_row_groups <= 3
    assert found.read().column("age").to_pylist() == found.read().column("n").to_pylist() == list(range(20_000))


def test_to_and_from_text(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,text\n007,a\n8\n")
    (tmp_path / "t.parquet").write_bytes(rewritten(tmp_path / "t.csv", "csv", "parquet", [ANSWER, NOTHING]))
    assert pq.read_table(tmp_path / "t.parquet").select(["id", "text"]).to_pylist() == [
        {"id": "007", "text": "a"},
        {"id": "8", "text": None},
    ]
    dates = pa.table({"day": [datetime.date(2026, 1, 2)], "ok": [True], "tags": [["a"]]})
    pq.write_table(dates.rename_columns(["day", "flag", "list"]), tmp_path / "d.parquet")
    assert (
        rewritten(tmp_path / "d.parquet", "parquet", "csv", [ANSWER]).decode().splitlines()[1].startswith('2026-01-02,true,"[""a""]",x,3,')
    )
    line = json.loads(rewritten(tmp_path / "d.parquet", "parquet", "jsonl", [ANSWER]))
    assert line == {"day": "2026-01-02", "flag": True, "list": ["a"], **ANSWER}


def test_from_json_lines(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"n": 1, "t": null}\n{"n": 1.5, "t": "x", "l": [1]}\n')
    found = pq.read_table(io.BytesIO(rewritten(tmp_path / "t.jsonl", "jsonl", "parquet", [ANSWER, NOTHING])))
    assert found.select(["n", "t", "l"]).to_pylist() == [{"n": 1.0, "t": None, "l": None}, {"n": 1.5, "t": "x", "l": [1]}]


def test_values_that_have_no_type_together(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"n": 1}\n{"n": "x"}\n')
    with pytest.raises(JobError, match="values of different types"):
        check_writable(open_table(tmp_path / "t.jsonl", "jsonl"), "parquet")
    check_writable(open_table(tmp_path / "t.jsonl", "jsonl"), "csv")


def test_half_of_a_surrogate_pair_becomes_an_escape(tmp_path: Path) -> None:
    lines = ['{"t": "x\\ud800", "l": ["ü"], "o": {"a": "b"}}', '{"t": "ü", "l": ["\\udfff"], "o": {"a": "\\ud801"}}', '{"t": "z"}']
    (tmp_path / "t.jsonl").write_text("\n".join(lines) + "\n")
    table = open_table(tmp_path / "t.jsonl", "jsonl")
    check_writable(table, "parquet")
    file = io.BytesIO()
    writer = open_writer(Hashed(file), "parquet", table, ADDED)
    (batch,) = table.batches()
    writer.write(batch, [ANSWER, NOTHING, NOTHING])
    writer.close()
    assert writer.num_escaped == 2
    assert pq.read_table(io.BytesIO(file.getvalue())).select(["t", "l", "o"]).to_pylist() == [
        {"t": "x\\ud800", "l": ["ü"], "o": {"a": "b"}},
        {"t": "ü", "l": ["\\udfff"], "o": {"a": "\\ud801"}},
        {"t": "z", "l": None, "o": None},
    ]


@pytest.mark.parametrize("kind", ["date", "text"])
def test_a_value_that_python_cannot_hold(tmp_path: Path, kind: str) -> None:
    broken = pa.array([b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"x": pa.array([5_000_000], pa.date32()) if kind == "date" else broken}), tmp_path / "t.parquet")
    (batch,) = open_table(tmp_path / "t.parquet", "parquet").batches()
    with pytest.raises(JobError, match=r"t\.parquet: the column 'x' has a value that cannot be read: "):
        batch.rows()


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(OptionError, match=r"pip install 'flexgen-engine\[tables\]'"):
        open_table(tmp_path / "t.parquet", "parquet")
