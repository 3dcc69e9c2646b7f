"""A line as a request, and the protocol by which a form of lines reads requests and writes records."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flexgen.base.scalars import as_int
from flexgen.chat import Chat, ToolUse
from flexgen.errors import RequestError
from flexgen.outputs import ClassificationRequestOutput, CompletionOutput, RequestOutput
from flexgen.request import SamplingParams

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
        more_prompts: Further prompts of the line, whose answers follow those of the first (OpenAI's completions).
        params: The sampling parameters.
        choices: The choices that are scored after the prompt, texts or token ids; nothing is generated then.
        echo: Whether the prompt is part of the answer's text.
        states_max_tokens: Whether the line itself sets `max_tokens`, which is then never lowered silently.
        states_prompt_logprobs: Whether the line itself asks for `prompt_logprobs`; where only `echo` does, they are part of `logprobs`.
        return_token_ids: Whether the answer has token ids beside its text (vLLM's field).
        model: The model that the line names; None if it names none.
        tools: The tools that the answer may call; None without any.
        constrained_by: The name of the line's field that says what the answer must consist of, if one does.
        ignored: The names of the line's fields that have no effect here.
    """

    line_number: int
    digest: int
    form: LineForm
    id: str | int | None = None
    error: RequestError | None = None
    prompt: str | tuple[int, ...] | Chat = ()
    more_prompts: tuple[str, ...] | tuple[tuple[int, ...], ...] = ()
    params: SamplingParams = _NO_PARAMS
    choices: tuple[str | tuple[int, ...], ...] = ()
    echo: bool = False
    states_max_tokens: bool = False
    states_prompt_logprobs: bool = False
    return_token_ids: bool = False
    model: str | None = None
    tools: ToolUse | None = None
    constrained_by: str = "structured_outputs"
    ignored: tuple[str, ...] = ()

    @property
    def shows_ids(self) -> bool:
        """Whether the answer has token ids, because they were asked for or the prompt was given as token ids."""
        return self.return_token_ids or isinstance(self.prompt, tuple)

    def of_each_prompt(self) -> list[JobRequest]:
        """Return a request for each prompt of the line."""
        return [self, *(dataclasses.replace(self, prompt=each, more_prompts=()) for each in self.more_prompts)]

    def refused(self, error: RequestError) -> JobRequest:
        """Return the same line with an error in place of its request; the error names the line's own field."""
        if error.param == "structured_outputs" and self.constrained_by != "structured_outputs":
            message = str(error).replace("structured_outputs", self.constrained_by, 1)
            error = RequestError(message, code=error.code, param=self.constrained_by)
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

    def success(self, request: JobRequest, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """Return the record of an answer.

        Args:
            request: The line.
            outputs: The output for each prompt of the line, with the text of the prompt if the line asks for it.
        """
        ...

    def scored(self, request: JobRequest, output: ClassificationRequestOutput) -> dict[str, Any]:
        """Return the record of a line with choices."""
        ...

    def failure(self, request: JobRequest, error: RequestError) -> dict[str, Any]:
        """Return the record of an error."""
        ...


def usage(outputs: Sequence[RequestOutput]) -> dict[str, int]:
    """Return OpenAI's counts of tokens."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    return _usage(prompt, sum(len(completion.token_ids) for output in outputs for completion in output.outputs))


def usage_of_choices(output: ClassificationRequestOutput) -> dict[str, int]:
    """Return OpenAI's counts of tokens, with the choices that were scored as completions."""
    return _usage(len(output.prompt_token_ids), sum(output.outputs.num_tokens))


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def finish_reason(completion: CompletionOutput) -> str | None:
    """Return why an answer ended, in OpenAI's words: also "tool_calls", where it calls tools."""
    calls = completion.message is not None and completion.message.tool_calls and completion.finish_reason == "stop"
    return "tool_calls" if calls else completion.finish_reason


def tool_calls(request: JobRequest, completion: CompletionOutput) -> list[dict[str, Any]]:
    """Return the calls of an answer as JSON objects, with ids that are the same whenever the line is answered."""
    calls = () if completion.message is None else completion.message.tool_calls
    return [
        {
            "id": f"call_{key(request)}_{completion.index}_{place}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for place, call in enumerate(calls)
    ]


def key(request: JobRequest) -> str:
    """Return an id that is unique within the job, and the same whenever the line is answered."""
    return f"{request.line_number:08x}{request.digest:016x}"


def labels(request: JobRequest, output: ClassificationRequestOutput) -> list[dict[str, Any]]:
    """Return the scores of the choices of a line as JSON objects, in the order of the line."""
    scores = output.outputs
    return [
        {
            "text" if isinstance(choice, str) else "token_ids": choice,
            "logprob": logprob,
            "probability": probability,
            "num_tokens": num_tokens,
            "is_greedy": is_greedy,
        }
        for choice, logprob, probability, num_tokens, is_greedy in zip(
            request.choices, scores.logprobs, scores.probs, scores.num_tokens, scores.is_greedy, strict=True
        )
    ]


def best_choice(request: JobRequest, output: ClassificationRequestOutput) -> str | list[int]:
    """Return the likeliest choice of a line."""
    choice = request.choices[output.outputs.best]
    return choice if isinstance(choice, str) else list(choice)


def as_id(value: object) -> str | int | None:
    """Return the id of a line, a text or an integer; None if the value is neither."""
    return value if isinstance(value, str) else as_int(value)
