"""Checks before anything runs: columns that are missing or would be overwritten, and what no row could be answered by."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Sequence
from typing import Protocol

from flexgen.base.quantities import counted
from flexgen.base.structured import StructuredOutputsParams
from flexgen.errors import OptionError, RequestError
from flexgen.request import SamplingParams, TokenRequest
from flexgen.tables.prompts import Shot
from flexgen.tables.task import Task

_MOST_NAMES = 30
_ANY_PROMPT = (0,)  # one token, which every vocabulary has


class ConstrainedModel(Protocol):
    """A model whose answers can be kept to constraints.  The members are those of `ServedModel`."""

    def token_requests(self, index: int, prompt_token_ids: Sequence[int], params: SamplingParams) -> list[TokenRequest]:
        """Return the engine's requests for a prompt."""
        ...

    def accepts(self, constraint: StructuredOutputsParams, answer: str) -> bool:
        """Return whether a text is a whole answer that a constraint allows."""
        ...


def check_columns(task: Task, needed: Sequence[str], there: Sequence[str], name: str) -> None:
    """Check that a table has the columns that prompts use, and none of those that answers become.

    Args:
        task: What is asked of each row.
        needed: The columns that prompts use.
        there: The columns of the table.
        name: The name of the table, for messages.

    Raises:
        OptionError: A column is missing or would be overwritten; the message names it.
    """
    missing = [each for each in needed if each not in there]
    if missing:
        close = difflib.get_close_matches(missing[0], there, n=1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        brace = "; {{ and }} are braces" if any(sign in missing[0] for sign in '":\n') else ""
        if (whole := re.split(r"[.\[]", missing[0])[0]) in there:
            meant = f"; a part of {whole!r} is written in Jinja: {{{{ {missing[0]} }}}}"
        raise OptionError(f"{name} has no column {missing[0]!r}, which the prompt uses; there are {listed(there)}{meant}{brace}")
    taken = [column.name for column in task.columns if column.name in there]
    if taken:
        option = {task.answer_column: "answer_column", task.error_column: "error_column"}.get(taken[0])
        remedy = f"give {option} another name" if option else "rename it, or what would take its name"
        raise OptionError(f"{name} has a column {taken[0]!r} already, and it is not overwritten: {remedy}")


def listed(names: Sequence[str]) -> str:
    """Return names for a message, shortened where there are many."""
    more = f" and {counted(len(names) - _MOST_NAMES, 'other')}" if len(names) > _MOST_NAMES else ""
    return ", ".join(map(repr, names[:_MOST_NAMES])) + more


def check_constraint(model: ConstrainedModel, task: Task, params: SamplingParams) -> None:
    """Check that answers can be kept to the schema or the pattern of a task.

    Args:
        model: The model.
        task: What is asked of each row.
        params: The sampling parameters of all rows, with the constraint.

    Raises:
        OptionError: They cannot; the message names the option.
    """
    try:
        model.token_requests(0, _ANY_PROMPT, params)
    except RequestError as error:
        if error.param != "structured_outputs":
            return  # what has to do with the prompt or another parameter is an error of each row
        said = str(error).removeprefix("structured_outputs: ")
        raise OptionError(f"{'regex' if task.schema is None else 'schema'}: {said}") from error


def matching(model: ConstrainedModel, task: Task) -> Callable[[str], bool] | None:
    """Return what says whether a text as a whole matches the pattern of a task; None if the task has none."""
    if task.regex is None:
        return None
    constraint = StructuredOutputsParams(regex=task.regex)
    return lambda text: model.accepts(constraint, text)


def check_shots(model: ConstrainedModel, task: Task, shots: Sequence[Shot], params: SamplingParams, *, name: str = "examples") -> None:
    """Check that the answers of examples are such as the schema or the pattern of a task allows.

    Args:
        model: The model.
        task: What is asked of each row.
        shots: The examples, one for each row of their table.
        params: The sampling parameters of all rows, with the constraint.
        name: The name of the option that has the examples, for messages.

    Raises:
        OptionError: An answer is not; the message has the number of its row.
    """
    constraint = params.structured_outputs
    if not isinstance(constraint, StructuredOutputsParams):
        return
    for number, shot in enumerate(shots, start=1):
        text = shot.answer if task.schema is None else _compact(shot.answer)
        if text is None or not model.accepts(constraint, text):
            kept = f"match {task.regex!r}" if task.schema is None else "follow the schema, with properties in its order"
            raise OptionError(f"{name}: row {number}: the answer {shot.answer[:80]!r} does not {kept}")


def _compact(answer: str) -> str | None:
    """Return a JSON text without white space between its tokens; None if it is not JSON."""
    try:
        return json.dumps(json.loads(answer), ensure_ascii=False, separators=(",", ":"))
    except (ValueError, RecursionError):
        return None
