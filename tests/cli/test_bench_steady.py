"""`flexgen bench steady`: its figures as text and as JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flexgen.cli import app

JOB = ("--num-prompts", 60, "--input-len", 24, "--output-len", 6, "--passes", 4, "--warmup", 1)
HOW = ("--dtype", "float32", "--device", "cpu", "--max-num-seqs", 8, "--prefill-tokens", 48)


def steady(*args: object) -> Result:
    return CliRunner().invoke(app, ["bench", "steady", *map(str, args)])


def test_figures_as_text_and_in_a_file(novels_opt: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    done = steady(novels_opt, *JOB, *HOW, "--output-json", figures)
    assert done.exit_code == 0, done.output
    written = json.loads(figures.read_text())
    assert (len(written["steady"]["passes"]), len(written["steady"]["warmup"]), written["num_passes"]) == (4, 1, 4)
    assert "4 passes in the middle of 60 prompts" in done.stdout
    assert f"Throughput: {written['output_tokens_per_s']:.2f} output tokens/s" in done.stdout
    assert f"and {written['steady']['skipped_passes']} that were not computed" in done.stdout


def test_figures_as_json(novels_opt: Path) -> None:
    done = steady(novels_opt, *JOB, *HOW, "--load-format", "dummy", "--json", "--verbose")
    assert done.exit_code == 0, done.output
    written = json.loads(done.stdout)
    assert written["steady"]["num_prompts"] == 60
    assert written["num_errors"] == 0
    assert "output tokens/s" in done.stderr, "the report is not among the JSON"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num-prompts", 8), "raise --num-prompts"),
        (("--input-len", 5000), "exceed the context"),
        (("--passes", 0), "0 is less than 1"),
        (("--output-json", "missing/figures.json"), "there is no folder missing"),
    ],
)
def test_what_is_refused(flags: tuple[object, ...], message: str, novels_opt: Path) -> None:
    done = steady(novels_opt, *JOB, *HOW, *flags)
    assert (done.exit_code, message in done.stderr) == (2, True), done.output


def test_without_overlap(novels_opt: Path) -> None:
    done = steady(novels_opt, *JOB, *HOW, "--weights", "host=.5,disk=.5", "--no-overlap")
    assert done.exit_code == 0, done.output
    assert done.stdout.count("without overlap: copies and computing waited for each other") == 2, "in the report, and below the figures"
    done = steady(novels_opt, *JOB, *HOW, "--no-overlap", "--json")
    assert json.loads(done.stdout)["overlapping"] is False
    assert json.loads(steady(novels_opt, *JOB, *HOW, "--json").stdout)["overlapping"] is True


def test_a_whole_job_without_overlap(novels_opt: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    job = ("--num-prompts", 4, "--input-len", 24, "--output-len", 3, "--output-json", figures)
    done = CliRunner().invoke(app, ["bench", "throughput", *map(str, (novels_opt, *job, *HOW[:4])), "--no-overlap"])
    assert done.exit_code == 0, done.output
    assert "without overlap" in done.stdout
    assert json.loads(figures.read_text())["overlapping"] is False
