"""The lines that ask for the answers of rows: a prompt, or messages where the model takes conversations, after labelled examples."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexgen.errors import OptionError, RequestError
from flexgen.tables.columns import Kind
from flexgen.tables.task import Task
from flexgen.tables.values import text_of, unicode_text

_BETWEEN = "\n\n"  # between the instruction, the examples and the row of a prompt that is text
_WANTS_SPACE = re.compile(r"[A-Za-z0-9:.,;?!)]\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shot:
    """A labelled example.

    Attributes:
        prompt: The prompt, as for a row.
        answer: The answer to it.
    """

    prompt: str
    answer: str


class Prompts:
    """Writes the lines of a job for rows of a table.

    Args:
        task: What is asked of each row.
        shots: Labelled examples, which come before each row.
        chat: Whether the lines are conversations.

    Attributes:
        columns: The names of the columns that prompts use, in alphabetical order.
    """

    def __init__(self, task: Task, shots: Sequence[Shot] = (), *, chat: bool = False) -> None:
        self._task, self._chat = task, chat
        self._prompt, *rest = task.templates
        self._system = rest[0] if rest else None
        self.columns = sorted(self._prompt.columns.union(*(each.columns for each in rest)))
        self._shots = "".join(f"{each.prompt}{_seam(each.prompt)}{each.answer}{_BETWEEN}" for each in shots)
        turns = (({"role": "user", "content": each.prompt}, {"role": "assistant", "content": each.answer}) for each in shots)
        self._turns = [message for turn in turns for message in turn]
        self._several_lines = any("\n" in each.answer.strip() for each in shots)

    @property
    def default_stop(self) -> tuple[str, ...]:
        """The texts that end a generated answer where the user names none.

        A prompt that is text is answered by the rest of its line, or up to an empty line if the examples have longer answers.
        """
        if self._chat or self._task.choices or self._task.constraint:
            return ()
        return (_BETWEEN,) if self._several_lines else ("\n",)

    def line(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the line for a row, without an id.

        Raises:
            RequestError: The row lacks a column, a template fails on it, or the prompt is not Unicode.
        """
        system = unicode_text(self._system.render(row), "the instruction") if self._system is not None else None
        prompt = unicode_text(self._prompt.render(row), "the prompt")
        if self._chat:
            first = [{"role": "system", "content": system}] if system is not None else []
            return {"messages": [*first, *self._turns, {"role": "user", "content": prompt}], **self._answer("")}
        instruction = system + _BETWEEN if system is not None else ""
        return {"prompt": instruction + self._shots + prompt, **self._answer(_seam(prompt))}

    def _answer(self, seam: str) -> dict[str, Any]:
        """Return the fields of a line that say what may be answered; `seam` stands before it."""
        choices = [each if each[0].isspace() else seam + each for each in self._task.choices]
        return {"choices": choices} if choices else self._task.constraint

    def fault(self, row: Mapping[str, Any]) -> str | None:
        """Return why there is no line for a row; None if there is one."""
        try:
            self.line(row)
        except RequestError as error:
            return str(error)
        return None


def takes_messages(asked: bool | None, chat_template: str | None) -> bool:
    """Return whether prompts are messages: as asked, otherwise where the model has a chat template.

    Raises:
        OptionError: They should be, and the model has no template.
    """
    if asked and chat_template is None:
        raise OptionError(
            "chat: the model has no chat template and is probably not a chat model: give one (--chat-template, chat_template)"
        )
    return chat_template is not None if asked is None else asked


def _seam(prompt: str) -> str:
    """Return what stands between a prompt and its answer: a space, where a text in Latin letters would have one."""
    return " " if _WANTS_SPACE.search(prompt) else ""


def read_shots(task: Task, rows: Iterable[Mapping[str, Any]], *, name: str = "examples") -> list[Shot]:
    """Make examples of the rows of a table that has the columns of the prompt and those of the answer.

    Args:
        task: What is asked of each row.
        rows: The rows.
        name: The name of the option that has them, for messages.

    Raises:
        OptionError: A row lacks a column, or its answer is empty or not one of the choices; the message has its number.
    """
    shots: list[Shot] = []
    template = task.templates[0]
    for number, row in enumerate(rows, start=1):
        try:
            prompt, answer = template.render(row), _answer_of(task, row)
            shots.append(Shot(prompt=unicode_text(prompt, "the prompt"), answer=unicode_text(answer, "the answer")))
        except RequestError as error:
            raise OptionError(f"{name}: row {number}: {error}") from error
    return shots


def _answer_of(task: Task, row: Mapping[str, Any]) -> str:
    """Return the answer of an example; an answer with a schema may stand in the columns of its properties."""
    if task.properties and task.answer_column not in row:
        return text_of({column.name: _typed(row, column.name, column.kind) for column in task.columns if column.name in task.properties})
    if task.answer_column not in row:
        raise RequestError(f"there is no column {task.answer_column!r} with the answer; there are {', '.join(row)}")
    answer = text_of(row[task.answer_column]).strip()
    if not answer:
        raise RequestError(f"the column {task.answer_column!r} with the answer is empty")
    if task.choices and answer not in [each.strip() for each in task.choices]:
        raise RequestError(f"the answer {answer!r} is not one of the choices {', '.join(task.choices)}")
    return answer


def _typed(row: Mapping[str, Any], name: str, kind: Kind) -> Any:
    """Return the value of a property, which a table of text holds as text."""
    if name not in row:
        raise RequestError(f"there is neither a column with the answer nor one with its property {name!r}")
    value = row[name]
    if not isinstance(value, str) or kind is Kind.TEXT:
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise RequestError(f"the column {name!r} holds {value[:60]!r}, and the schema wants {kind}") from error
