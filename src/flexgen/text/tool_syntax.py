"""How a model writes calls of tools, found by having its chat template write some, and the grammar of such calls.

Knows nothing of tokenizers: which parts of a text are special tokens is told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexgen.chat.messages import Chat
from flexgen.chat.tools import tool_name

_NAME, _KEY, _VALUE = "probe_tool", "probe_key", "probe_value"
_CONTENT = "\N{INVISIBLE SEPARATOR}probe\N{INVISIBLE SEPARATOR}"  # begins and ends as no call does
_ARGUMENTS = re.compile(rf'\{{\s*"{_KEY}"\s*:\s*"{_VALUE}"\s*\}}')
PROBED_CALL = (_NAME, {_KEY: _VALUE})


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSyntax:
    """The text around the names and the arguments of calls; arguments are JSON.

    Attributes:
        before: The text before the name of the first call.
        between: The text between a name and its arguments.
        joint: The text between the arguments of a call and the name of the next; None where an answer has one call only.
        after: The text after the arguments of the last call.
    """

    before: str
    between: str
    joint: str | None
    after: str

    @property
    def example(self) -> str:
        """The call that the template wrote."""
        return f"{self.before}{_NAME}{self.between}{json.dumps({_KEY: _VALUE})}{self.after}"

    def grammar(
        self, tools: Sequence[Mapping[str, Any]], *, parallel: bool, literal: Callable[[str], str], json_options: Mapping[str, Any]
    ) -> str:
        """Return a grammar (Lark's, as llguidance extends it) of answers that call at least one of the tools and say nothing else.

        Args:
            tools: The tools, of which each call names one.
            parallel: Whether there may be several calls.
            literal: Writes a text as a part of a rule.
            json_options: llguidance's options of JSON (its key `x-guidance`), where the schema of a tool has none.
        """
        calls = [f"{literal(tool_name(tool) + self.between)} args_{place}" for place, tool in enumerate(tools)]
        more = f" ({literal(self.joint)} call)*" if parallel and self.joint is not None else ""
        rules = [f"start: {literal(self.before)} call{more} {literal(self.after)}", f"call: {' | '.join(calls)}"]
        schemas = [parameters_of(tool, json_options) for tool in tools]
        return "\n".join([*rules, *(f"args_{place}: %json {json.dumps(each)}" for place, each in enumerate(schemas)), ""])


def parameters_of(tool: Mapping[str, Any], json_options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a tool's arguments."""
    return {"type": "object", "x-guidance": json_options, **(tool["function"].get("parameters") or {})}


def probes() -> list[Chat]:
    """Return the conversations whose prompts `find_syntax` reads: an answer of text, one with a call, and one with two."""
    function = {"name": _NAME, "description": "A tool.", "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}}}
    calls = [{"id": f"probe000{place}", "type": "function", "function": {"name": _NAME, "arguments": {_KEY: _VALUE}}} for place in range(2)]
    answers = [{"content": _CONTENT}, {"content": "", "tool_calls": calls[:1]}, {"content": "", "tool_calls": calls}]
    user = {"role": "user", "content": "Hello"}
    tools = ({"type": "function", "function": function},)
    return [Chat(messages=(user, {"role": "assistant", **answer}), add_generation_prompt=False, tools=tools) for answer in answers]


def question() -> Chat:
    """Return the conversation that these answers follow, up to where the answer begins."""
    first = probes()[0]
    return Chat(messages=first.messages[:1], tools=first.tools)


def find_syntax(text: str, one: str, two: str | None, ends: Sequence[str] = ()) -> ToolSyntax | None:
    """Return how calls are written; None if they are not a name and JSON.

    Args:
        text: The prompt of the answer of text.
        one: The prompt of the answer with a call.
        two: The prompt of the answer with two calls; None if the template refuses several.
        ends: The texts of the tokens that end answers.
    """
    header, footer = _num_common(text, one), _num_common(text[::-1], one[::-1])
    written = one[header:]
    name, arguments = written.find(_NAME), _ARGUMENTS.search(written)
    if name < 0 or arguments is None or name > arguments.start():
        return None
    before, between, rest = written[:name], written[name + len(_NAME) : arguments.start()], written[arguments.end() :]
    end = min((place for each in ends if (place := rest.find(each)) >= 0), default=len(rest) - footer)
    if end < 0 or _NAME in between + rest:
        return None
    return ToolSyntax(before=before, between=between, after=rest[:end], joint=_joint(two, between))


def _num_common(first: str, second: str) -> int:
    """Return the number of characters with which both texts begin."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))


def _joint(two: str | None, between: str) -> str | None:
    """Return the text between the arguments of the first of two calls and the name of the second."""
    found = list(_ARGUMENTS.finditer(two or ""))
    if two is None or len(found) != 2:
        return None
    joint, name, rest = two[found[0].end() : found[1].start()].partition(_NAME)
    return joint if name and rest == between else None
