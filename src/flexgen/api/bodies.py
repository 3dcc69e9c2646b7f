"""Parses the body of a request in any form: some fields are served, some have no effect here, all others are refused by name."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from flexgen.api.constraints import response_format
from flexgen.api.job_request import JobRequest
from flexgen.base.parameters import MAX_CHOICES
from flexgen.base.scalars import as_int, in_json, shown
from flexgen.chat import Chat, parse_messages, parse_tool_use
from flexgen.errors import RequestError
from flexgen.request import SamplingParams

_SAMPLING = frozenset(field.name for field in dataclasses.fields(SamplingParams)) - {"logprobs"}  # its type depends on the endpoint
_COMPLETION = frozenset(("prompt", "logprobs", "echo"))
_CHAT = frozenset((
    "messages", "logprobs", "top_logprobs", "max_completion_tokens", "add_generation_prompt", "continue_final_message",
    "chat_template_kwargs", "reasoning_effort", "tools", "tool_choice", "parallel_tool_calls",
))  # fmt: skip
_OF_ANSWERS = (  # what choices do not have
    "logprobs", "top_logprobs", "max_completion_tokens", "best_of", "echo", "return_token_ids", "response_format",
)  # fmt: skip
_BOTH = frozenset(("model", "best_of", "return_token_ids", "choices", "response_format"))
_HARMLESS = frozenset((
    "cache_salt", "metadata", "prediction", "priority", "prompt_cache_key", "prompt_cache_retention", "request_id",
    "safety_identifier", "service_tier", "store", "stream_options", "user",
))  # fmt: skip
# Fields whose effect is not supported, with the values that ask for no effect, as null always does.
_OFF: Mapping[str, tuple[Any, ...]] = {
    "audio": (), "chat_template": (), "detokenize": (True,), "documents": ([],), "function_call": ("none", "auto"),
    "functions": ([],), "include_reasoning": (True,), "length_penalty": (1,), "logits_processors": ([],), "modalities": (["text"],),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,), "stream": (False,), "suffix": ("",), "thinking_token_budget": (),
    "truncate_prompt_tokens": (), "use_beam_search": (False,), "verbosity": ("medium",),
    "web_search_options": (),
}  # fmt: skip
_COMPLETION_OFF: Mapping[str, tuple[Any, ...]] = {
    **_OFF, "add_special_tokens": (True,), "parallel_tool_calls": (True, False), "tool_choice": ("none", "auto"), "tools": ([],),
}  # fmt: skip
# Chat templates write the special tokens.
_CHAT_OFF: Mapping[str, tuple[Any, ...]] = {**_OFF, "echo": (False,), "add_special_tokens": (False,)}


def parse_completion(line: JobRequest, fields: Mapping[str, Any], defaults: SamplingParams) -> JobRequest:
    """Return a line with the prompt and parameters of a completion; `null` means the default.

    Args:
        line: The line.
        fields: The fields of the body.
        defaults: The sampling parameters of bodies that set none.

    Raises:
        RequestError: A field is missing, malformed, unknown, or has an effect that is not supported; `param` names it.
    """
    ignored = _ignored(fields, _COMPLETION, _COMPLETION_OFF)
    if fields.get("prompt") is None:
        raise RequestError("there is no prompt", param="prompt")
    logprobs, echo = fields.get("logprobs"), _flag(fields, "echo", False)
    given = {"logprobs": None if logprobs is False else logprobs}
    if echo and fields.get("prompt_logprobs") is None:
        given["prompt_logprobs"] = given["logprobs"]  # which are of all tokens of the text, as in OpenAI's and vLLM's completions
    prompt, *more = _prompts(fields["prompt"])
    return _request(line, fields, defaults, given, prompt=prompt, more_prompts=tuple(more), echo=echo, ignored=ignored)


def parse_chat(line: JobRequest, fields: Mapping[str, Any], defaults: SamplingParams) -> JobRequest:
    """Return a line with the conversation and parameters of a chat completion; `null` means the default.

    Args:
        line: The line.
        fields: The fields of the body.
        defaults: The sampling parameters of bodies that set none.

    Raises:
        RequestError: A message is not text, or see `parse_completion`.
    """
    ignored = _ignored(fields, _CHAT, _CHAT_OFF)
    if fields.get("messages") is None:
        raise RequestError("there are no messages", param="messages")
    use = parse_tool_use(fields.get("tools"), fields.get("tool_choice"), fields.get("parallel_tool_calls"))
    chat = Chat(
        messages=parse_messages(fields["messages"]),
        add_generation_prompt=_flag(fields, "add_generation_prompt", True),
        continue_final_message=_flag(fields, "continue_final_message", False),
        chat_template_kwargs=_template_kwargs(fields),
        tools=() if use is None else use.tools,
    )
    given = {"logprobs": _chat_logprobs(fields)}
    if fields.get("max_completion_tokens") is not None:
        given["max_tokens"] = _max_completion_tokens(fields)
    return _request(line, fields, defaults, given, prompt=chat, tools=use, ignored=ignored)


def _ignored(fields: Mapping[str, Any], served: frozenset[str], off: Mapping[str, tuple[Any, ...]]) -> tuple[str, ...]:
    """Return the names of the fields that have no effect.

    Raises:
        RequestError: A field is unknown, or has an effect that is not supported.
    """
    ignored: list[str] = []
    for name, value in fields.items():
        if name in served or name in _SAMPLING or name in _BOTH:
            continue
        if name in off:
            if value is not None and not any(_same(value, each) for each in off[name]):
                only = f" (only {' or '.join(map(in_json, off[name]))})" if off[name] else ""
                raise RequestError(f"{name} is not supported{only}", code="unsupported_field", param=name)
        elif name not in _HARMLESS:
            raise RequestError(f"unknown field {name[:80]!r}{_meant(name, served)}", code="unknown_field", param=name[:80])
        if value is not None:
            ignored.append(name)
    return tuple(ignored)


def _meant(name: str, served: frozenset[str]) -> str:
    """Return a hint at the field that may be meant; empty if there is none."""
    if "prompt" in served and name.lower() in ("text", "input", "question", "content", "query", "instruction"):
        return "; the text to continue is called 'prompt'"
    close = difflib.get_close_matches(name[:80].lower(), sorted(served | _SAMPLING), n=1, cutoff=0.75)
    return f"; did you mean {close[0]!r}?" if close else ""


def _request(line: JobRequest, fields: Mapping[str, Any], defaults: SamplingParams, given: Mapping[str, Any], **parsed: Any) -> JobRequest:
    """Return the line as a request; `given` has sampling parameters besides those of `fields`, `parsed` has fields of JobRequest."""
    model, ids = fields.get("model"), _flag(fields, "return_token_ids", False)
    if model is not None and not isinstance(model, str):
        raise RequestError("model must be a text", param="model")
    line = dataclasses.replace(line, return_token_ids=ids, model=model, **parsed)
    if fields.get("choices") is not None:
        if line.more_prompts:
            raise RequestError("choices stand beside one prompt: write a line for each prompt", code="unsupported_field", param="prompt")
        line = dataclasses.replace(line, tools=None)  # the prompt shows them, and nothing is generated
        return dataclasses.replace(line, choices=_choices(fields))
    values = {name: fields[name] for name in _SAMPLING if fields.get(name) is not None}
    values.update((name, value) for name, value in given.items() if value is not None)
    if (constraint := response_format(fields)) is not None:
        if "structured_outputs" in values:
            raise RequestError("response_format and structured_outputs mean the same: give one", param="response_format")
        values["structured_outputs"] = constraint
        line = dataclasses.replace(line, constrained_by="response_format")
    params = dataclasses.replace(defaults, **values)
    best_of = fields.get("best_of")
    if best_of is not None and not _same(best_of, params.n):
        raise RequestError("best_of is not supported (only as many as n)", code="unsupported_field", param="best_of")
    if (1 + len(line.more_prompts)) * params.n > MAX_CHOICES:
        raise RequestError(f"the prompts of a line have at most {MAX_CHOICES:,} answers together", param="prompt")
    scores = fields.get("prompt_logprobs") is not None
    return dataclasses.replace(line, params=params, states_max_tokens="max_tokens" in values, states_prompt_logprobs=scores)


def _choices(fields: Mapping[str, Any]) -> tuple[str | tuple[int, ...], ...]:
    """Return the choices of a line, which are scored.

    Raises:
        RequestError: They are not choices; or something is asked for that only answers have, because nothing is generated.
    """
    asked = sorted(name for name in (*_SAMPLING, *_OF_ANSWERS) if fields.get(name) is not None and fields[name] is not False)
    if asked:
        message = f"choices are scored and nothing is generated, so {asked[0]} has no meaning: leave it out"
        raise RequestError(message, code="unsupported_field", param=asked[0])
    given = fields["choices"]
    found = given if isinstance(given, list) else []
    choices = [_token_ids(each) if isinstance(each, list) else each if isinstance(each, str) else None for each in found]
    usable = tuple(each for each in choices if each)
    if not usable or len(usable) < len(choices) or len(choices) > MAX_CHOICES:
        message = f"choices must be a list of 1 to {MAX_CHOICES:,} texts or lists of token ids, none of them empty"
        raise RequestError(f"{message}, not {shown(given)}", param="choices")
    return usable


def _token_ids(value: list[Any]) -> tuple[int, ...] | None:
    """Return a list of token ids as a tuple; None if an item is no integer."""
    if all(type(each) is int for each in value):
        return tuple(value)
    ids = [number for each in value if (number := as_int(each)) is not None]
    return tuple(ids) if len(ids) == len(value) else None


def _prompts(value: Any) -> list[str] | list[tuple[int, ...]]:
    """Return the prompts of a completion: one text or list of token ids, or a list of either."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        if value and all(isinstance(each, str) for each in value):
            return value
        several = value if value and all(isinstance(each, list) for each in value) else [value]
        prompts = [ids for each in several if (ids := _token_ids(each)) is not None]
        if len(prompts) == len(several):
            return prompts
    raise RequestError(f"prompt must be text or a list of token ids, or a list of either, not {shown(value)}", param="prompt")


def _template_kwargs(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variables of the template; reasoning_effort is one of them, as in vLLM."""
    kwargs, effort = fields.get("chat_template_kwargs"), fields.get("reasoning_effort")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise RequestError("chat_template_kwargs must be an object", param="chat_template_kwargs")
    if effort is not None and not isinstance(effort, str):
        raise RequestError("reasoning_effort must be a text", param="reasoning_effort")
    return {**(kwargs or {}), **({} if effort is None else {"reasoning_effort": effort})}


def _chat_logprobs(fields: Mapping[str, Any]) -> int | None:
    """Return the number of likeliest tokens to show; None if no log probabilities were asked for."""
    asked, count = _flag(fields, "logprobs", False), fields.get("top_logprobs")
    if count is None or _same(count, 0):
        return 0 if asked else None
    if not asked:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    number = as_int(count)
    if number is None or number < -1:
        raise RequestError(f"top_logprobs must be an integer of at least -1, not {shown(count)}", param="top_logprobs")
    return number


def _max_completion_tokens(fields: Mapping[str, Any]) -> int:
    """Return `max_completion_tokens`; `max_tokens`, its older name, may be given with the same value."""
    newer, older = fields["max_completion_tokens"], fields.get("max_tokens")
    number = as_int(newer)
    if number is None or number < 0 or number.bit_length() > 63:
        raise RequestError(f"max_completion_tokens must be an integer of at least 0, not {shown(newer)}", param="max_completion_tokens")
    if older is not None and as_int(older) != number:
        message = f"max_tokens ({shown(older)}) and max_completion_tokens ({shown(newer)}) mean the same: give one"
        raise RequestError(message, param="max_completion_tokens")
    return number


def _flag(fields: Mapping[str, Any], name: str, default: bool) -> bool:
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false, not {shown(value)}", param=name)
    return value


def _same(value: Any, wanted: Any) -> bool:
    """Return whether two JSON values are equal: 1 is 1.0, but neither is true."""
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)
