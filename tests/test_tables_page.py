"""docs/tables.md as its reader follows it: the tables and every command, and the code for data frames."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fakes import FakeEngine
from typer.testing import CliRunner

from flexgen.cli import app

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "tables.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, flags=re.DOTALL)


def blocks(language: str) -> list[str]:
    return [code for name, code in BLOCKS if name == language]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of the reader: that of the repository, with the tables of the page in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    for name, content in zip(("reviews.csv", "examples.csv"), blocks("csv"), strict=True):
        (tmp_path / name).write_text(content)
    return tmp_path


@pytest.mark.usefixtures("kept_rates")
def test_every_command(folder: Path, scorers: list[FakeEngine]) -> None:
    outputs = {}
    for block in blocks("sh"):
        for command in block.splitlines():
            outputs[command] = CliRunner().invoke(app, shlex.split(command)[1:])
            assert outputs[command].exit_code == 0, f"{command}\n{outputs[command].output}"
    with Path("labelled.csv").open(newline="") as file:
        labelled = list(csv.DictReader(file))
    assert [row["id"] for row in labelled] == ["r1", "r2", "r3"]
    assert {row["answer"] for row in labelled} <= {"praise", "complaint", "question"}
    assert Path("so_far.csv").read_bytes() == Path("labelled.csv").read_bytes()
    assert pq.read_table("scored.parquet").column_names == ["id", "text", "answer", "answer_yes", "answer_no", "error"]
    (prompt,) = blocks("")
    kept = (folder / "shown.csv.flexgen" / "input").read_text()
    assert prompt.rstrip("\n").replace("\n", "\\n") in kept
    assert "Message: The parcel came a day early. Thank you!\nKind:\n" in next(iter(outputs.values())).stdout


def test_data_frames(folder: Path, scorers: list[FakeEngine]) -> None:
    pytest.importorskip("pandas")
    (code,) = blocks("python")
    found: dict[str, Any] = {}
    exec(compile(code, "docs/tables.md", "exec"), found)
    labelled = found["labelled"]
    assert list(labelled["id"]) == ["r1", "r2", "r3"]
    assert set(labelled["answer"]) <= {"praise", "complaint", "question"}
