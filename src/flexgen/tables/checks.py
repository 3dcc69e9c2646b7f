"""Checks of a table before anything runs: columns that are missing, and columns that would be overwritten."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from flexgen.errors import OptionError
from flexgen.tables.task import Task

_MOST_NAMES = 30


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
        raise OptionError(f"{name} has no column {missing[0]!r}, which the prompt uses; there are {listed(there)}{meant}{brace}")
    taken = [column.name for column in task.columns if column.name in there]
    if taken:
        option = {task.answer_column: "answer_column", task.error_column: "error_column"}.get(taken[0])
        remedy = f"give {option} another name" if option else "rename it, or what would take its name"
        raise OptionError(f"{name} has a column {taken[0]!r} already, and it is not overwritten: {remedy}")


def listed(names: Sequence[str]) -> str:
    """Return names for a message, shortened where there are many."""
    more = f" and {len(names) - _MOST_NAMES:,} others" if len(names) > _MOST_NAMES else ""
    return ", ".join(map(repr, names[:_MOST_NAMES])) + more
