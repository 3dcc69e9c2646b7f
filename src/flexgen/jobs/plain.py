"""Bare lines: {"prompt": ..., "id": ..., "max_tokens": ...} in, {"id", "index", "text", ...} out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexgen.errors import RequestError
from flexgen.jobs.fields import Answer, JobRequest, Origin, parse_completion
from flexgen.request import SamplingParams

_IDS = ("id", "custom_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainForm:
    """Flat records; `index` is the line's number, from 1."""

    defaults: SamplingParams

    def identity(self, fields: Mapping[str, Any]) -> str | int | None:
        """`id` or `custom_id`."""
        given = [fields[name] for name in _IDS if fields.get(name) is not None]
        return given[0] if len(given) == 1 and isinstance(given[0], (str, int)) and not isinstance(given[0], bool) else None

    def parse(self, fields: Mapping[str, Any]) -> JobRequest:
        """Raises RequestError when the line cannot be served."""
        if "messages" in fields:
            raise RequestError("chat ({messages}) is not supported yet", code="unsupported_field", param="messages")
        if "prompt" not in fields:
            raise RequestError("the line has no prompt", param="prompt")
        if self.identity(fields) is None and any(fields.get(name) is not None for name in _IDS):
            raise RequestError("the line's id must be one text or integer", param="id")
        return parse_completion({name: value for name, value in fields.items() if name not in _IDS}, self.defaults)

    def success(self, origin: Origin, answer: Answer) -> dict[str, Any]:
        """The record of an answer."""
        record: dict[str, Any] = {"id": origin.id, "index": origin.line_number}
        record["text"] = answer.completion.text if answer.has_text else None
        if answer.shows_ids:
            record["token_ids"] = list(answer.completion.token_ids)
        record["finish_reason"] = answer.completion.finish_reason
        record["stop_reason"] = answer.completion.stop_reason
        record["usage"] = answer.usage
        return record

    def failure(self, origin: Origin, error: RequestError) -> dict[str, Any]:
        """The record of an error."""
        return {"id": origin.id, "index": origin.line_number, "error": {"code": error.code, "message": str(error), "param": error.param}}
