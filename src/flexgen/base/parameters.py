"""Checks of sampling parameters: their bounds, and the one form that every way to write a value is brought to."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from flexgen.base.scalars import as_float, as_int, as_list, plain, shown
from flexgen.errors import RequestError

MAX_CHOICES = 16384  # vLLM's bound on n
MAX_BIAS = 100.0  # OpenAI's
MAX_TEXTS = 4096  # of stop and of bad_words: each is looked for at every token
_MAX_INT = 2**63 - 1


def must_be(param: str, wanted: str, value: object) -> RequestError:
    """Make the error of a parameter that has a wrong value."""
    return RequestError(f"{param} must be {wanted}, not {shown(value)}", param=param)


def _integer(param: str, value: object, *, least: int, largest: int = _MAX_INT) -> int:
    number = as_int(value)
    if number is not None and least <= number <= largest:
        return number
    if largest < _MAX_INT:
        raise must_be(param, f"an integer from {least} to {largest}", value)
    in_range = number is None or number < least
    raise must_be(param, f"an integer of at least {least}" if in_range else "an integer that fits 64 bits", value)


def _seed(param: str, value: object) -> int | None:
    number = as_int(value)
    if value is not None and (number is None or not -_MAX_INT - 1 <= number <= _MAX_INT):
        raise must_be(param, "an integer that fits 64 bits", value)
    return number


def _or_none(param: str, value: object, *, least: int) -> int | None:
    return None if value is None else _integer(param, value, least=least)


def _number(param: str, value: object, *, least: float, largest: float = math.inf) -> float:
    number = as_float(value)
    if number is None or not least <= number <= largest:
        bounds = f"a number from {least:g} to {largest:g}" if largest < math.inf else f"a finite number of at least {least:g}"
        raise must_be(param, bounds, value)
    return number


def flag(param: str, value: object) -> bool:
    """Return true or false."""
    found = plain(value)
    if not isinstance(found, bool):
        raise must_be(param, "true or false", value)
    return found


def _several(param: str, value: object, wanted: str) -> list[Any]:
    values = [] if value is None else as_list(value)
    if values is None:
        raise must_be(param, wanted, value)
    return values


def texts(param: str, value: object, wanted: str = "a list of texts") -> tuple[str, ...]:
    """Return several texts, each once."""
    found = _several(param, value, wanted)
    for each in found:
        if not isinstance(each, str) or not each:
            raise must_be(param, "made of texts that are not empty", each)
    if len(found) > MAX_TEXTS:
        raise RequestError(f"{param} must be at most {MAX_TEXTS:,} texts, not {len(found):,}", param=param)
    return tuple(dict.fromkeys(map(str, found)))


def _text_or_texts(param: str, value: object) -> tuple[str, ...]:
    return texts(param, [value] if isinstance(value, str) else value, "a text or a list of texts")


def _ids(param: str, value: object) -> tuple[int, ...]:
    """Return several token ids, each once."""
    ids: dict[int, None] = {}
    for each in _several(param, value, "a list of token ids"):
        token_id = as_int(each)
        if token_id is None or not 0 <= token_id <= _MAX_INT:
            raise must_be(param, "a list of token ids", each)
        ids[token_id] = None
    return tuple(ids)


def _some_ids(param: str, value: object) -> tuple[int, ...] | None:
    ids = _ids(param, value)
    if value is not None and not ids:
        raise RequestError(f"{param} must be at least one token id", param=param)
    return ids or None


def _biases(param: str, value: object) -> dict[int, float] | None:
    """Return token id -> bias.  JSON writes the ids as text."""
    if not isinstance(value, (Mapping, type(None))):
        raise must_be(param, "an object of token ids and biases", value)
    biases: dict[int, float] = {}
    for key, each in (value or {}).items():
        written = re.fullmatch(r"([0-9]{1,19})(\.0+)?", key) if isinstance(key, str) else None
        token_id, bias = int(written[1]) if written else as_int(key), as_float(each)
        if token_id is None or not 0 <= token_id <= _MAX_INT:
            raise must_be(param, "an object whose keys are token ids", key)
        if bias is None:
            raise must_be(param, "an object whose values are finite numbers", each)
        biases[token_id] = min(MAX_BIAS, max(-MAX_BIAS, bias))
    return biases or None


# By name: the value in the form that is kept.  A repetition penalty that float32 holds cannot make float64 logits overflow.
CHECKS: Mapping[str, Callable[[str, object], Any]] = {
    "n": partial(_integer, least=1, largest=MAX_CHOICES),
    "presence_penalty": partial(_number, least=-2, largest=2),
    "frequency_penalty": partial(_number, least=-2, largest=2),
    "repetition_penalty": partial(_number, least=1e-38, largest=1e38),
    "temperature": partial(_number, least=0),
    "top_p": partial(_number, least=0, largest=1),
    "top_k": partial(_integer, least=-1),
    "min_p": partial(_number, least=0, largest=1),
    "seed": _seed,
    "stop": _text_or_texts,
    "stop_token_ids": _ids,
    "bad_words": texts,
    "ignore_eos": flag,
    "max_tokens": partial(_or_none, least=0),
    "min_tokens": partial(_integer, least=0),
    "logprobs": partial(_or_none, least=-1),
    "prompt_logprobs": partial(_or_none, least=-1),
    "include_stop_str_in_output": flag,
    "skip_special_tokens": flag,
    "logit_bias": _biases,
    "allowed_token_ids": _some_ids,
}
