"""docs/scoring.md as its reader follows it: its lines, commands and scripts, on the bundled model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flexgen.cli import app

PAGE = (Path(__file__).parent.parent / "docs" / "scoring.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, flags=re.DOTALL)
MODEL = "models/novels-opt-7m"


def blocks(language: str) -> list[str]:
    return [code for name, code in BLOCKS if name == language]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, novels_opt: Path) -> None:
    """A folder with the page's files, from which the model has the name that the page gives it."""
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    Path(MODEL).symlink_to(novels_opt)
    labels, _, texts = blocks("json")
    Path("labels.jsonl").write_text(labels)
    Path("texts.jsonl").write_text(texts)


def flexgen(command: str) -> None:
    done = CliRunner().invoke(app, command.split()[1:])
    assert done.exit_code == 0, f"{command}\n{done.output}"


def run_script(code: str) -> None:
    exec(compile(code, "docs/scoring.md", "exec"), {"__name__": "__main__"})


def test_which_label_fits() -> None:
    (command,) = blocks("sh")
    flexgen(command)
    record = json.loads(Path("scores.jsonl").read_text())
    shown = json.loads(blocks("json")[1])
    assert record.keys() == shown.keys()
    same = ("id", "index", "text", "usage")
    assert {name: record[name] for name in same} == {name: shown[name] for name in same}
    for label, wanted in zip(record["labels"], shown["labels"], strict=True):
        assert label.keys() == wanted.keys()
        assert (label["text"], label["num_tokens"]) == (wanted["text"], wanted["num_tokens"])
        assert label["logprob"] == pytest.approx(wanted["logprob"], abs=0.3)  # in bfloat16, on whatever processor


def test_how_likely_is_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    flexgen(re.findall(r"`(flexgen run \S+ texts.jsonl -o \S+)`", PAGE)[0])
    capsys.readouterr()
    run_script(blocks("python")[0])
    name, perplexity = capsys.readouterr().out.split()
    assert name == "p1"
    assert 5 < float(perplexity) < 500


def test_scores_from_python(capsys: pytest.CaptureFixture[str]) -> None:
    _, calls, job = blocks("python")
    run_script(calls)
    assert len(capsys.readouterr().out.splitlines()) == 3
    for _ in range(2):
        run_script(job)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["0", "1"] * 2
    assert {line.split()[1] for line in lines} <= {"happy", "angry"}
    flexgen(re.findall(r"`(flexgen status \S+)`", PAGE)[0])
