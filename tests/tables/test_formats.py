"""Tables of text: what is read, what comes out again, and what is refused.  Parquet has tests of its own."""

from __future__ import annotations

import gzip
import io
import re
from pathlib import Path
from typing import Any

import pytest

from flexgen.base.files import Hashed
from flexgen.errors import JobError, OptionError
from flexgen.tables.columns import Column, Kind
from flexgen.tables.formats import format_of, open_table, open_writer

ADDED = [Column(name="answer", kind=Kind.TEXT), Column(name="tags", kind=Kind.JSON), Column(name="p", kind=Kind.NUMBER)]


def rows(path: Path, form: str) -> list[dict[str, Any]]:
    return [dict(row) for batch in open_table(path, form).batches() for row in batch.rows()]


def rewritten(path: Path, form: str, target: str) -> str:
    """The table with answers, in another format."""
    file = io.BytesIO()
    table = open_table(path, form)
    writer = open_writer(Hashed(file), target, table, ADDED)
    for batch in table.batches():
        writer.write(
            batch, [{"answer": 'a,"b"\nc', "tags": ["x"], "p": 0.5}] + [{"answer": None, "tags": None, "p": None}] * (len(batch) - 1)
        )
    writer.close()
    return file.getvalue().decode()


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_cells_stay_as_they_stand(tmp_path: Path) -> None:
    table = 'id,text,note\n007,"a, ""b""\nc", x \n1.50,é,\n'
    path = written(tmp_path / "t.csv", table)
    assert rows(path, "csv") == [{"id": "007", "text": 'a, "b"\nc', "note": " x "}, {"id": "1.50", "text": "é", "note": ""}]
    head, _, rest = table.partition("\n")
    first, second = rest.rsplit("\n", 2)[0], "1.50,é,"
    assert rewritten(path, "csv", "csv") == f'{head},answer,tags,p\n{first},"a,""b""\nc","[""x""]",0.5\n{second},,,\n'


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfa,b\r\n1,x\r\n",
        b"a;b\n1;x\n",
        b"a\tb\n1\tx\n",
        "a,b\n1,x\n".encode("utf-16"),
        gzip.compress(b"a,b\n1,x\n"),
        b"a,b\n\n1,x",
    ],
    ids=["mark", "semicolons", "tabs", "utf-16", "gzip", "blank line"],
)
def test_what_files_of_commas_look_like(tmp_path: Path, content: bytes) -> None:
    assert rows(written(tmp_path / "t.csv", content), "csv") == [{"a": "1", "b": "x"}]


def test_the_delimiter_stays(tmp_path: Path) -> None:
    assert rewritten(written(tmp_path / "t.csv", "a;b\n1;x,y\n"), "csv", "csv").startswith("a;b;answer;tags;p\n1;x,y;")
    tabs = written(tmp_path / "t.tsv", "a,b\tc\nx,y\tz\n")
    assert rows(tabs, "tsv") == [{"a,b": "x,y", "c": "z"}]
    assert rewritten(tabs, "tsv", "csv").startswith('"a,b",c,answer,tags,p\n"x,y",z,')
    assert rewritten(tabs, "tsv", "tsv").startswith("a,b\tc\tanswer\ttags\tp\nx,y\tz\t")


def test_a_long_cell(tmp_path: Path) -> None:
    assert rows(written(tmp_path / "t.csv", "a\n" + "x" * 300_000), "csv") == [{"a": "x" * 300_000}]


def test_a_short_row_lacks_columns(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "a,b\n1\n")
    assert rows(path, "csv") == [{"a": "1"}]
    assert rewritten(path, "csv", "csv").splitlines()[1].startswith('1,,"a,""b""')


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.csv", b"", "is empty"),
        ("t.csv", b"a,b\n1,2,3\n", "row 1, which begins '1', has 3 cells, and the header has 2 columns"),
        ("t.csv", b'a,b\n1,"x\n', "line 2: unexpected end of data"),
        ("t.csv", b"a\n\xff\n", "is not UTF-8 (0xff); iconv"),
        ("t.jsonl", b"", "has no rows"),
        ("t.jsonl", b"{}\n", "has no rows"),
        ("t.jsonl", b'{"a": 1}\n{"a": \n', "line 2 is not a row"),
        ("t.jsonl", b'{"a": 1}\n[1]\n', "line 2 is not a row"),
        (
            "t.jsonl",
            b'{"a": 1}\n{"a": 1, "b": 2, "a": 3}\n',
            "line 2 is not a row, a JSON object with the names of columns and their values: 'a'",
        ),
        ("t.jsonl", b'{"a": 1}\n\n{"a": {"b": 1, "b": 1}}\n', "line 3 is not a row"),
        ("t.jsonl", b'{"a": NaN}\n', "line 1 is not a row, a JSON object with the names of columns and their values: it contains NaN"),
        ("t.jsonl", b'{"a": -Infinity}\n', "it contains -Infinity"),
        ("t.jsonl", b'{"a": 1e999}\n', "the number 1e999 is out of range"),
        ("t.jsonl", b'{"a": ' + b"9" * 5000 + b"}\n", "line 1 is not a row"),
        ("t.jsonl", b'{"a": ' + b"[" * 100_000 + b"\n", "line 1 is not a row"),
        ("t.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "line 2 is not UTF-8 (0xff at byte 7)"),
        ("t.parquet", b"PAR1 and no more", "cannot be read as a Parquet file"),
    ],
)
def test_files_that_are_no_tables(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = written(tmp_path / name, content)
    with pytest.raises(JobError) as caught:
        rows(path, format_of(path, "TABLE"))
    assert said in str(caught.value)


def test_the_command_that_mends_a_table_quotes_its_path(tmp_path: Path) -> None:
    path = written(tmp_path / "my table.csv", b"a\n\xff\n")
    with pytest.raises(JobError, match=re.escape(f"iconv -f WINDOWS-1252 -t UTF-8 '{path}' converts it")):
        rows(path, "csv")


def test_what_rows_of_json_lines_may_have(tmp_path: Path) -> None:
    huge = "1" + "0" * 4000
    path = written(tmp_path / "t.jsonl", f'\ufeff{{"a": {huge}, "b": {{"c": [1, "ü"]}}}}\r\n\n{{"a": null}}\n')
    assert rows(path, "jsonl") == [{"a": int(huge), "b": {"c": [1, "ü"]}}, {"a": None}]
    assert rewritten(path, "jsonl", "jsonl").startswith(f'{{"a": {huge}, "b": {{"c": [1, "ü"]}}, ')
    assert rows(written(tmp_path / "mark.jsonl", '\ufeff\n{"a": 1}\n'), "jsonl") == [{"a": 1}]


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="two columns are called 'a'"):
        open_table(written(tmp_path / "t.csv", "a,b,a\n"), "csv")


def test_json_lines_keep_their_values(tmp_path: Path) -> None:
    path = written(tmp_path / "t.jsonl", '{"id": 7, "text": "é", "big": 12345678901234567890}\n\n{"id": 1.0, "more": "\\ud800"}\n')
    assert list(open_table(path, "jsonl").columns) == ["id", "text", "big", "more"]
    first, second = rewritten(path, "jsonl", "jsonl").splitlines()
    assert first == '{"id": 7, "text": "é", "big": 12345678901234567890, "answer": "a,\\"b\\"\\nc", "tags": ["x"], "p": 0.5}'
    assert second == '{"id": 1.0, "more": "\\ud800", "answer": null, "tags": null, "p": null}'
    assert rewritten(path, "jsonl", "csv").splitlines()[0] == "id,text,big,more,answer,tags,p"


def test_half_of_a_surrogate_pair_becomes_an_escape_where_it_cannot_stay(tmp_path: Path) -> None:
    path = written(tmp_path / "t.jsonl", '{"a": "é", "b": 1}\n{"a": "x\\ud800y", "b": ["\\udfff"]}\n{"a": "ü", "b": null}\n')
    table, answer = open_table(path, "jsonl"), {"answer": "z", "tags": None, "p": None}
    for target, num_escaped in (("csv", 1), ("tsv", 1), ("jsonl", 0)):
        file = io.BytesIO()
        writer = open_writer(Hashed(file), target, table, ADDED)
        for batch in table.batches():
            writer.write(batch, [answer] * len(batch))
        writer.close()
        assert (writer.num_escaped, len(file.getvalue().decode().splitlines())) == (num_escaped, 3 + num_escaped)
        if target == "csv":
            assert file.getvalue().decode().splitlines()[1:] == ["é,1,z,,", 'x\\ud800y,"[""\\udfff""]",z,,', "ü,,z,,"]


@pytest.mark.parametrize(
    ("name", "form"), [("a.CSV", "csv"), ("a.b.tab", "tsv"), ("a.pq", "parquet"), ("a.ndjson", "jsonl"), ("a.csv.gz", "csv")]
)
def test_formats_by_ending(name: str, form: str) -> None:
    assert format_of(Path(name), "TABLE", may_be_compressed=True) == form


@pytest.mark.parametrize("name", ["a.xlsx", "csv", "a.csv.gz"])
def test_endings_of_no_format(name: str) -> None:
    with pytest.raises(OptionError, match=r"OUTPUT .*: the ending of a table's name is one of \.csv, \.tsv"):
        format_of(Path(name), "OUTPUT")


def test_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="known: csv, tsv, parquet, jsonl"):
        open_table(tmp_path / "t.csv", "xlsx")
