"""inspect-ai's requests as lines of a job.  Plain values: inspect-ai itself is not needed here."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from flexgen.errors import RequestError

# Fields of GenerateConfig, and the fields of a line that they become.
_SERVED = {
    "max_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "seed": "seed",
    "stop_seqs": "stop",
    "num_choices": "n",
    "logprobs": "logprobs",
    "top_logprobs": "top_logprobs",
    "prompt_logprobs": "prompt_logprobs",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "logit_bias": "logit_bias",
    "reasoning_effort": "reasoning_effort",
}
# Fields that inspect-ai itself observes, or that have no meaning for a model in the same process.
_HARMLESS = frozenset((
    "max_retries", "timeout", "attempt_timeout", "stream_idle_timeout", "max_connections", "adaptive_connections", "system_message",
    "parallel_tool_calls", "internal_tools", "max_tool_output", "cache_prompt", "fail_on_refusal", "reasoning_history", "cache", "batch",
))  # fmt: skip
_STOP_REASONS = {"stop": "stop", "length": "max_tokens"}


class Message(Protocol):
    """A message of inspect-ai."""

    @property
    def role(self) -> str: ...

    @property
    def content(self) -> Any: ...


def line_of(messages: Sequence[Message], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the line of a job that asks what inspect-ai asks.

    Args:
        messages: The conversation.
        config: The fields of GenerateConfig that are set; those of `extra_body` are added to the line.

    Raises:
        RequestError: A message is not text, or a field cannot be served; the message names it.
    """
    line: dict[str, Any] = {"messages": [_message(each) for each in messages]}
    for name, value in config.items():
        if name == "extra_body":
            line |= value
        elif name in _SERVED:
            line[_SERVED[name]] = value
        elif name not in _HARMLESS:
            raise RequestError(f"{name} is not supported by flexgen", code="unsupported_field", param=name)
    if line.get("top_logprobs") is not None and line.get("logprobs") is None:
        line["logprobs"] = True
    return line


def _message(message: Message) -> dict[str, Any]:
    written: dict[str, Any] = {"role": message.role, "content": _content(message.content)}
    if message.role == "assistant" and (calls := getattr(message, "tool_calls", None)):
        written["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.function, "arguments": call.arguments}} for call in calls
        ]
    if message.role == "tool":
        named = {"tool_call_id": getattr(message, "tool_call_id", None), "name": getattr(message, "function", None)}
        written |= {name: value for name, value in named.items() if value is not None}
    return written


def _content(content: Any) -> str:
    """Return the text of a message; reasoning goes before it as inspect-ai writes it into histories."""
    if isinstance(content, str):
        return content
    for part in content:
        if part.type not in ("text", "reasoning"):
            raise RequestError(f"flexgen reads text only, and a message has a part of type {part.type!r}", code="unsupported_field")
    return "\n".join(part.text for part in content)


def stop_reason_of(finish_reason: str, usage: Mapping[str, int], max_model_len: int) -> str:
    """Return why an answer ended, in inspect-ai's words."""
    if finish_reason == "length" and usage["total_tokens"] >= max_model_len:
        return "model_length"
    return _STOP_REASONS.get(finish_reason, "unknown")


def choices_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the answers of a record, each with its text, finish_reason and, if they were asked for, logprobs."""
    names = [name for name in ("text", "finish_reason", "logprobs") if name in record]
    if not isinstance(record["text"], list):
        return [{name: record[name] for name in names}]
    return [dict(zip(names, values, strict=True)) for values in zip(*(record[name] for name in names), strict=True)]


class Seeds:
    """Gives every line without a seed one of its own, so that samples do not depend on what is answered beside them.

    The same line has another seed each time, so that epochs differ, and the same seeds in the next run.

    Args:
        base: The base of all seeds.
    """

    def __init__(self, base: int) -> None:
        self._base = base
        self._counts: Counter[bytes] = Counter()

    def with_seed(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """Return the line with a seed."""
        if line.get("seed") is not None:
            return dict(line)
        digest = hashlib.blake2b(json.dumps([self._base, line], sort_keys=True).encode(), digest_size=16).digest()
        self._counts[digest] += 1
        seed = hashlib.blake2b(digest + self._counts[digest].to_bytes(8, "little"), digest_size=7).digest()
        return {**line, "seed": int.from_bytes(seed, "little")}
