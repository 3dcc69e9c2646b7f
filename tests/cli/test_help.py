"""The help of every command: nothing is cut at any width, flags take no value, examples and pages exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup
from typer.testing import CliRunner

from flexgen.cli import app
from flexgen.cli.help import EXAMPLES, PAGES

ROOT = Path(__file__).parents[2]


def commands(command: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(words after `flexgen`, click's command) of the command itself and of every command below it."""
    command = command or typer.main.get_command(app)
    yield path, command
    if isinstance(command, TyperGroup):
        for name, below in command.commands.items():
            yield from commands(below, (*path, name))


EVERY = dict(commands())


def help_of(path: tuple[str, ...], columns: int) -> str:
    """As on a terminal of that width (CliRunner has always 80 columns)."""
    context = None
    for length in range(len(path) + 1):
        command = EVERY[path[:length]]
        name = path[length - 1] if length else "flexgen"
        context = command.make_context(name, [], parent=context, resilient_parsing=True, terminal_width=columns)
    return re.sub(r"\x1b\[\d+m", "", EVERY[path].get_help(context))


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("path", EVERY, ids=" ".join)
def test_no_name_is_cut_and_no_flag_takes_a_value(path: tuple[str, ...], columns: int) -> None:
    text = help_of(path, columns)
    shown = [re.match(r"  (-.*?)(  |$)", line) for line in text.splitlines()]
    told = {name: cell[1] for cell in shown if cell for name in cell[1].replace(",", "").split() if name.startswith("-")}
    for param in EVERY[path].params:
        if param.param_type_name == "option" and not param.hidden:
            names = [*param.opts, *param.secondary_opts]
            assert set(names) <= set(told)
            assert (len(told[names[0]].split()) == len(names)) == param.is_flag  # a value has a name, a flag has no value
    assert {"-h", "--help"} <= set(told)
    assert "<bool>" not in text
    assert "…" not in text
    prose = text[: text.index("\nExamples:")].splitlines()
    assert not [line for line in prose if len(line) > columns and not line.endswith(":")]


@pytest.mark.parametrize("path", EVERY, ids=" ".join)
def test_h_is_help(path: tuple[str, ...]) -> None:
    short, long = (CliRunner().invoke(app, [*path, flag]) for flag in ("-h", "--help"))
    assert (short.exit_code, short.stdout) == (0, long.stdout)
    assert "Examples:" in short.stdout


def test_help_is_shown_where_a_command_is_missing() -> None:
    for path in ([], ["bench"]):
        assert "Commands:" in CliRunner().invoke(app, path).output


def test_the_usage_names_what_is_needed() -> None:
    assert help_of(("run",), 80).startswith("Usage: flexgen run [OPTIONS] MODEL INPUT -o OUTPUT\n") or "-o OUTPUT\n" in help_of(
        ("run",), 80
    )
    assert "[DIR]" in help_of(("profile",), 80).splitlines()[0]


def test_models_are_what_each_command_takes() -> None:
    takes_gguf = {path[-1]: "not a GGUF file" not in help_of(path, 120) for path in EVERY if "MODEL" in help_of(path, 120).splitlines()[0]}
    assert takes_gguf == {name: name != "convert" for name in takes_gguf}
    assert {"run", "plan", "convert", "map", "throughput", "perplexity"} <= set(takes_gguf)


def test_shells_can_complete() -> None:
    assert {"--install-completion", "--show-completion"} <= {option for param in EVERY[()].params for option in param.opts}


def test_every_command_has_examples_that_parse_and_pages_that_exist() -> None:
    names = {path[-1] if path else "flexgen" for path in EVERY}
    assert set(EXAMPLES) == set(PAGES) == names
    for typed, _ in (example for examples in EXAMPLES.values() for example in examples):
        assert len(typed) <= 76
        words = shlex.split(typed.partition("|")[0])[1:]
        path = tuple(words[: 2 if words[0] in ("bench", "cache", "eval") else 1])
        EVERY[path].make_context(path[-1], [str(ROOT) if word.startswith("/") else word for word in words[len(path) :]])
    assert not [page for pages in PAGES.values() for page in pages if not (ROOT / page).is_file()]
