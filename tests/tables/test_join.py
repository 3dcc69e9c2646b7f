"""The table with its answers, made from records: also while some are missing, and never from another table than was read."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from flexgen.base.files import Hashed
from flexgen.errors import JobError, OptionError, StorageError
from flexgen.tables.form import TableForm
from flexgen.tables.formats import open_table
from flexgen.tables.join import write_table
from flexgen.tables.task import Task


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "t.csv"
    path.write_text("id,text\na,one\nb\nc,three\nd,four\n")
    return path


def form_of(source: Path, output_format: str | None = None) -> TableForm:
    return TableForm.of(open_table(source, "csv"), "csv", output_format, Task(prompt="{text}"))


def record(index: int, **fields: Any) -> bytes:
    return json.dumps({"id": index, "index": index, **fields}).encode()


def joined(form: TableForm, records: list[bytes], target: str = "out.csv") -> list[str]:
    file = io.BytesIO()
    assert write_table(form, records, Hashed(file), Path(target)) == 4
    return file.getvalue().decode().splitlines()


def test_rows_find_their_records(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flexgen")
    failed = record(2, error={"code": "invalid_request", "message": "there is no prompt"})
    lines = joined(form_of(source), [failed, record(3, text=" 3", finish_reason="length")])
    assert lines == [
        "id,text,answer,error",
        "a,one,,not answered yet",
        "b,,,the row has no column 'text'",
        "c,three,3,",
        "d,four,,not answered yet",
    ]
    assert [each.getMessage().partition(" ")[0] for each in caplog.records] == ["2", "1", "1"]


def test_one_row_is_told_in_the_singular(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flexgen")
    joined(form_of(source), [record(1, text="1", finish_reason="length"), *(record(index, text="x") for index in (2, 3))])
    assert [each.getMessage() for each in caplog.records] == [
        "1 of 4 rows has no answer yet",
        "1 of 4 answers was cut because it reached the most tokens",
    ]


def test_the_target_says_the_format(source: Path) -> None:
    records = [record(index, text=str(index), finish_reason="stop") for index in range(1, 5)]
    assert json.loads(joined(form_of(source), records, "out.jsonl")[0]) == {"id": "a", "text": "one", "answer": "1", "error": None}
    assert joined(form_of(source, "tsv"), records, "out.csv")[1] == "a\tone\t1\t"
    assert joined(form_of(source), records, "out")[1] == "a,one,1,"


def test_a_form_through_json(source: Path) -> None:
    form = form_of(source, "jsonl")
    assert TableForm.from_json(form.to_json()) == form
    with pytest.raises(OptionError, match="output"):
        TableForm.from_json("{}")


def test_a_table_that_changed(source: Path) -> None:
    form = form_of(source)
    source.write_text(source.read_text() + "e,five\n")
    with pytest.raises(StorageError, match=r"changed since the job read it.*run the job again"):
        joined(form, [])
    source.unlink()
    with pytest.raises(StorageError, match="No such file"):
        joined(form, [])


@pytest.mark.parametrize("target", ["out.parquet", "out.csv"])
def test_a_table_that_is_damaged_in_the_middle(source: Path, target: str) -> None:
    source.write_text("id,text\n" + "a,b\n" * 5000 + "a,b,c\n")
    with pytest.raises(JobError, match="row 5001"):
        write_table(form_of(source), [], Hashed(io.BytesIO()), Path(target))
