"""What all forms of lines have in common: a request, an answer, where it came from, and how a form turns one line into another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from flexgen.base.scalars import as_int
from flexgen.chat import Chat
from flexgen.errors import RequestError
from flexgen.request import CompletionOutput, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """What a line asks for.

    Attributes:
        states_max_tokens: the line itself says how long its answer may be, so that it is never cut silently.
        return_token_ids: the answer shows ids beside its text (vLLM's field).
        model: the model that the line names, if any.
        ignored: fields that the line gives and that change nothing here.
    """

    prompt: str | tuple[int, ...] | Chat
    params: SamplingParams
    states_max_tokens: bool
    return_token_ids: bool
    model: str | None
    ignored: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a form makes a record of.

    Attributes:
        completions: the n choices, in order.
        params: how they were asked for.
        shows_ids: whether the record has the ids.
        has_text: False where the model has no tokenizer.
    """

    num_prompt_tokens: int
    completions: list[CompletionOutput]
    params: SamplingParams
    shows_ids: bool
    has_text: bool

    @property
    def usage(self) -> dict[str, int]:
        """OpenAI's counts."""
        generated = sum(len(completion.token_ids) for completion in self.completions)
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self.num_prompt_tokens + generated,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a request came from: its line, and the id that the line gave it, if any."""

    line_number: int
    digest: int
    id: str | int | None


def as_id(value: object) -> str | int | None:
    """What may identify a line: a text or an integer."""
    return value if isinstance(value, str) else as_int(value)


class Form(Protocol):
    """A form of lines.  All dicts are JSON objects."""

    def identity(self, fields: Mapping[str, Any]) -> str | int | None:
        """The id by which the author of the line knows it, also where `parse` refuses it; None if it has none that can be written."""
        ...

    def parse(self, fields: Mapping[str, Any]) -> JobRequest:
        """Raises RequestError when the line cannot be served."""
        ...

    def success(self, origin: Origin, answer: Answer) -> dict[str, Any]:
        """The record of an answer."""
        ...

    def failure(self, origin: Origin, error: RequestError) -> dict[str, Any]:
        """The record of an error."""
        ...
