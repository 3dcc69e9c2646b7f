"""OpenAI's batch lines: {"custom_id", "method", "url", "body"} is answered by {"id", "custom_id", "response", "error"}."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexgen.api.bodies import parse_chat, parse_completion
from flexgen.api.job_request import (
    JobRequest,
    as_id,
    best_choice,
    finish_reason,
    key,
    labels,
    tool_calls,
    usage,
    usage_of_choices,
)
from flexgen.api.logprobs import chat_logprobs, completion_logprobs, vllm_prompt_logprobs
from flexgen.base.scalars import shown
from flexgen.errors import RequestError
from flexgen.outputs import ClassificationRequestOutput, CompletionOutput, RequestOutput
from flexgen.request import SamplingParams

COMPLETIONS_MAX_TOKENS = 16  # the hosted API's default; chats may fill the context
_STATUS = {"unsupported_url": 404, "model_not_found": 404, "non_finite_logits": 500, "internal_error": 500}  # 400 for the rest


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """An endpoint of the API.

    Attributes:
        id_prefix: The prefix of the ids of response bodies.
        object: The field `object` of response bodies.
        parse: The parser of request bodies, which also takes the line and the default sampling parameters.
        choice: The function that writes a completion, without its index and finish_reason.
        label: The function that writes the likeliest of the choices of a line.
    """

    id_prefix: str
    object: str
    parse: Callable[[JobRequest, Mapping[str, Any], SamplingParams], JobRequest]
    choice: Callable[[CompletionOutput, JobRequest, RequestOutput], dict[str, Any]]
    label: Callable[[str | None], dict[str, Any]]


def _short_completion(line: JobRequest, body: Mapping[str, Any], defaults: SamplingParams) -> JobRequest:
    return parse_completion(line, body, dataclasses.replace(defaults, max_tokens=COMPLETIONS_MAX_TOKENS))


def _completion_choice(completion: CompletionOutput, request: JobRequest, output: RequestOutput) -> dict[str, Any]:
    if request.echo:
        choice = {"text": (output.prompt or "") + completion.text, "logprobs": completion_logprobs(completion, output)}
    else:
        choice = {"text": completion.text, "logprobs": completion_logprobs(completion)}
    return {**choice, "prompt_logprobs": vllm_prompt_logprobs(output)} if request.states_prompt_logprobs else choice


def _completion_label(text: str | None) -> dict[str, Any]:
    return {"text": text, "logprobs": None}


def _chat_choice(completion: CompletionOutput, request: JobRequest, output: RequestOutput) -> dict[str, Any]:
    return {"message": _answer_message(completion, request), "logprobs": chat_logprobs(completion, request.params.logprobs or 0)}


def _chat_label(text: str | None) -> dict[str, Any]:
    return {"message": _message(text), "logprobs": None}


def _answer_message(completion: CompletionOutput, request: JobRequest) -> dict[str, Any]:
    parsed = completion.message
    if parsed is None:
        return _message(completion.text)
    message = _message(parsed.content)
    if parsed.reasoning is not None:
        message["reasoning_content"] = parsed.reasoning  # the name that vLLM and templates have for it
    return {**message, "tool_calls": tool_calls(request, completion)} if parsed.tool_calls else message


def _message(text: str | None) -> dict[str, Any]:
    return {"role": "assistant", "content": text, "refusal": None}


_COMPLETIONS = Endpoint(
    id_prefix="cmpl", object="text_completion", parse=_short_completion, choice=_completion_choice, label=_completion_label
)
_CHAT = Endpoint(id_prefix="chatcmpl", object="chat.completion", parse=parse_chat, choice=_chat_choice, label=_chat_label)
ENDPOINTS: Mapping[object, Endpoint] = {
    "/v1/completions": _COMPLETIONS,
    "/v1/chat/completions": _CHAT,
    "/completions": _COMPLETIONS,  # as in Azure's batch files
    "/chat/completions": _CHAT,
}


def is_batch_line(fields: Mapping[str, Any]) -> bool:
    """Return whether a line is in OpenAI's form, which its fields `body` and `url` show."""
    return "body" in fields or "url" in fields


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAIForm:
    """Batch lines of one endpoint, answered by batch lines.

    Attributes:
        url: The url of the endpoint, or any other value that the line has for it.
        model: The name of the model, written into answers.
        created: The time written into answers, in seconds since 1970; one for the whole job, so that a resumed job writes the same bytes.
        defaults: The sampling parameters of lines that set none.
        has_text: Whether answers have text; False where the model has no tokenizer, so that they are token ids.
    """

    url: object
    model: str
    created: int
    defaults: SamplingParams
    has_text: bool = True

    def identity(self, fields: Mapping[str, Any]) -> str | int | None:
        """Return `custom_id`, also an integer: `parse` refuses it, and the record of the error shows it."""
        return as_id(fields.get("custom_id"))

    def parse(self, line: JobRequest, fields: Mapping[str, Any]) -> JobRequest:
        """Return the line with its prompt and parameters.

        Raises:
            RequestError: The line cannot be served.
        """
        body = fields.get("body")
        custom_id = fields.get("custom_id")
        if not isinstance(custom_id, str):
            raise RequestError(f"custom_id must be a text, not {shown(custom_id)}", param="custom_id")
        if fields.get("method", "POST") != "POST":
            raise RequestError("method must be POST", param="method")
        endpoint = ENDPOINTS.get(self.url) if isinstance(self.url, str) else None
        if endpoint is None:
            message = f"url must be /v1/completions or /v1/chat/completions, not {shown(self.url)}"
            raise RequestError(message, code="unsupported_url", param="url")
        if not isinstance(body, dict):
            raise RequestError("body must be an object", param="body")
        return endpoint.parse(line, body, self.defaults)

    def success(self, request: JobRequest, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """Return the record of an answer: the endpoint's object in a response with status 200, the choices of each prompt after another."""
        completions = [(completion, output) for output in outputs for completion in output.outputs]
        choices = [self._choice(index, completion, request, output) for index, (completion, output) in enumerate(completions)]
        body = self._body(request, choices, usage(outputs))
        if ENDPOINTS[self.url] is _CHAT and request.states_prompt_logprobs:
            body["prompt_logprobs"] = vllm_prompt_logprobs(outputs[0])
        return _record(request, 200, body)

    def scored(self, request: JobRequest, output: ClassificationRequestOutput) -> dict[str, Any]:
        """Return the record of a line with choices: the likeliest one as the answer, with the scores of all in `labels`."""
        best = best_choice(request, output)
        text = best if isinstance(best, str) else None
        choice = {"index": 0, **ENDPOINTS[self.url].label(text), "finish_reason": "stop", "labels": labels(request, output)}
        choice |= {} if text is not None else {"token_ids": best}
        return _record(request, 200, self._body(request, [choice], usage_of_choices(output)))

    def failure(self, request: JobRequest, error: RequestError) -> dict[str, Any]:
        """Return the record of an error: a response with the status and error object of the hosted API."""
        status = _STATUS.get(error.code, 400)
        kind = "server_error" if status >= 500 else "invalid_request_error"
        body = {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}
        return _record(request, status, body)

    def _body(self, request: JobRequest, choices: Sequence[dict[str, Any]], counts: dict[str, int]) -> dict[str, Any]:
        endpoint = ENDPOINTS[self.url]
        return {
            "id": f"{endpoint.id_prefix}-{key(request)}",
            "object": endpoint.object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": counts,
        }

    def _choice(self, index: int, completion: CompletionOutput, request: JobRequest, output: RequestOutput) -> dict[str, Any]:
        written = ENDPOINTS[self.url].choice(completion, request, output)
        choice = {"index": index, **written, "finish_reason": finish_reason(completion)}
        if request.shows_ids or not self.has_text:
            choice["token_ids"] = list(completion.token_ids)
        return choice


def _record(request: JobRequest, status: int, body: dict[str, Any]) -> dict[str, Any]:
    response = {"status_code": status, "request_id": f"req_{key(request)}", "body": body}
    return {"id": f"batch_req_{key(request)}", "custom_id": request.id, "response": response, "error": None}
