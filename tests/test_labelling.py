"""docs/labelling.md as its reader follows it: the table, both scripts and every command.  Only the engine and the machine are stand-ins."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine
from typer.testing import CliRunner

from flexgen.cli import app

PAGE = (Path(__file__).parent.parent / "docs" / "labelling.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, flags=re.DOTALL)
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def blocks(language: str) -> list[str]:
    return [code for name, code in BLOCKS if name == language]


def run_script(code: str) -> None:
    exec(compile(code, "docs/labelling.md", "exec"), {"__name__": "__main__"})


def labelled() -> list[dict[str, str]]:
    with Path("labelled.csv").open(newline="", encoding="utf-8") as table:
        return list(csv.DictReader(table))


@pytest.fixture
def reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The page's table, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (table,) = blocks("csv")
    Path("reviews.csv").write_text(table, encoding="utf-8")
    return list(csv.DictReader(table.splitlines()))


@pytest.fixture
def chat_model(tmp_path: Path, novels_qwen3: Path) -> Path:
    """A model with a template for conversations."""
    folder = shutil.copytree(novels_qwen3, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.mark.usefixtures("kept_rates")
def test_the_page_from_the_table_to_the_labelled_table(reviews: list[dict[str, str]], chat_model: Path, engines: list[FakeEngine]) -> None:
    write_requests, join = blocks("python")
    run_script(write_requests)
    requests = [json.loads(line) for line in Path("requests.jsonl").read_text().splitlines()]
    assert [request["id"] for request in requests] == [row["id"] for row in reviews]
    for command in (line for block in blocks("sh") for line in block.splitlines()):
        done = CliRunner().invoke(app, [word.replace("MODEL", str(chat_model)) for word in command.split()[1:]])
        assert done.exit_code == 0, f"{command}\n{done.output}"
    assert Path("so_far.jsonl").read_bytes() == Path("answers.jsonl").read_bytes()
    assert [engine.num_pulled for engine in engines] == [len(reviews)]
    run_script(join)
    rows = labelled()
    assert [{"id": row["id"], "text": row["text"]} for row in rows] == reviews
    assert all(row["label"] == "" and row["problem"].startswith("said ") for row in rows)  # the fake engine knows no labels


def test_a_table_with_a_byte_order_mark(reviews: list[dict[str, str]]) -> None:
    """As Excel writes it."""
    Path("reviews.csv").write_text(Path("reviews.csv").read_text(encoding="utf-8"), encoding="utf-8-sig")
    Path("answers.jsonl").write_text("".join(json.dumps({"id": row["id"], "text": "praise"}) + "\n" for row in reviews))
    for script in blocks("python"):
        run_script(script)
    assert [json.loads(line)["id"] for line in Path("requests.jsonl").read_text().splitlines()] == [row["id"] for row in reviews]
    assert [(row["id"], row["label"]) for row in labelled()] == [(row["id"], "praise") for row in reviews]


def test_answers_errors_and_rows_without_either_find_their_rows(reviews: list[dict[str, str]]) -> None:
    answers: list[dict[str, Any]] = [{"id": "r2", "text": " Complaint.\n"}, {"id": "r1", "error": {"code": "x", "message": "too long"}}]
    Path("answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    run_script(blocks("python")[1])
    found = [(row["id"], row["label"], row["problem"]) for row in labelled()]
    assert found == [("r1", "", "too long"), ("r2", "complaint", ""), ("r3", "", "not answered yet")]
