"""Bare lines: {"prompt": ...} or {"messages": ...} with other fields, or plain text, is answered by {"id", "index", "text", ...}."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexgen.api.bodies import parse_chat, parse_completion
from flexgen.api.job_request import JobRequest, as_id, best_choice, finish_reason, labels, tool_calls, usage, usage_of_choices
from flexgen.api.logprobs import generated_logprobs, prompt_logprobs
from flexgen.errors import RequestError
from flexgen.outputs import ClassificationRequestOutput, CompletionOutput, RequestOutput
from flexgen.request import SamplingParams

_IDS = ("id", "custom_id")
_PROMPTS = ("prompt", "messages")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainForm:
    """Bare lines, answered by flat records whose `index` is the line's number, from 1.

    Attributes:
        defaults: The sampling parameters of lines that set none.
        has_text: Whether answers have text; False where the model has no tokenizer, so that they are token ids only.
    """

    defaults: SamplingParams
    has_text: bool = True

    def identity(self, fields: Mapping[str, Any]) -> str | int | None:
        """Return `id` or `custom_id`, the first of them that is a valid id; None if neither is."""
        return next((usable for name in _IDS if (usable := as_id(fields.get(name))) is not None), None)

    def parse(self, line: JobRequest, fields: Mapping[str, Any]) -> JobRequest:
        """Return the line with its prompt and parameters.

        Raises:
            RequestError: The line cannot be served.
        """
        given = [fields[name] for name in _IDS if fields.get(name) is not None]
        if len(given) > 1 or (given and as_id(given[0]) is None):
            raise RequestError("the line's id must be one text or integer", param="id")
        body = {name: value for name, value in fields.items() if name not in _IDS and (name not in _PROMPTS or value is not None)}
        if all(name in body for name in _PROMPTS):
            raise RequestError("the line has both a prompt and messages", param="messages")
        request = (parse_chat if "messages" in body else parse_completion)(line, body, self.defaults)
        if request.more_prompts:
            message = "several prompts in one line are not supported (only in OpenAI's lines): write a line for each"
            raise RequestError(message, code="unsupported_field", param="prompt")
        return request

    def success(self, request: JobRequest, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """Return the record of an answer; if several choices were asked for, each field of the answer is a list."""
        (output,) = outputs
        prompt = output.prompt or "" if request.echo else ""
        choices = [self._choice(completion, request, prompt) for completion in output.outputs]
        merged = choices[0] if request.params.n == 1 else {name: [choice[name] for choice in choices] for name in choices[0]}
        record = {"id": request.id, "index": request.line_number, **merged}
        if output.prompt_logprobs is not None:
            record["prompt_logprobs"] = prompt_logprobs(output, request.params.prompt_logprobs or 0)
        return {**record, "usage": usage(outputs)}

    def scored(self, request: JobRequest, output: ClassificationRequestOutput) -> dict[str, Any]:
        """Return the record of a line with choices: the likeliest one and the scores of all."""
        best = best_choice(request, output)
        record: dict[str, Any] = {"id": request.id, "index": request.line_number}
        record |= {"text": best} if isinstance(best, str) else {"text": None, "token_ids": best}
        return {**record, "labels": labels(request, output), "usage": usage_of_choices(output)}

    def failure(self, request: JobRequest, error: RequestError) -> dict[str, Any]:
        """Return the record of an error."""
        told = {"code": error.code, "message": str(error), "param": error.param}
        return {"id": request.id, "index": request.line_number, "error": told}

    def _choice(self, completion: CompletionOutput, request: JobRequest, prompt: str) -> dict[str, Any]:
        parsed = completion.message
        text = completion.text if parsed is None else parsed.content
        choice: dict[str, Any] = {"text": prompt + (text or "") if self.has_text else None}
        if request.tools is not None:
            choice["reasoning_content"] = None if parsed is None else parsed.reasoning
            choice["tool_calls"] = tool_calls(request, completion)
        if request.shows_ids or not self.has_text:
            choice["token_ids"] = list(completion.token_ids)
        if completion.logprobs is not None:
            choice["logprobs"] = generated_logprobs(completion, request.params.logprobs or 0)
        return {**choice, "finish_reason": finish_reason(completion), "stop_reason": completion.stop_reason}
