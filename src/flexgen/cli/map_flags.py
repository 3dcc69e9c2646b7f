"""The flags of `flexgen map`, and the task that they describe."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexgen.cli.options import is_there
from flexgen.cli.run_flags import AGAIN, RunFlags, check_job
from flexgen.errors import JobError, OptionError, StorageError

if TYPE_CHECKING:
    from flexgen.tables.batch import Table
    from flexgen.tables.prompts import Shot
    from flexgen.tables.task import Task

_prompt = partial(typer.Option, rich_help_panel="Prompt (\\n is a line feed)")
_answer = partial(typer.Option, rich_help_panel="Answer")
_table = partial(typer.Option, rich_help_panel="Table")
_FORMATS = "csv|tsv|parquet|jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class MapFlags(RunFlags):
    """The flags that `flexgen map` shares with `flexgen run`, some with another meaning."""

    source: Annotated[Path | None, typer.Argument(metavar="TABLE", help="A table: .csv, .tsv, .parquet or .jsonl.")]
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUTPUT", help="The table with the answers; its ending says the format.")
    ]
    temperature: Annotated[float | None, _answer(metavar="T", help="Of generated answers; 0 is greedy.")] = 0.0
    top_p: Annotated[float | None, _answer(metavar="P", help="Of generated answers. Default: the model's generation_config, or 1.")] = None
    strict: Annotated[bool, typer.Option("--strict", help="Refuse a table with rows that cannot be answered.", rich_help_panel=AGAIN)] = (
        False
    )
    keep_going: Annotated[
        bool,
        typer.Option("--keep-going", help="Go on though rows have no prompt, or the first 100 all fail alike.", rich_help_panel=AGAIN),
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFlags:
    """The flags that say what is asked of each row, and how tables are read and written."""

    prompt: Annotated[str, _prompt(metavar="TEXT", help="The prompt, with {name} for a column's value; {{ and }} are braces.")]
    system: Annotated[
        str | None, _prompt(metavar="TEXT", help="An instruction: the system message of a chat, the beginning of other prompts.")
    ] = None
    examples: Annotated[Path | None, _prompt(metavar="FILE", help="A table of labelled examples, with the column of the answer too.")] = (
        None
    )
    template: Annotated[
        str, _prompt(metavar="auto|braces|jinja", help="Language of prompts; auto is Jinja where {{ or {% has a space after it.")
    ] = "auto"
    chat: Annotated[
        bool | None, _prompt("--chat/--no-chat", help="Send messages, or text. Default: messages where the model has a chat template.")
    ] = None
    choices: Annotated[
        list[str] | None,
        _answer(metavar="A,B,C", help="The possible answers; the likeliest is taken. Double quotes go around commas: '\"Yes, sir\",No'."),
    ] = None
    choice: Annotated[list[str] | None, _answer(metavar="TEXT", help="A possible answer, as it stands; may be repeated.")] = None
    probabilities: Annotated[bool, _answer("--probabilities", help="Add a column with the probability of each choice.")] = False
    schema: Annotated[Path | None, _answer(metavar="FILE", help="A JSON schema of the answer; its properties become columns.")] = None
    raw: Annotated[bool, _answer("--raw", help="Keep the text of the answer beside the columns of --schema.")] = False
    regex: Annotated[str | None, _answer(metavar="PATTERN", help="A regular expression that the whole answer matches.")] = None
    max_tokens: Annotated[int | None, _answer(metavar="N", min=1, help="Longest generated answer. Default: 128.")] = None
    stop: Annotated[
        list[str] | None,
        _answer(metavar="TEXT", help="Ends a generated answer; may be repeated, '' is none. Default: the end of the line, none in chats."),
    ] = None
    answer_column: Annotated[str, _table(metavar="NAME", help="The column of the answer.")] = "answer"
    error_column: Annotated[str, _table(metavar="NAME", help="The column that says why a row has no answer.")] = "error"
    table_format: Annotated[str | None, _table("--format", metavar=_FORMATS, help="Format of TABLE. Default: by its ending.")] = None
    output_format: Annotated[str | None, _table(metavar=_FORMATS, help="Format of OUTPUT. Default: by its ending.")] = None

    @property
    def stops(self) -> tuple[str, ...] | None:
        """The texts that end an answer; None where the user names none."""
        return None if not self.stop else tuple(_text(each) for each in self.stop if each)

    def task(self) -> Task:
        """Return the task.

        Raises:
            OptionError: Flags contradict each other, or a file cannot be used.
        """
        from flexgen.tables.task import Task

        if self.choices and self.choice:
            raise OptionError("--choices and --choice both name the possible answers: give one of them")
        listed = [each for given in self.choices for each in _listed(given)] if self.choices else self.choice
        return Task(
            prompt=_text(self.prompt), system=None if self.system is None else _text(self.system), template=self.template,
            choices=tuple(listed or ()), schema=_schema(self.schema), regex=self.regex, probabilities=self.probabilities, raw=self.raw,
            answer_column=self.answer_column, error_column=self.error_column,
        )  # fmt: skip

    def shots(self, task: Task) -> list[Shot]:
        """Return the examples.

        Raises:
            OptionError: The file of examples is not a table with the columns and the answers that are needed.
        """
        from flexgen.tables.formats import format_of, open_table
        from flexgen.tables.prompts import read_shots

        if self.examples is None:
            return []
        _check_file(self.examples, "--examples")
        name = f"--examples {self.examples}"
        try:
            table = open_table(self.examples, format_of(self.examples, "--examples", may_be_compressed=True))
            shots = read_shots(task, (row for batch in table.batches() for row in batch.rows()), name=name)
        except (JobError, StorageError) as error:
            raise OptionError(f"--examples {error}") from error
        if not shots:
            raise OptionError(f"{name}: it has no rows: give at least one example, or leave it out")
        return shots


def check_map(flags: MapFlags, asked: TaskFlags) -> Path:
    """Check paths and combinations of flags, and return the path of the table.

    Raises:
        OptionError: A path cannot be used, or flags contradict each other.
        StorageError: The output cannot be written.
    """
    if flags.source is None:
        raise OptionError("TABLE is read several times: give a file in place of -")
    if not is_there(flags.source, "TABLE", Path.is_file):
        swapped = "; MODEL is a file, and the model comes first: flexgen map MODEL TABLE" if Path(flags.model).is_file() else ""
        if flags.source.exists() and not flags.source.is_dir():
            raise OptionError(f"TABLE {flags.source} is read several times: give a file in place of a pipe or device")
        what = "this is a folder" if flags.source.is_dir() else "there is no such file"
        raise OptionError(f"TABLE {flags.source}: {what}{swapped}")
    if flags.output is None:
        raise OptionError("OUTPUT is a file: give a name in place of -")
    if asked.choices or asked.choice:
        generating = {"--max-tokens": asked.max_tokens, "--stop": asked.stop, "--temperature": flags.temperature, "--top-p": flags.top_p}
        if given := next((name for name, value in generating.items() if value), None):
            raise OptionError(f"{given} is for answers that are generated, and choices are scored: leave it out")
    check_job(flags)
    return flags.source


def open_source(path: Path, flags: TaskFlags) -> tuple[Table, str]:
    """Open the table, and return it with the name of its format."""
    from flexgen.tables.formats import format_of, open_table

    form = flags.table_format or format_of(path, "TABLE", may_be_compressed=True)
    return open_table(path, form), form


@contextmanager
def naming_flags() -> Iterator[None]:
    """Write options of `LLM.map` as flags in the messages of errors."""
    try:
        yield
    except OptionError as error:
        said = re.sub(r"\b(answer|error)_column\b", r"--\1-column", str(error))
        said = re.sub(r"^(schema|regex|prompt|system)(?=:)", r"--\1", said)
        raise OptionError(said) from error


def _text(given: str) -> str:
    """Return a text of the command line, where shells make it hard to write a line feed: `\\n` is one, `\\\\n` is a backslash and an n."""
    return re.sub(r"\\(\\?)n", lambda found: "\\n" if found[1] else "\n", given)


def _listed(given: str) -> list[str]:
    """Return the items of a list between commas, as CSV has them: one in double quotes may have commas in it, `""` there is a quote.

    Raises:
        OptionError: Quotes do not end, or stand before the end of an item.
    """
    try:
        (items,) = csv.reader([given.strip()], skipinitialspace=True, strict=True)
    except (csv.Error, ValueError) as error:
        what = "double quotes go around a whole choice, as in '\"Yes, sir\",No'"
        raise OptionError(f"--choices {given!r}: {what}; --choice takes one as it stands, once for each") from error
    return [each.rstrip() for each in items or [""]]  # a space at the beginning of a quoted one belongs to it


def _schema(path: Path | None) -> dict[str, Any] | None:
    from flexgen.base.from_json import parsed_json

    if path is None:
        return None
    _check_file(path, "--schema")
    try:
        schema = parsed_json(path.read_text(encoding="utf-8-sig"), f"--schema {path}")
    except OSError as error:
        raise OptionError(f"--schema {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"--schema {path}: it is not UTF-8 (0x{error.object[error.start]:02x} at byte {error.start:,})") from error
    if not isinstance(schema, dict):
        raise OptionError(f"--schema {path}: a JSON schema is an object")
    return schema


def _check_file(path: Path, flag: str) -> None:
    if not is_there(path, flag, Path.is_file):
        raise OptionError(f"{flag} {path}: {'this is a folder' if path.is_dir() else 'there is no such file'}")
