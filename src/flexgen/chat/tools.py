"""Tools that a model may call, in the shapes of OpenAI's API.  Knows neither templates nor how a model writes its calls."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexgen.base.scalars import shown
from flexgen.errors import RequestError

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SHAPE = '{"type": "function", "function": {"name": ..., "description": ..., "parameters": a JSON schema}}'
_OF_FUNCTIONS = ("name", "description", "parameters", "strict")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """The tools of a request, and which of them its answer calls.

    Attributes:
        tools: The tools that the model may call, as templates read them; at least one.
        required: The tools of which the answer calls at least one; empty if it need not call any.
        parallel: Whether an answer may call several.
    """

    tools: tuple[Mapping[str, Any], ...]
    required: tuple[Mapping[str, Any], ...] = ()
    parallel: bool = True


def parse_tool_use(tools: object, choice: object = None, parallel: object = None) -> ToolUse | None:
    """Return what the fields `tools`, `tool_choice` and `parallel_tool_calls` ask for; None if no tool is to be called.

    Raises:
        RequestError: A field is malformed or cannot be served; `param` names it.
    """
    found = parse_tools(tools)
    if parallel is not None and not isinstance(parallel, bool):
        raise RequestError(f"parallel_tool_calls must be true or false, not {shown(parallel)}", param="parallel_tool_calls")
    required = _required(found, choice)
    if not found or choice == "none":
        return None
    return ToolUse(tools=found, required=required, parallel=parallel is not False)


def parse_tools(value: object) -> tuple[Mapping[str, Any], ...]:
    """Return tools in the form that templates read: without fields that are null.

    Raises:
        RequestError: A tool is malformed or not a function; `param` names the place.
    """
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise RequestError(f"tools must be a list of tools, not {shown(value)}", param="tools")
    tools = tuple(_tool(each, f"tools[{place}]") for place, each in enumerate(value))
    names = [tool_name(each) for each in tools]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RequestError(f"tools: two of them are called {twice!r}", param="tools")
    return tools


def tool_name(tool: Mapping[str, Any]) -> str:
    """Return the name of a tool."""
    return tool["function"]["name"]


def _tool(value: object, place: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or value.get("type") is None:
        raise RequestError(f"{place} must be {_SHAPE}, not {shown(value)}", param=place)
    if value["type"] != "function":
        message = f"{place}: a tool of type {shown(value['type'])} is not supported, only 'function' is"
        raise RequestError(message, code="unsupported_field", param=f"{place}.type")
    function = value.get("function")
    if not isinstance(function, Mapping):
        raise RequestError(f"{place} must be {_SHAPE}; its function is {shown(function)}", param=f"{place}.function")
    for name in function:
        if name not in _OF_FUNCTIONS:
            message = f"{place}.function has no {str(name)[:80]!r}; it has {', '.join(_OF_FUNCTIONS)}"
            raise RequestError(message, code="unknown_field", param=f"{place}.function")
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        message = f"{place}.function.name must be 1 to 64 letters, digits, _ and -, not {shown(name)}"
        raise RequestError(message, param=f"{place}.function.name")
    if parameters is not None and not isinstance(parameters, Mapping):
        message = f"{place}.function.parameters must be a JSON schema, an object, not {shown(parameters)}"
        raise RequestError(message, param=f"{place}.function.parameters")
    return {"type": "function", "function": {key: item for key, item in function.items() if item is not None}}


def _required(tools: tuple[Mapping[str, Any], ...], choice: object) -> tuple[Mapping[str, Any], ...]:
    """Return the tools of which one is to be called."""
    if choice is None or choice in ("none", "auto"):
        return ()
    if choice != "required" and not isinstance(choice, Mapping):
        message = f"tool_choice must be 'none', 'auto', 'required' or an object that names a function, not {shown(choice)}"
        raise RequestError(message, param="tool_choice")
    if not tools:
        raise RequestError("tool_choice asks for a call, and the line has no tools", param="tool_choice")
    if not isinstance(choice, Mapping):
        return tools
    function = choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if choice.get("type") != "function" or not isinstance(name, str):
        message = 'tool_choice must be {"type": "function", "function": {"name": ...}} where it is an object'
        raise RequestError(message, param="tool_choice")
    named = tuple(each for each in tools if tool_name(each) == name)
    if not named:
        raise RequestError(f"tool_choice names {name!r}; tools has {', '.join(map(tool_name, tools))}", param="tool_choice")
    return named
