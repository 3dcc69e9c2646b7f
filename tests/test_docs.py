"""What the documents say is so: links lead somewhere, commands and options exist, versions agree, examples are valid."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from flexgen.cli.exit_codes import ExitCode
from flexgen.jobs.lines import MAX_LINE_BYTES
from flexgen.report.progress import RunReport
from flexgen.report.show import _DISPLAYS
from flexgen.report.steady import MeasuredPass, SteadyFigures
from flexgen.request import SamplingParams

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("models/**/*.md"), *ROOT.glob("benchmarks/**/*.md")])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL))
    local = [link.partition("#")[0] for link in links if "://" not in link and not link.startswith(("#", "mailto:"))]
    assert not [link for link in local if not (document.parent / link).exists()]


def test_the_index_has_every_page() -> None:
    listed = set(re.findall(r"\]\(([^)\s]+)\)", (ROOT / "docs" / "index.md").read_text()))
    assert {page.name for page in ROOT.glob("docs/*.md")} - {"index.md"} <= listed


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_blocks_are_valid(document: Path) -> None:
    for language, code in re.findall(r"```(python|json)\n(.*?)```", document.read_text(), flags=re.DOTALL):
        ast.parse(code) if language == "python" else json.loads(code)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {
        target
        for document in DOCUMENTS
        for target in re.findall(r"^\s*make ([a-z-]+)|`make ([a-z-]+)", document.read_text(), re.MULTILINE)
        for target in target
        if target
    }
    assert {"demo", "test"} <= named <= targets


def test_options_that_the_readme_names_exist(flexgen_command: Callable[..., str]) -> None:
    """Of `flexgen`, `flexgen run`, `map` and `plan`; options of pip and uv stand on lines of theirs."""
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if "pip install" not in line]
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", "\n".join(lines)))
    help_text = "".join(flexgen_command(*command, "--help") for command in ((), ("run",), ("map",), ("plan",)))
    assert not [option for option in named if option not in help_text]


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


def test_versions_agree() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == PROJECT["version"]
    headings = re.findall(r"^## \[?([^\]\s]+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert PROJECT["version"] in headings or headings[0] == "Unreleased"


def test_every_dependency_has_its_reason() -> None:
    reasons = (ROOT / "docs" / "dependencies.md").read_text()
    every = [*PROJECT["dependencies"], *(name for extra in PROJECT["optional-dependencies"].values() for name in extra)]
    names = [re.match(r"[\w-]+", requirement)[0] for requirement in every]
    assert not [name for name in names if f"**{name}**" not in reasons]


def test_constraints_lie_within_the_ranges() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pins = {name.lower().replace("_", "-"): tuple(map(int, re.findall(r"\d+", version))) for name, version in pins.items()}
    for requirement in PROJECT["dependencies"]:
        name, _, least = requirement.partition(">=")
        assert pins[name] >= tuple(map(int, least.split("."))), requirement


def test_every_metric_is_documented() -> None:
    document = (ROOT / "docs" / "metrics.md").read_text()
    fields = [field for values in (RunReport, SteadyFigures, MeasuredPass) for field in dataclasses.fields(values)]
    assert not [field.name for field in fields if f"`{field.name}`" not in document]


def test_every_exit_code_is_documented() -> None:
    for name in ("jobs.md", "tables.md"):
        rows = re.findall(r"^\| ([\d, ]+) \|", (ROOT / "docs" / name).read_text(), flags=re.MULTILINE)
        codes = {int(code) for row in rows for code in row.split(", ")}
        assert codes == set(ExitCode) - (set() if name == "jobs.md" else {ExitCode.BUG}), name


def test_every_form_of_progress_is_documented() -> None:
    document = (ROOT / "docs" / "jobs.md").read_text()
    assert not [name for name in ("auto", *_DISPLAYS) if f"| `{name}` |" not in document]


def test_the_longest_line_is_documented() -> None:
    assert f"A line has at most {MAX_LINE_BYTES >> 20} MiB" in (ROOT / "docs" / "requests.md").read_text()


def test_example_requests_are_valid() -> None:
    lines = [json.loads(line) for line in (ROOT / "examples" / "requests.jsonl").read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines) == 48
    for line in lines:
        params = SamplingParams(**{name: value for name, value in line.items() if name not in ("id", "prompt")})
        assert line["prompt"]
        assert params.temperature == 0


def test_generate_example_is_short() -> None:
    assert len((ROOT / "examples" / "generate.py").read_text().splitlines()) <= 40
