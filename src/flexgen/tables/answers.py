"""Reads the records of lines as the values of the columns that answers become."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from flexgen.tables.columns import fitted
from flexgen.tables.task import COUNTS, Task
from flexgen.tables.values import escaped, surrogate_fault

NOT_ANSWERED = "not answered yet"
_MORE_TOKENS = "more tokens may help"


class Answers:
    """Reads records, flat ones (docs/requests.md), as values by column.

    Args:
        task: What is asked of each row.
        matches: Says whether a text as a whole matches the pattern of the task; None where it has none, or where the records that do not
            match have their error already.

    Attributes:
        num_errors: The number of rows that have a reason in the column of errors.
        num_unanswered: The number of rows that have no record yet.
        num_cut: The number of answers that were cut because they reached the most tokens.
    """

    def __init__(self, task: Task, matches: Callable[[str], bool] | None = None) -> None:
        self._task, self._matches = task, matches
        self._columns = task.columns
        self.num_errors = self.num_unanswered = self.num_cut = 0

    def values(self, record: Mapping[str, Any] | None, fault: str | None = None) -> dict[str, Any]:
        """Return the values of a row.

        Args:
            record: The record of its line; None where the line has none yet.
            fault: The reason why the row had no prompt, which says more than the record of its line.
        """
        found: dict[str, Any] = {column.name: None for column in self._columns}
        if record is None:
            self.num_unanswered += 1
            return {**found, self._task.error_column: NOT_ANSWERED}
        error = (fault or record["error"]["message"]) if "error" in record else None
        if "text" in record:  # which may also stand beside an error that `fault` has found
            self.num_cut += record.get("finish_reason") == "length"
            answer, reason = self._read(record)
            found |= answer | self._details(record)
            error = error or reason
        self.num_errors += error is not None
        return {**found, self._task.error_column: None if error is None else escaped(error)}

    def _details(self, record: Mapping[str, Any]) -> dict[str, Any]:
        task = self._task
        told = (record.get("finish_reason"),) * task.finish_reason
        counts = tuple(record["usage"][each] for each in COUNTS if task.token_counts)
        return {column.name: value for column, value in zip(task.details, (*told, *counts), strict=True)}

    def fault(self, record: Mapping[str, Any]) -> str | None:
        """Return why the answer in a record is not what was asked for; None if it is."""
        return self._read(record)[1]

    def _read(self, record: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
        """Return the values of an answer, and why some of them are missing."""
        task = self._task
        if task.choices:
            return self._scores(record["labels"], record["text"]), None
        text, cut = (record["text"] or "").strip(), record.get("finish_reason") == "length"
        if task.schema is None:
            if "error" in record:
                return {}, None
            if cut and self._matches is not None and not self._matches(record["text"] or ""):
                return {}, f"the answer was cut before it matched the pattern: {_MORE_TOKENS}"
            return {task.answer_column: text}, None
        raw = {task.answer_column: text} if task.raw else {}
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError) as error:
            return raw, f"the answer is not JSON ({error})" + f", and it was cut: {_MORE_TOKENS}" * cut
        if "\\u" in text and (fault := surrogate_fault(json.dumps(answer, ensure_ascii=False))):
            return raw, f"the answer has {fault}"
        if not task.properties:
            return {task.answer_column: answer}, None
        if not isinstance(answer, dict):
            return raw, f"the answer is not a JSON object but {text[:60]}"
        values, error = self._properties(answer)
        return raw | values, error

    def _scores(self, labels: list[Mapping[str, Any]], best: str) -> dict[str, Any]:
        task = self._task
        found: dict[str, Any] = {}
        for choice, label in zip(task.choices, labels, strict=True):
            if label["text"] == best:
                found[task.answer_column] = choice.strip()
            if task.probabilities:
                found[f"{task.answer_column}_{choice.strip()}"] = label["probability"]
        return found

    def _properties(self, answer: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
        values: dict[str, Any] = {}
        error: str | None = None
        for column in self._columns:
            if column.name in self._task.properties:
                try:
                    values[column.name] = fitted(column.kind, answer.get(column.name))
                except ValueError as reason:
                    error = error or f"{column.name}: {reason}"
        return values, error
