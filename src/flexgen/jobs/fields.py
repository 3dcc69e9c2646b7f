"""The fields of one completion, whatever the form of its line: what is served, what has no effect, what is refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from flexgen.errors import RequestError
from flexgen.request import MAX_SEED, CompletionOutput, SamplingParams

_SAMPLING = tuple(field.name for field in dataclasses.fields(SamplingParams))
_HARMLESS = frozenset((
    "metadata", "model", "priority", "prompt_cache_key", "request_id", "safety_identifier", "service_tier", "store", "stream_options",
    "user",
))  # fmt: skip
# Fields whose effect we do not have, with the value that asks for none.  null asks for none everywhere.
_OFF: Mapping[str, Any] = {
    "add_special_tokens": True, "allowed_token_ids": None, "bad_words": [], "best_of": 1, "detokenize": True, "echo": False,
    "frequency_penalty": 0, "include_stop_str_in_output": False, "logit_bias": {}, "logprobs": None, "min_p": 0, "min_tokens": 0,
    "n": 1, "presence_penalty": 0, "prompt_logprobs": None, "repetition_penalty": 1, "response_format": {"type": "text"}, "stop": [],
    "stream": False, "structured_outputs": None, "suffix": "", "tools": [], "truncate_prompt_tokens": None,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """What a line asks for.

    Attributes:
        states_max_tokens: the line itself says how long its answer may be, so that it is never cut silently.
        return_token_ids: the answer shows ids beside its text (vLLM's field).
    """

    prompt: str | tuple[int, ...]
    params: SamplingParams
    states_max_tokens: bool
    return_token_ids: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a form makes a record of.

    Attributes:
        shows_ids: whether the record has the ids.
        has_text: False where the model has no tokenizer.
    """

    num_prompt_tokens: int
    completion: CompletionOutput
    shows_ids: bool
    has_text: bool

    @property
    def usage(self) -> dict[str, int]:
        """OpenAI's counts."""
        generated = len(self.completion.token_ids)
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


class Form(Protocol):
    """A form of lines: how requests are read and answers written.  All dicts are JSON objects."""

    def identity(self, fields: Mapping[str, Any]) -> str | int | None:
        """The id by which the author of the line knows it; None if it has none that can be used."""
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


def parse_completion(fields: Mapping[str, Any], defaults: SamplingParams) -> JobRequest:
    """A request from the fields of a completion; `null` means the default.

    Raises:
        RequestError: a field is missing, malformed, unknown, or has an effect that is not supported; `param` names it.
    """
    for name, value in fields.items():
        if name in _OFF:
            if not _is_off(value, _OFF[name]):
                raise RequestError(f"{name} is not supported yet (only {_OFF[name]!r} is)", code="unsupported_field", param=name)
        elif name not in _SAMPLING and name not in _HARMLESS and name not in ("prompt", "return_token_ids"):
            raise RequestError(f"unknown field {name[:80]!r}", code="unknown_field", param=name[:80])
    given = {name: fields[name] for name in _SAMPLING if name not in _OFF and fields.get(name) is not None}
    for name, value in given.items():
        if isinstance(value, int) and abs(value) > MAX_SEED:
            raise RequestError(f"{name} must fit 64 bits", param=name)
    return_token_ids = fields.get("return_token_ids") or False
    if not isinstance(return_token_ids, bool):
        raise RequestError("return_token_ids must be true or false", param="return_token_ids")
    return JobRequest(
        prompt=_prompt(fields.get("prompt")),
        params=dataclasses.replace(defaults, **given),
        states_max_tokens="max_tokens" in given,
        return_token_ids=return_token_ids,
    )


def _is_off(value: Any, off: Any) -> bool:
    return value is None or (value == off and isinstance(value, bool) == isinstance(off, bool)) or (off == [] and value == "")


def _prompt(value: Any) -> str | tuple[int, ...]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]  # OpenAI's list of prompts, with one
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        if all(type(i) is int for i in value):
            return tuple(value)
        if all(isinstance(i, (str, list)) for i in value):
            raise RequestError("several prompts in one line are not supported yet", code="unsupported_field", param="prompt")
    raise RequestError("prompt must be text or a list of token ids", param="prompt")
