"""`--trace` of the commands: checked before anything else, and never written over another file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine
from traces import read_trace
from typer.testing import CliRunner

from flexgen.cli import app


def flexgen(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"prompt": "The old house", "max_tokens": 4, "temperature": 0}) + "\n")
    return path


def test_a_run_writes_its_trace(novels_opt: Path, source: Path, tmp_path: Path) -> None:
    path, output = tmp_path / "trace.json", tmp_path / "out.jsonl"
    done = flexgen("run", novels_opt, source, "-o", output, "--dtype", "float32", "--trace", path, "--trace-passes", "1:")
    assert done.exit_code == 0, done.output
    assert [each["name"] for each in read_trace(path).slices["passes"]] == ["pass 1", "pass 2", "pass 3"]


@pytest.mark.parametrize(
    "command",
    [
        "run no-model in.jsonl -o out.jsonl",
        "map no-model in.csv -o out.csv --prompt {a}",
        "bench throughput no-model",
        "bench steady no-model",
        "eval perplexity no-model text.txt",
        "eval lm-eval no-model",
    ],
)
def test_a_file_that_cannot_be_written_is_refused_first(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = flexgen(*command.split(), "--trace", "missing/trace.json")
    assert done.exit_code == 2
    assert "--trace 'missing/trace.json': missing/trace.json cannot be written: the folder " in done.stderr
    assert not any(tmp_path.iterdir())


def test_the_trace_is_a_file_of_its_own(model_folder: Path, source: Path, tmp_path: Path, engines: list[FakeEngine]) -> None:
    output, metrics, before = tmp_path / "out.jsonl", tmp_path / "metrics.json", source.read_text()
    for other in (source, output, metrics):
        done = flexgen("run", model_folder, source, "-o", output, "--metrics", metrics, "--trace", other)
        assert (done.exit_code, f"--trace {other} is another file of this command" in done.stderr) == (2, True)
    done = flexgen("bench", "throughput", model_folder, "--output-json", metrics, "--trace", metrics)
    assert (done.exit_code, "another file of this command" in done.stderr) == (2, True)
    done = flexgen("eval", "perplexity", model_folder, source, "--trace", source)
    assert (done.exit_code, "another file of this command" in done.stderr) == (2, True)
    assert source.read_text() == before
    assert not engines


def test_what_runs_nothing_has_no_trace(model_folder: Path, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    done = flexgen("run", model_folder, source, "-o", tmp_path / "out.jsonl", "--dry-run", "--trace", path)
    assert (done.exit_code, "--dry-run has nothing to trace: leave out --trace" in done.stderr) == (2, True)
    done = flexgen("plan", "opt-125m", "--trace", path)
    assert (done.exit_code, "leave out --trace" in done.stderr) == (2, True)
    assert not path.exists()


def test_passes_need_a_trace(model_folder: Path, source: Path, tmp_path: Path) -> None:
    done = flexgen("run", model_folder, source, "-o", tmp_path / "out.jsonl", "--trace-passes", "1:2")
    assert done.exit_code == 2
    assert "--trace-passes '1:2' chooses the passes of a trace, and there is none: give --trace as well" in done.stderr
