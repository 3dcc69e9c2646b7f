"""Writes log probabilities in the two formats of OpenAI's endpoints, for completions and for chats."""

from __future__ import annotations

import itertools
from typing import Any

from flexgen.request import CompletionOutput, Logprob

_LEAST = -9999.0  # stands for -infinity, which JSON does not have; vLLM's value


def completion_logprobs(completion: CompletionOutput) -> dict[str, Any] | None:
    """Return the format of /v1/completions: parallel lists, and for each token a dict of the likeliest ones and the generated one."""
    if completion.logprobs is None:
        return None
    steps = list(zip(completion.token_ids, completion.logprobs, strict=True))
    tokens = [_token(token_id, step[token_id]) for token_id, step in steps]
    offsets = completion.text_offsets
    return {
        "tokens": tokens,
        "token_logprobs": [_value(step[token_id]) for token_id, step in steps],
        "top_logprobs": [_by_token(token_id, step) for token_id, step in steps],
        "text_offset": list(offsets) if offsets is not None else [0, *itertools.accumulate(map(len, tokens))][: len(tokens)],
    }


def chat_logprobs(completion: CompletionOutput, num_top: int) -> dict[str, Any] | None:
    """Return the format of /v1/chat/completions: an object for each token, with the `num_top` likeliest tokens in it (-1: all)."""
    if completion.logprobs is None:
        return None
    return {"content": token_logprobs(completion, num_top), "refusal": None}


def token_logprobs(completion: CompletionOutput, num_top: int) -> list[dict[str, Any]]:
    """Return an object for each generated token, with the `num_top` likeliest tokens in it (-1: all)."""
    return [
        {**_entry(token_id, step[token_id]), "top_logprobs": [_entry(*each) for each in _likeliest(token_id, step, num_top)]}
        for token_id, step in zip(completion.token_ids, completion.logprobs or (), strict=True)
    ]


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
