"""Writes log probabilities in the two formats of OpenAI's endpoints, for completions and for chats."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Sequence
from typing import Any

from flexgen.outputs import CompletionOutput, Logprob, RequestOutput

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
    steps = list(zip(completion.token_ids, completion.logprobs, strict=True))
    tokens = [_token(token_id, step[token_id]) for token_id, step in steps]
    offsets = list(completion.text_offsets) if completion.text_offsets is not None else _starts(tokens)
    known: list[tuple[int, dict[int, Logprob] | None]] = []
    if echoed is not None and echoed.prompt_logprobs is not None:
        known = list(zip(echoed.prompt_token_ids, echoed.prompt_logprobs, strict=True))
        words, places, length = _echoed(echoed.prompt, known)
        tokens, offsets = words + tokens, places + [length + offset for offset in offsets]
    every = [*known, *steps]
    return {
        "tokens": tokens,
        "token_logprobs": [None if step is None else _value(step[token_id]) for token_id, step in every],
        "top_logprobs": [None if step is None else _by_token(token_id, step) for token_id, step in every],
        "text_offset": offsets,
    }


def _echoed(text: str | None, known: Sequence[tuple[int, dict[int, Logprob] | None]]) -> tuple[list[str], list[int], int]:
    """Return the tokens of a prompt, where the text of each begins, and the length of the whole text.

    Offsets are counted from the end, because the tokens of a text may begin with special ones that are not in it.

    Args:
        text: The text of the prompt; None if there is no tokenizer.
        known: The token ids of the prompt, each with its log probabilities (None for the first).
    """
    words = [_by_id(token_id) if step is None else _token(token_id, step[token_id]) for token_id, step in known]
    if text is None:
        return words, _starts(words), sum(map(len, words))
    own = [word if step is None else step[token_id].token_bytes or word for (token_id, step), word in zip(known, words, strict=True)]
    words[0], starts = _from_end(text, own[1:])
    return words, [0, *starts], len(text)


def _from_end(text: str, pieces: Sequence[str | bytes]) -> tuple[str, list[int]]:
    """Return what stands in a text before the pieces that it ends with, and where each of them begins.

    Args:
        text: The text.
        pieces: The text of each token, or its bytes where it is a part of a character.  Parts that stand together make up whole characters,
            or what decoders write for bytes that are none.
    """
    end, before, starts = len(text), text, list[int]()
    for are_parts, run in itertools.groupby(reversed(pieces), key=lambda piece: isinstance(piece, bytes)):
        if are_parts:
            parts = [piece for piece in run if isinstance(piece, bytes)][::-1]
            first = max(end - sum(map(len, parts)), 0)  # a character has a byte or more
            rest, places = _parts_from_end(text[first:end], parts)
            starts += [first + place for place in reversed(places)]
            before = text[:first] + rest
            end = places[0] + first
            continue
        for piece in run:
            end = max(end - len(piece), 0)
            starts.append(end)
        before = text[:end]
    return before, starts[::-1]


def _parts_from_end(text: str, parts: Sequence[bytes]) -> tuple[str, list[int]]:
    """Return what stands in a text before the parts of characters that it ends with, and the character in which each part begins."""
    encoded, own = text.encode(), b"".join(parts)
    whole = encoded.endswith(own)
    before = encoded[: -len(own)] if whole else text[: max(len(text) - len(own.decode(errors="replace")), 0)].encode()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    length = len(decoder.decode(before))
    places: list[int] = []
    for part in parts:
        places.append(length)
        length += len(decoder.decode(part))
    return before.decode(errors="replace"), places


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
