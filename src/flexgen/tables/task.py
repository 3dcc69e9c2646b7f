"""What is asked of every row of a table: the prompt, what may be answered, and the names of the columns that answers become."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from flexgen.base.from_json import dataclass_from_json
from flexgen.errors import OptionError
from flexgen.tables.columns import Column, Kind, kind_of
from flexgen.tables.template import Template, make_template
from flexgen.tables.values import surrogate_fault

DEFAULT_MAX_TOKENS = 128
COUNTS = ("prompt_tokens", "completion_tokens")  # of the usage of a record
_TEXTS = ("prompt", "messages", "system", "regex", "answer_column", "error_column")
# What jobs that were begun before these fields were there have in their place.
_LATER: dict[str, Any] = {"messages": None, "finish_reason": False, "token_counts": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is asked of every row.

    Attributes:
        prompt: The template of the prompt; empty where `messages` is given.
        messages: The name of a column of conversations that are answered as they stand; None where prompts are written by the template.
        system: The template of the instruction before it; None for none.
        template: The language of both templates, see `make_template`.
        choices: The answers to choose from, which are scored; empty where the answer is generated.
        schema: The JSON schema of the answer; None where the answer is text.
        regex: The regular expression that the answer matches as a whole; None for any text.
        probabilities: Whether each choice gets a column with its probability.
        raw: Whether an answer with a schema also gets a column with its text.
        finish_reason: Whether there is a column that says why a generated answer ended.
        token_counts: Whether there are columns with the numbers of tokens of the prompt and of the answer.
        answer_column: The name of the column with the answer.
        error_column: The name of the column with the reason why a row has no answer.

    Raises:
        OptionError: The values contradict each other, or a template is not valid.
    """

    prompt: str = ""
    messages: str | None = None
    system: str | None = None
    template: str = "auto"
    choices: tuple[str, ...] = ()
    schema: dict[str, Any] | None = None
    regex: str | None = None
    probabilities: bool = False
    raw: bool = False
    finish_reason: bool = False
    token_counts: bool = False
    answer_column: str = "answer"
    error_column: str = "error"

    def __post_init__(self) -> None:
        given = [name for name, value in (("choices", self.choices), ("schema", self.schema), ("regex", self.regex)) if value]
        if len(given) > 1:
            raise OptionError(f"{given[0]} and {given[1]} both say what may be answered: give one of them")
        for name in ("answer_column", "error_column"):
            if not getattr(self, name).strip():
                raise OptionError(f"{name} must be a name, not {getattr(self, name)!r}")
        self._check_texts()
        if not all(each.strip() for each in self.choices):
            raise OptionError("choices: one of them is empty")
        if len({each.strip() for each in self.choices}) < len(self.choices):
            raise OptionError(f"choices: one of them is there twice: {', '.join(self.choices)}")
        if self.probabilities and not self.choices:
            raise OptionError("probabilities are those of choices, and there are none: give choices")
        if self.raw and self.schema is None:
            raise OptionError("raw keeps the text beside the values of a schema, and there is none: leave it out")
        if self.finish_reason and self.choices:
            raise OptionError("finish_reason is that of generated answers, and choices are scored: leave it out")
        self._check_asked()
        names = [column.name for column in self.columns]
        if twice := [name for place, name in enumerate(names) if name in names[:place]]:
            raise OptionError(f"two columns of the result would be called {twice[0]!r}: give answer_column or error_column another name")

    def _check_asked(self) -> None:
        """Check that each row has a prompt of its own: a template that names a column, or a column of conversations."""
        if self.messages is not None:
            if not self.messages:
                raise OptionError("messages must be the name of a column")
            if self.prompt:
                raise OptionError("prompt and messages both say what is asked: give one of them")
            if self.system is not None:
                raise OptionError("system: conversations of a column have system messages of their own: leave it out")
        elif not any(each.columns for each in self.templates):
            how = "write {name} where its value belongs, or {{ name }} for Jinja"
            raise OptionError(f"prompt: {self.prompt[:80]!r} names no column: {how}")

    def _check_texts(self) -> None:
        """Refuse texts that are not Unicode, as a command line has them that was written in another encoding than the locale's."""
        fields = {name: [getattr(self, name) or ""] for name in _TEXTS}
        for name, texts in {**fields, "choices": self.choices, "schema": self.properties}.items():
            if fault := next(filter(None, (surrogate_fault(each) for each in texts if isinstance(each, str))), None):
                raise OptionError(f"{name}: it has {fault}")

    @property
    def templates(self) -> list[Template]:
        """The compiled templates: that of the prompt, then that of the instruction if there is one; none where there are conversations."""
        if self.messages is not None:
            return []
        texts = {"prompt": self.prompt} if self.system is None else {"prompt": self.prompt, "system": self.system}
        return [make_template(text, self.template, what=what) for what, text in texts.items()]

    @property
    def columns(self) -> list[Column]:
        """The columns that answers become, in order."""
        own = Column(name=self.answer_column, kind=Kind.TEXT)
        answer = [own]
        if self.schema is not None:
            properties = [Column(name=name, kind=kind_of(schema)) for name, schema in self.properties.items()]
            answer = [own] * self.raw + properties if properties else [Column(name=self.answer_column, kind=Kind.JSON)]
        scores = [Column(name=f"{self.answer_column}_{each.strip()}", kind=Kind.NUMBER) for each in self.choices if self.probabilities]
        return [*answer, *scores, *self.details, Column(name=self.error_column, kind=Kind.TEXT)]

    @property
    def details(self) -> list[Column]:
        """The columns that say how an answer came about."""
        reason = [Column(name=f"{self.answer_column}_finish_reason", kind=Kind.TEXT)] * self.finish_reason
        counts = [Column(name=f"{self.answer_column}_{each}", kind=Kind.INTEGER) for each in COUNTS if self.token_counts]
        return [*reason, *counts]

    @property
    def properties(self) -> dict[str, Any]:
        """The schemas of the properties of an answer that is an object, by name; empty for any other answer."""
        found = (self.schema or {}).get("properties")
        return dict(found) if isinstance(found, dict) else {}

    @property
    def constraint(self) -> dict[str, Any]:
        """The fields of a line that say what may be generated."""
        if self.schema is not None:
            return {"structured_outputs": {"json": self.schema}}
        return {"structured_outputs": {"regex": self.regex}} if self.regex is not None else {}

    def to_json(self) -> dict[str, Any]:
        """Return the task as a JSON object."""
        return {**dataclasses.asdict(self), "choices": list(self.choices)}

    @classmethod
    def from_json(cls, value: Any) -> Task:
        """Return the task that `to_json` has written."""
        known = {**_LATER, **value} if isinstance(value, dict) else value
        return dataclass_from_json(cls, known, "the task of the table")
