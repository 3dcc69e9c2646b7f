"""Writes log probabilities in the two formats of OpenAI's endpoints, for completions and for chats."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from flexgen.request import CompletionOutput, Logprob, RequestOutput

_LEAST = -9999.0  # stands for -infinity, which JSON does not have; vLLM's value


def completion_logprobs(completion: CompletionOutput, echoed: RequestOutput | None = None) -> dict[str, Any] | None:
    """Return the format of /v1/completions: parallel lists, and for each token a dict of the likeliest ones and the token itself.

    Args:
        completion: The completion.
        echoed: The output with the prompt, if the text of the answer begins with it; its tokens come first then, without log probabilities
            for the very first.
    """
    if completion.logprobs is None:
        return None
    steps: list[tuple[int, dict[int, Logprob]]] = list(zip(completion.token_ids, completion.logprobs, strict=True))
    tokens = [_token(token_id, step[token_id]) for token_id, step in steps]
    offsets = list(completion.text_offsets) if completion.text_offsets is not None else _starts(tokens)
    values: list[float | None] = [_value(step[token_id]) for token_id, step in steps]
    likeliest: list[dict[str, float] | None] = [_by_token(token_id, step) for token_id, step in steps]
    if echoed is not None and echoed.prompt_logprobs is not None and echoed.prompt is not None:
        known = list(zip(echoed.prompt_token_ids, echoed.prompt_logprobs, strict=True))
        words = ["" if step is None else _token(token_id, step[token_id]) for token_id, step in known]
        words[0] = echoed.prompt[: max(len(echoed.prompt) - sum(map(len, words)), 0)]
        tokens, offsets = words + tokens, _starts(words) + [len(echoed.prompt) + offset for offset in offsets]
        values = [None if step is None else _value(step[token_id]) for token_id, step in known] + values
        likeliest = [None if step is None else _by_token(token_id, step) for token_id, step in known] + likeliest
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": likeliest, "text_offset": offsets}


def _starts(tokens: Sequence[str]) -> list[int]:
    """Return where each token begins in the text that they make up."""
    return [0, *itertools.accumulate(map(len, tokens))][: len(tokens)]


def chat_logprobs(completion: CompletionOutput, num_top: int) -> dict[str, Any] | None:
    """Return the format of /v1/chat/completions: an object for each token, with the `num_top` likeliest tokens in it (-1: all)."""
    if completion.logprobs is None:
        return None
    return {"content": generated_logprobs(completion, num_top), "refusal": None}


def generated_logprobs(completion: CompletionOutput, num_top: int) -> list[dict[str, Any]]:
    """Return an object for each generated token, with the `num_top` likeliest tokens in it (-1: all)."""
    return [_object(*each, num_top) for each in zip(completion.token_ids, completion.logprobs or (), strict=True)]


def prompt_logprobs(output: RequestOutput, num_top: int) -> list[dict[str, Any] | None]:
    """Return an object for each token of the prompt, with the `num_top` likeliest tokens in it (-1: all); None for the first token."""
    steps = zip(output.prompt_token_ids, output.prompt_logprobs or (), strict=True)
    return [None if step is None else _object(token_id, step, num_top) for token_id, step in steps]


def vllm_prompt_logprobs(output: RequestOutput) -> list[dict[str, dict[str, Any]] | None]:
    """Return vLLM's format for the tokens of the prompt: for each, token id -> values; None for the first token."""
    return [
        None if step is None else {str(token_id): _vllm_entry(each) for token_id, each in step.items()}
        for step in output.prompt_logprobs or ()
    ]


def _vllm_entry(logprob: Logprob) -> dict[str, Any]:
    return {"logprob": _value(logprob), "rank": logprob.rank, "decoded_token": logprob.decoded_token}


def _object(token_id: int, step: dict[int, Logprob], num_top: int) -> dict[str, Any]:
    return {**_entry(token_id, step[token_id]), "top_logprobs": [_entry(*each) for each in _likeliest(token_id, step, num_top)]}


def _likeliest(token_id: int, step: dict[int, Logprob], num_top: int) -> list[tuple[int, Logprob]]:
    """Return the likeliest tokens, best first.

    The engine returns the generated token beside as many as were asked for; it is left out here unless it is one of them.
    """
    others = [each for each in step.items() if num_top < 0 or len(step) <= num_top or each[0] != token_id]
    return sorted(others, key=lambda each: -each[1].logprob)


def _by_token(generated: int, step: dict[int, Logprob]) -> dict[str, float]:
    """Return the log probabilities of a step by token text, best first.

    Of several tokens with the same text, the generated one or else the best has it as its key; the keys of the others are their ids.
    """
    best_first = sorted(step.items(), key=lambda each: -each[1].logprob)
    owners: dict[str, int] = {_token(generated, step[generated]): generated}
    for token_id, logprob in best_first:
        owners.setdefault(_token(token_id, logprob), token_id)
    own = set(owners.values())
    return {_token(token_id, logprob) if token_id in own else _by_id(token_id): _value(logprob) for token_id, logprob in best_first}


def _entry(token_id: int, logprob: Logprob) -> dict[str, Any]:
    token = _token(token_id, logprob)
    return {"token": token, "logprob": _value(logprob), "bytes": list(logprob.token_bytes or token.encode())}


def _token(token_id: int, logprob: Logprob) -> str:
    return logprob.decoded_token if logprob.decoded_token is not None else _by_id(token_id)


def _by_id(token_id: int) -> str:
    return f"token_id:{token_id}"  # as vLLM writes it


def _value(logprob: Logprob) -> float:
    return max(logprob.logprob, _LEAST)
