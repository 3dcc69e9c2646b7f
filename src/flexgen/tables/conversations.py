"""The lines that ask for the answers of rows whose prompts are conversations in a column."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from flexgen.errors import OptionError, RequestError
from flexgen.tables.prompts import Prompts, Shot, takes_messages
from flexgen.tables.task import Task
from flexgen.tables.values import text_of, unicode_text


class Lines(Protocol):
    """Writes the lines of rows.

    Attributes:
        columns: The names of the columns that lines use.
    """

    columns: list[str]

    @property
    def default_stop(self) -> tuple[str, ...]:
        """The texts that end a generated answer where the user names none."""
        ...

    def line(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the line for a row, without an id.

        Raises:
            RequestError: The row has no prompt.
        """
        ...


class Conversations:
    """Writes lines of conversations that stand in a column: lists of messages with role and content, or such lists as JSON text.

    Args:
        task: What is asked of each row; it names the column.

    Attributes:
        columns: The name of the column.
    """

    def __init__(self, task: Task) -> None:
        assert task.messages is not None
        self._column, self._task = task.messages, task
        self.columns = [task.messages]

    @property
    def default_stop(self) -> tuple[str, ...]:
        """Nothing: the model ends its turn itself."""
        return ()

    def line(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the line for a row, without an id.

        Raises:
            RequestError: There is no conversation in the column.
        """
        given = row.get(self._column)
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except (ValueError, RecursionError) as error:
                raise self._fault(f"text that is not JSON ({error})") from error
        if not isinstance(given, (list, tuple)) or not given:
            raise self._fault("nothing" if given is None else f"{text_of(given)[:60]!r}")
        unicode_text(text_of(given), "the conversation")
        answer = {"choices": list(self._task.choices)} if self._task.choices else self._task.constraint
        return {"messages": list(given), **answer}

    def _fault(self, found: str) -> RequestError:
        wanted = "a conversation is a list of messages with role and content, or such a list as JSON"
        return RequestError(f"the column {self._column!r} holds {found}: {wanted}", code="invalid_row", param=self._column)


def lines_of(task: Task, shots: Sequence[Shot], *, chat: bool | None, chat_template: str | None) -> Lines:
    """Return what writes the lines of a task.

    Args:
        task: What is asked of each row.
        shots: Labelled examples.
        chat: Whether prompts are messages; None for messages where the model has a chat template.
        chat_template: The model's chat template, if it has one.

    Raises:
        OptionError: The model takes no messages and they are asked for, or the arguments contradict each other.
    """
    if task.messages is None:
        return Prompts(task, shots, chat=takes_messages(chat, chat_template))
    if chat is False:
        raise OptionError("chat: conversations of a column are messages: leave it out")
    takes_messages(True, chat_template)
    return Conversations(task)
