"""What all forms of lines have in common: a line as a request, and how a form turns lines into requests and answers into records."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flexgen.base.scalars import as_int
from flexgen.chat import Chat
from flexgen.errors import RequestError
from flexgen.request import CompletionOutput, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestBody:
    """What a request asks for.

    Attributes:
        prompt: Text, token ids, or a conversation.
        params: How the prompt is continued.
        states_max_tokens: Whether the line itself says how long its answer may be, so that it is never cut silently.
        return_token_ids: Whether the answer shows ids beside its text (vLLM's field).
        model: The model that the line names, if it names one.
        ignored: Names of the fields that the line gives and that have no effect here.
    """

    prompt: str | tuple[int, ...] | Chat
    params: SamplingParams
    states_max_tokens: bool
    return_token_ids: bool
    model: str | None
    ignored: tuple[str, ...]

    @property
    def shows_ids(self) -> bool:
        """Whether the answer has token ids: they were asked for, or the prompt was given as such."""
        return self.return_token_ids or isinstance(self.prompt, tuple)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """A line of a job as a request.

    Attributes:
        line_number: The line's number, from 1.
        digest: 64 bits of the hash of the line.
        id: The id by which the line's author knows it, if it has one.
        form: How the line is written; its record is written likewise.
        asked: What the line asks for, or the error that the line ends in.
    """

    line_number: int
    digest: int
    id: str | int | None
    form: Form
    asked: RequestBody | RequestError

    @property
    def body(self) -> RequestBody:
        """What the line asks for; raises its error where there is one."""
        if isinstance(self.asked, RequestError):
            raise self.asked
        return self.asked

    def refused(self, error: RequestError) -> JobRequest:
        """The same line, ending in an error."""
        return dataclasses.replace(self, asked=error)


class Form(Protocol):
    """A form of lines.  All dicts are JSON objects."""

    def identity(self, fields: Mapping[str, Any]) -> str | int | None:
        """The id by which the author of the line knows it, also where `parse` refuses the line; None where it has no usable id."""
        ...

    def parse(self, fields: Mapping[str, Any]) -> RequestBody:
        """What a line asks for; raises RequestError when it cannot be served."""
        ...

    def success(self, request: JobRequest, completions: Sequence[CompletionOutput], num_prompt_tokens: int) -> dict[str, Any]:
        """The record of an answer: one completion for each of the request's `n` choices, in order."""
        ...

    def failure(self, request: JobRequest, error: RequestError) -> dict[str, Any]:
        """The record of an error."""
        ...


def usage(completions: Sequence[CompletionOutput], num_prompt_tokens: int) -> dict[str, int]:
    """OpenAI's counts of tokens."""
    generated = sum(len(completion.token_ids) for completion in completions)
    return {"prompt_tokens": num_prompt_tokens, "completion_tokens": generated, "total_tokens": num_prompt_tokens + generated}


def as_id(value: object) -> str | int | None:
    """A text or an integer, which may identify a line; None for anything else."""
    return value if isinstance(value, str) else as_int(value)
