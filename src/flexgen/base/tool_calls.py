"""An answer as a message of a conversation, with the tools that it calls."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call of a tool.

    Attributes:
        name: The name of the tool.
        arguments: The arguments, a JSON object as text.
    """

    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerMessage:
    """An answer, parsed as the model's response template says.

    Attributes:
        content: The text for the user; None where there is none beside calls.
        reasoning: What the model thought before; None where it did not.
        tool_calls: The calls, in their order.
    """

    content: str | None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
