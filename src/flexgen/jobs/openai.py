"""OpenAI batch lines for /v1/completions: {"custom_id", "method", "url", "body"} in, {"id", "custom_id", "response", "error"} out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexgen.errors import RequestError
from flexgen.jobs.fields import Answer, JobRequest, Origin, parse_completion
from flexgen.request import SamplingParams

DEFAULTS = SamplingParams(temperature=1.0, top_p=1.0, max_tokens=16)  # the hosted API's
COMPLETIONS_URL = "/v1/completions"
_STATUS = {"unsupported_url": 404, "non_finite_logits": 500, "internal_error": 500}  # 400 for the rest


def is_batch_line(fields: Mapping[str, Any]) -> bool:
    """Whether a line means to be one of OpenAI's."""
    return "body" in fields or "url" in fields


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAIForm:
    """Batch lines, answered by batch lines.

    Attributes:
        model: the name that answers carry.
        created: seconds since 1970, the same in all answers of a job, so that a resumed job writes the same bytes.
    """

    model: str
    created: int

    def identity(self, fields: Mapping[str, Any]) -> str | int | None:
        """`custom_id`."""
        custom_id = fields.get("custom_id")
        return custom_id if isinstance(custom_id, str) else None

    def parse(self, fields: Mapping[str, Any]) -> JobRequest:
        """Raises RequestError when the line cannot be served."""
        url, body = fields.get("url"), fields.get("body")
        if self.identity(fields) is None:
            raise RequestError("custom_id must be a text", param="custom_id")
        if fields.get("method", "POST") != "POST":
            raise RequestError("method must be POST", param="method")
        if url != COMPLETIONS_URL:
            message = f"url {str(url)[:80]!r} is not supported yet; {COMPLETIONS_URL} is"
            raise RequestError(message, code="unsupported_url", param="url")
        if not isinstance(body, dict):
            raise RequestError("body must be an object", param="body")
        if "prompt" not in body:
            raise RequestError("the body has no prompt", param="prompt")
        return parse_completion(body, DEFAULTS)

    def success(self, origin: Origin, answer: Answer) -> dict[str, Any]:
        """The record of an answer: a text_completion object in a response of status 200."""
        completion = answer.completion
        choice = {"index": 0, "text": completion.text, "logprobs": None, "finish_reason": completion.finish_reason}
        if answer.shows_ids:
            choice["token_ids"] = list(completion.token_ids)
        body = {
            "id": f"cmpl-{_key(origin)}",
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [choice],
            "usage": answer.usage,
        }
        return _record(origin, 200, body)

    def failure(self, origin: Origin, error: RequestError) -> dict[str, Any]:
        """The record of an error: a response with the status and error object of the hosted API."""
        status = _STATUS.get(error.code, 400)
        kind = "server_error" if status >= 500 else "invalid_request_error"
        body = {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}
        return _record(origin, status, body)


def _record(origin: Origin, status: int, body: dict[str, Any]) -> dict[str, Any]:
    response = {"status_code": status, "request_id": f"req_{_key(origin)}", "body": body}
    return {"id": f"batch_req_{_key(origin)}", "custom_id": origin.id, "response": response, "error": None}


def _key(origin: Origin) -> str:
    """Unique within the job, and the same whenever the line is answered."""
    return f"{origin.line_number:08x}{origin.digest:016x}"
