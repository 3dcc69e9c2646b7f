"""HELM's requests as lines of a job, and records of a job as HELM's completions.  Plain values: HELM itself is not needed here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flexgen.errors import RequestError


class HelmRequest(Protocol):
    """The fields of `helm.common.request.Request` that have a meaning here."""

    @property
    def prompt(self) -> str: ...

    @property
    def messages(self) -> list[dict[str, str]] | None: ...

    @property
    def multimodal_prompt(self) -> object | None: ...

    @property
    def response_format(self) -> object | None: ...

    @property
    def temperature(self) -> float: ...

    @property
    def num_completions(self) -> int: ...

    @property
    def max_tokens(self) -> int: ...

    @property
    def stop_sequences(self) -> list[str]: ...

    @property
    def echo_prompt(self) -> bool: ...

    @property
    def top_p(self) -> float: ...

    @property
    def presence_penalty(self) -> float: ...

    @property
    def frequency_penalty(self) -> float: ...

    @property
    def random(self) -> str | None: ...


def lead_of(plain: Sequence[int], special: Sequence[int]) -> tuple[int, ...]:
    """Return the special tokens that a tokenizer puts before every text, such as the beginning of a sequence.

    Args:
        plain: The tokens of a text.
        special: The tokens of the same text with special tokens.
    """
    starts = range(len(special) - len(plain) + 1)
    return next((tuple(special[:start]) for start in starts if list(special[start : start + len(plain)]) == list(plain)), ())


def num_hidden(lead: Sequence[int], ids: Sequence[int]) -> int:
    """Return how many special tokens the model reads before a prompt; none where the prompt begins with them itself.

    They are hidden from HELM, which counts the tokens of prompts without them.
    """
    return 0 if list(ids[: len(lead)]) == list(lead) else len(lead)


def refusal(request: HelmRequest) -> str | None:
    """Return why a request cannot be served, or None."""
    if request.multimodal_prompt is not None:
        return "flexgen reads text only, and the request has a multimodal prompt"
    if request.response_format is not None:
        return "flexgen does not support HELM's response_format"
    if request.messages is not None and request.echo_prompt:
        return "a conversation cannot be echoed: echo_prompt needs a prompt"
    return None


def cache_key(request: HelmRequest, *, model: str, revision: str | None, chat: bool, seed: int) -> dict[str, Any]:
    """Return what the answer to a request depends on, as the key of HELM's cache.

    `top_k_per_token` is not part of it, because HELM's results have no place for further candidates.

    Args:
        request: The request.
        model: The folder or hub id of the model.
        revision: The revision of the hub repository.
        chat: Whether the prompt is put into the model's chat template.
        seed: The base of the seeds of all requests.
    """
    key: dict[str, Any] = {
        "engine": "flexgen",
        "model": model,
        "chat": chat,
        "seed": seed,
        "prompt": request.prompt,
        "temperature": request.temperature,
        "n": request.num_completions,
        "max_tokens": request.max_tokens,
        "stop": list(request.stop_sequences),
        "echo": request.echo_prompt,
        "top_p": request.top_p,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
    }
    optional = {"revision": revision, "messages": request.messages, "random": request.random}
    return {**key, **{name: value for name, value in optional.items() if value is not None}}


def digest_of(value: object) -> str:
    """Return a digest of a JSON value."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def line_of(request: HelmRequest, key: Mapping[str, Any], prompt: str | Sequence[int]) -> dict[str, Any]:
    """Return the line of a job that asks what a request asks.

    Its id and its seed depend on the key alone, so that an answer does not depend on the requests beside it.

    Args:
        request: The request.
        key: Its key, see `cache_key`.
        prompt: The token ids that the model reads; the text itself where it has none, or goes into the chat template.
    """
    identity = digest_of(key)
    line: dict[str, Any] = {
        "id": identity,
        "seed": int(identity[:15], 16),
        "temperature": request.temperature,
        "top_p": request.top_p,
        "n": request.num_completions,
        "max_tokens": request.max_tokens,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
    }
    if request.stop_sequences:
        line["stop"] = list(request.stop_sequences)
    if key["chat"]:
        return {**line, "messages": request.messages or [{"role": "user", "content": request.prompt}], "logprobs": True}
    if request.echo_prompt:
        line["prompt_logprobs"] = 0
    return {**line, "prompt": prompt if isinstance(prompt, str) else list(prompt), "logprobs": 0}


def error_of(record: Mapping[str, Any]) -> RequestError | None:
    """Return the error that a record holds, or None."""
    error = record.get("error")
    return None if error is None else RequestError(error["message"], code=error["code"], param=error["param"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Echo:
    """The prompt of a request that wants it in front of every completion.

    Attributes:
        text: The text of the prompt.
        first: The text of its first token, which has no log probability if the model reads nothing before it.
        hidden: The number of special tokens that the model read before it.
    """

    text: str
    first: str
    hidden: int


def completions_of(record: Mapping[str, Any], echo: Echo | None = None) -> list[dict[str, Any]]:
    """Return the completions of a record as JSON values: each has its text, its tokens with their log probabilities, and why it ended.

    Args:
        record: The record of an answer.
        echo: The prompt, if the request wants it in front of every completion.
    """
    answers = _answers(record)
    if echo is None:
        return answers
    tokens = _prompt_tokens(record["prompt_logprobs"], echo)
    return [{**each, "text": echo.text + each["text"], "tokens": tokens + each["tokens"]} for each in answers]


def _answers(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = ("text", "logprobs", "finish_reason", "stop_reason")
    several = isinstance(record["text"], list)
    columns = [record[name] if several else [record[name]] for name in names]
    return [_answer(*each) for each in zip(*columns, strict=True)]


def _answer(text: str, logprobs: Sequence[Mapping[str, Any]], finish_reason: str, stop_reason: object) -> dict[str, Any]:
    """Return one completion.  Its tokens are those of its text: a stop string or the end of the text is cut off both."""
    reason = "endoftext" if finish_reason == "stop" and stop_reason is None else finish_reason
    kept = logprobs[: _num_kept(logprobs, stop_reason)] if finish_reason == "stop" else logprobs
    return {"text": text, "tokens": [[_token(each), each["logprob"]] for each in kept], "finish_reason": reason}


def _num_kept(logprobs: Sequence[Mapping[str, Any]], stop_reason: object) -> int:
    """Return the number of tokens before the end: those that begin before the stop string, or all but the last token."""
    if not isinstance(stop_reason, str):
        return max(len(logprobs) - 1, 0)
    stop, tail = stop_reason.encode(), b""
    for index in range(len(logprobs) - 1, -1, -1):
        tail = bytes(logprobs[index]["bytes"]) + tail
        if stop in tail:
            return index if tail.startswith(stop) else index + 1
    return len(logprobs)


def _prompt_tokens(logprobs: Sequence[Mapping[str, Any] | None], echo: Echo) -> list[list[Any]]:
    return [[echo.first, 0.0] if each is None else [_token(each), each["logprob"]] for each in logprobs[echo.hidden :]]


def _token(entry: Mapping[str, Any]) -> str:
    """Return the text of a token; that of a part of a character is written as HELM writes it, for example bytes:\\xe2\\x80."""
    token, raw = entry["token"], bytes(entry["bytes"])
    return token if token.encode() == raw else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
