"""Messages in the shapes of OpenAI's API, brought to the form that templates read.  Knows neither templates nor tokenizers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flexgen.errors import RequestError

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}  # type of a part: where its text is
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which templates and servers know it
_RESERVED = ("messages", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A conversation, ready to be rendered.

    Attributes:
        messages: At least one message, in the form that templates read (see `parse_messages`).
        add_generation_prompt: Whether the prompt ends with the header of the answer.
        continue_final_message: Whether the last message is left open, for the model to continue.
        chat_template_kwargs: More variables for the template.
        tools: The tools that the model may call (see `parse_tools`); they need a template that reads them.

    Raises:
        RequestError: Both ways to end the prompt are asked for, or a variable has a reserved name.
    """

    messages: tuple[Mapping[str, Any], ...]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.add_generation_prompt and self.continue_final_message:
            message = "continue_final_message needs add_generation_prompt to be false: the answer is either a new message or the last one"
            raise RequestError(message, param="continue_final_message")
        if self.continue_final_message and "content" not in self.messages[-1]:
            raise RequestError("continue_final_message: the last message has no content", param="continue_final_message")
        check_template_kwargs(self.chat_template_kwargs)
        if self.tools and "tools" in self.chat_template_kwargs:
            raise RequestError("chat_template_kwargs has tools, and so has the request: give them once", param="chat_template_kwargs")


def check_template_kwargs(kwargs: object) -> None:
    """Check that these can be variables of a template.

    Raises:
        RequestError: They cannot.
    """
    if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
        raise RequestError("chat_template_kwargs must be an object", param="chat_template_kwargs")
    for name in _RESERVED:
        if name in kwargs:
            raise RequestError(f"chat_template_kwargs cannot hold {name!r}", param="chat_template_kwargs")


def make_chats(messages: object, **how: Any) -> list[Chat]:
    """Make the conversations of a call: one of a list of messages, several of a list of such lists.

    Args:
        messages: The messages.
        how: The other fields of `Chat`, the same for all conversations.

    Raises:
        RequestError: A conversation is malformed; the message names its number.
    """
    if not isinstance(messages, (list, tuple)):
        raise RequestError("messages must be a list of messages, or a list of such lists", param="messages")
    chats: list[Chat] = []
    for index, conversation in enumerate(messages if all(isinstance(each, (list, tuple)) for each in messages) else [messages]):
        try:
            chats.append(Chat(messages=parse_messages(conversation), **how))
        except RequestError as error:
            raise RequestError(f"conversation {index}: {error}", code=error.code, param=error.param) from error
    return chats


def parse_messages(value: object) -> tuple[dict[str, Any], ...]:
    """Bring messages to the form that templates read.

    The content stays text or a list of text parts; which of them a template gets is decided where the template is known.  Fields that
    are null are left out, arguments of tool calls that are JSON are parsed, and reasoning gets every name under which templates look
    for it, as in transformers.

    Raises:
        RequestError: A message is malformed or not only text; `param` names the place.
    """
    if not isinstance(value, (list, tuple)) or not value:
        raise RequestError("messages must be a list of at least one message", param="messages")
    return tuple(_message(message, f"messages[{index}]") for index, message in enumerate(value))


def _message(value: object, place: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise RequestError(f"{place} must be an object", param=place)
    message = {str(name): item for name, item in value.items() if item is not None}
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError(f"{place}.role must be a text", param=f"{place}.role")
    if "audio" in message:
        raise RequestError(f"{place}.audio is not supported", code="unsupported_field", param=f"{place}.audio")
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], f"{place}.tool_calls")
        if not message["tool_calls"]:
            del message["tool_calls"]
    if "content" in message:
        message["content"] = _content(message["content"], f"{place}.content")
    elif role != "assistant" or not any(name in message for name in ("tool_calls", "function_call", *_REASONING)):
        raise RequestError(f"{place} has no content", param=f"{place}.content")
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _content(value: object, place: str) -> str | list[dict[str, Any]]:
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return [_part(part, f"{place}[{index}]") for index, part in enumerate(value)]
    raise RequestError(f"{place} must be a text or a list of parts", param=place)


def _part(part: object, place: str) -> dict[str, Any]:
    """Return a part as one of type text, whatever its type was called."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or not isinstance(kind, str):
        raise RequestError(f"{place} must be a text or an object with a type", param=place)
    if kind not in _TEXT_PARTS:
        message = f"{place}: a part of type {kind[:80]!r} is not supported, only text is"
        raise RequestError(message, code="unsupported_field", param=place)
    text = part.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise RequestError(f"{place}.{_TEXT_PARTS[kind]} must be a text", param=place)
    more = {str(name): item for name, item in part.items() if item is not None} if kind == "text" else {}
    return {**more, "type": "text", "text": text}


def _tool_calls(value: object, place: str) -> list[Any]:
    """Return calls that the model made earlier.  Templates read their arguments as objects, the API writes them as JSON."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(call, Mapping) for call in value):
        raise RequestError(f"{place} must be a list of objects", param=place)
    calls: list[Any] = []
    for index, call in enumerate(value):
        function = call.get("function")
        if isinstance(function, Mapping):
            arguments = _arguments(function.get("arguments"), f"{place}[{index}].function.arguments")
            call = {**call, "function": {**function, "arguments": arguments}}
        calls.append(call)
    return calls


def _arguments(value: object, place: str) -> object:
    if not value:
        return {}
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{place} is not valid JSON", param=place) from error
