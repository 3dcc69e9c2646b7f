"""A line as a request, and the protocol by which a form of lines reads requests and writes records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flexgen.base.scalars import as_int
from flexgen.chat import Chat
from flexgen.errors import RequestError
from flexgen.request import CompletionOutput, SamplingParams

_NO_PARAMS = SamplingParams()


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """A line of a job as a request.

    Attributes:
        line_number: The line's number, from 1.
        digest: 64 bits of the hash of the line.
        form: The form of the line, and of its record.
        id: The id that the author gave the line; None if it has none.
        error: The error that the line ends in, in which case the fields below mean nothing; None if it can be served.
        prompt: The prompt: text, token ids, or a conversation.
        params: The sampling parameters.
        states_max_tokens: Whether the line itself sets `max_tokens`, which is then never lowered silently.
        return_token_ids: Whether the answer has token ids beside its text (vLLM's field).
        model: The model that the line names; None if it names none.
        ignored: The names of the line's fields that have no effect here.
    """

    line_number: int
    digest: int
    form: LineForm
    id: str | int | None = None
    error: RequestError | None = None
    prompt: str | tuple[int, ...] | Chat = ()
    params: SamplingParams = _NO_PARAMS
    states_max_tokens: bool = False
    return_token_ids: bool = False
    model: str | None = None
    ignored: tuple[str, ...] = ()

    @property
    def shows_ids(self) -> bool:
        """Whether the answer has token ids, because they were asked for or the prompt was given as token ids."""
        return self.return_token_ids or isinstance(self.prompt, tuple)

    def refused(self, error: RequestError) -> JobRequest:
        """Return the same line with an error in place of its request."""
        return JobRequest(line_number=self.line_number, digest=self.digest, form=self.form, id=self.id, error=error)


class LineForm(Protocol):
    """A form of lines and their records.  All dicts are JSON objects."""

    def identity(self, fields: Mapping[str, Any]) -> str | int | None:
        """Return the id that the author gave the line, also where `parse` refuses the line; None where it has no valid id."""
        ...

    def parse(self, line: JobRequest, fields: Mapping[str, Any]) -> JobRequest:
        """Return the line with its prompt and parameters.

        Args:
            line: The line, of which nothing but its number, digest, id and form is known yet.
            fields: The fields of the line.

        Raises:
            RequestError: The line cannot be served.
        """
        ...

    def success(self, request: JobRequest, completions: Sequence[CompletionOutput], num_prompt_tokens: int) -> dict[str, Any]:
        """Return the record of an answer.

        Args:
            request: The line.
            completions: One completion for each of the request's `n` choices, in order.
            num_prompt_tokens: The length of the prompt.
        """
        ...

    def failure(self, request: JobRequest, error: RequestError) -> dict[str, Any]:
        """Return the record of an error."""
        ...


def usage(completions: Sequence[CompletionOutput], num_prompt_tokens: int) -> dict[str, int]:
    """Return OpenAI's counts of tokens."""
    generated = sum(len(completion.token_ids) for completion in completions)
    return {"prompt_tokens": num_prompt_tokens, "completion_tokens": generated, "total_tokens": num_prompt_tokens + generated}


def as_id(value: object) -> str | int | None:
    """Return the id of a line, a text or an integer; None if the value is neither."""
    return value if isinstance(value, str) else as_int(value)
