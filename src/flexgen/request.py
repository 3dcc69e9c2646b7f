"""Requests and answers as values, with vLLM's names and defaults.  Knows nothing of text, files or engines."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from flexgen.errors import RequestError

MAX_SEED = 2**63 - 1
MAX_CHOICES = 16384  # vLLM's bound on n
MAX_BIAS = 100.0  # OpenAI's

# Keywords of vLLM whose effect we do not have, with the value that asks for none.  None asks for none everywhere.
_UNSUPPORTED: Mapping[str, Any] = {
    "best_of": 1, "detokenize": True, "extra_args": None, "flat_logprobs": False, "guided_decoding": None, "logits_processors": None,
    "logprob_token_ids": None, "output_kind": None, "prompt_logprobs": None, "repetition_detection": None,
    "skip_reading_prefix_cache": None, "spaces_between_special_tokens": True, "stream_interval": None, "structured_outputs": None,
    "thinking_token_budget": None, "truncate_prompt_tokens": None,
}  # fmt: skip

_Class = TypeVar("_Class")


def _names_keywords(cls: type[_Class]) -> type[_Class]:
    """Make a dataclass refuse keywords by name: unknown ones, and vLLM's whose effect we do not have."""
    dataclass_type: Any = cls
    known = [each.name for each in dataclasses.fields(dataclass_type)]
    init = dataclass_type.__init__

    @functools.wraps(init)
    def __init__(self: Any, **keywords: Any) -> None:
        for name, value in keywords.items():
            if name in _UNSUPPORTED and value is not None and (type(value), value) != (type(_UNSUPPORTED[name]), _UNSUPPORTED[name]):
                raise RequestError(f"{name}={value!r} is not supported yet", code="unsupported_field", param=name)
            if name not in known and name not in _UNSUPPORTED:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise RequestError(f"{cls.__name__} has no {name!r}{hint}", code="unknown_field", param=name)
        init(self, **{name: value for name, value in keywords.items() if name in known})

    dataclass_type.__init__ = __init__
    return cls


@_names_keywords
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one prompt is continued (vLLM's names and defaults).

    Attributes:
        n: how many answers; equal ones if temperature is 0.
        presence_penalty, frequency_penalty: taken off the logits of generated tokens, once, and as often as they came; in [-2, 2].
        repetition_penalty: logits of the prompt's and of generated tokens are divided by it, negative ones multiplied.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: keep the smallest set of tokens whose probability reaches this, in (0, 1].
        top_k: keep this many tokens; 0 or -1 keeps all.
        min_p: keep tokens at least this likely, relative to the likeliest, in [0, 1].
        seed: with the position it fixes every random choice; None derives one from the engine's seed and the request.
        stop: texts that end the answer and are cut off it; becomes a tuple.
        stop_token_ids: tokens that end the answer besides the model's own; becomes a tuple.
        bad_words: texts whose tokens are never completed; becomes a tuple.
        ignore_eos: go on after an end-of-sequence token.
        max_tokens: most tokens to generate; None means up to the model's context.
        min_tokens: before these many tokens nothing stops the answer.
        logprobs: log probabilities of so many likeliest tokens and of the generated one, at each token; -1 of all.
        include_stop_str_in_output: leave in the text what stopped it.
        skip_special_tokens: leave special tokens out of the text.
        logit_bias: token id -> added to its logit, clamped to [-100, 100]; becomes a dict with integer keys.
        allowed_token_ids: nothing else is generated; becomes a tuple.

    Raises:
        RequestError: on a keyword or value that cannot be served, naming it.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    bad_words: Sequence[str] | None = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logit_bias: Mapping[int, float] | Mapping[str, float] | None = field(default=None, hash=False)
    allowed_token_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            _check(isinstance(getattr(self, name), bool), name, "true or false")
        allowed = self.allowed_token_ids
        _check(allowed is None or len(_ids("allowed_token_ids", allowed)) > 0, "allowed_token_ids", "at least one token id")
        normal = {
            "stop": _texts("stop", [self.stop] if isinstance(self.stop, str) else self.stop),
            "stop_token_ids": _ids("stop_token_ids", self.stop_token_ids),
            "bad_words": _texts("bad_words", self.bad_words),
            "logit_bias": _biases(self.logit_bias),
            "allowed_token_ids": None if allowed is None else _ids("allowed_token_ids", allowed),
        }
        for name, value in normal.items():
            object.__setattr__(self, name, value)

    def _check_numbers(self) -> None:
        _check(_is_int(self.n) and 1 <= self.n <= MAX_CHOICES, "n", f"an integer from 1 to {MAX_CHOICES}")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(_is_number(value) and -2 <= value <= 2, name, "a number in [-2, 2]")
        _check(_is_number(self.repetition_penalty) and self.repetition_penalty > 0, "repetition_penalty", "a finite number above 0")
        _check(_is_number(self.temperature) and self.temperature >= 0, "temperature", "a finite number of at least 0")
        _check(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", "a number in (0, 1]")
        _check(_is_int(self.top_k) and self.top_k >= -1, "top_k", "an integer of at least -1")
        _check(_is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", "a number in [0, 1]")
        _check(self.seed is None or (_is_int(self.seed) and abs(self.seed) <= MAX_SEED), "seed", "a 64-bit integer")
        _check(self.max_tokens is None or (_is_int(self.max_tokens) and self.max_tokens >= 1), "max_tokens", "an integer of at least 1")
        _check(_is_int(self.min_tokens) and self.min_tokens >= 0, "min_tokens", "an integer of at least 0")
        _check(self.max_tokens is None or self.min_tokens <= self.max_tokens, "min_tokens", f"at most max_tokens={self.max_tokens}")
        _check(self.logprobs is None or (_is_int(self.logprobs) and self.logprobs >= -1), "logprobs", "an integer of at least -1")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_SEED  # no float holds more


def _check(good: bool, param: str, wanted: str) -> None:
    if not good:
        raise RequestError(f"{param} must be {wanted}", param=param)


def _texts(param: str, value: Any) -> tuple[str, ...]:
    """Several texts, each once."""
    _check(value is None or isinstance(value, (list, tuple)), param, "a list of texts")
    _check(all(isinstance(each, str) and each for each in value or ()), param, "made of texts that are not empty")
    return tuple(dict.fromkeys(value or ()))


def _ids(param: str, value: Any) -> tuple[int, ...]:
    """Several token ids, each once."""
    _check(value is None or isinstance(value, (list, tuple)), param, "a list of token ids")
    _check(all(_is_int(each) and each >= 0 for each in value or ()), param, "a list of token ids")
    return tuple(dict.fromkeys(value or ()))


def _biases(value: Any) -> dict[int, float] | None:
    """Token id -> bias; JSON writes the ids as text."""
    _check(value is None or isinstance(value, Mapping), "logit_bias", "an object of token ids and biases")
    biases: dict[int, float] = {}
    for key, bias in (value or {}).items():
        token_id: Any = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20 else key
        _check(_is_int(token_id) and token_id >= 0 and _is_number(bias), "logit_bias", "an object of token ids and finite biases")
        biases[token_id] = min(MAX_BIAS, max(-MAX_BIAS, float(bias)))
    return biases or None


class Stops(Protocol):
    """The stop strings of one request, as the engine sees them."""

    def __call__(self, token_ids: Sequence[int]) -> str | None:
        """The stop string that has ended the answer, told after each generated token.

        Args:
            token_ids: all that was generated.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Natural log probabilities at one generated token, by the model's own logits: before penalties, masks and temperature.

    Attributes:
        token_ids: the generated token, then as many of the likeliest as were asked for, best first (it may be among them).
        logprobs: of `token_ids`.
        rank: of the generated token, from 1.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What was generated so far; `logprobs` has one entry per token if they were asked for."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None

    def __post_init__(self) -> None:
        if self.logprobs is not None and len(self.logprobs) != len(self.token_ids):
            raise ValueError(f"{len(self.logprobs)} logprobs for {len(self.token_ids)} generated tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRequest:
    """A request as the engine sees it: ids in, ids out.

    Attributes:
        index: the engine hands it back with the answer; unique among the requests of a run.
        prompt_token_ids: at least one id.
        max_tokens: resolved (never None), at least 1; prompt and answer together fit the context.
        seed: resolved; samples depend on (seed, position) only.
        stop_token_ids: every id that ends the answer (the model's own included unless `ignore_eos`).
        logit_bias: (token id, bias), each id once. bad_words_token_ids: ids whose last is not generated after the others.
        num_logprobs: None for none, -1 for all.
        stops: None without stop strings.
        generated: by an earlier run; the answer goes on after it, and `max_tokens` counts it.
    """

    index: int
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    num_logprobs: int | None = None
    stops: Stops | None = None
    generated: Generated = Generated()

    @property
    def may_end_early(self) -> bool:
        """Whether the answer may have fewer than `max_tokens`."""
        return (bool(self.stop_token_ids) or self.stops is not None) and self.min_tokens < self.max_tokens

    def __post_init__(self) -> None:
        if self.num_logprobs is not None and self.generated.token_ids and self.generated.logprobs is None:
            raise ValueError("logprobs are asked for, and those of the tokens generated before are missing")


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """How far the answer to a request has come."""

    index: int
    generated: Generated


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenResult:
    """What the engine answers.

    Attributes:
        index: the request's.
        token_ids: generated ids, those of an earlier run included; the stop token, where one ended the answer, is the last.
        finish_reason: "stop" (a stop token or string), "length" (max_tokens), or "error".
        stop_string: what ended the answer, if a string did.
        logprobs: one entry per generated token, if asked for.
        error: set when the request failed alone (never fitted, non-finite logits, every token masked).
        num_preemptions: how often its KV was dropped and recomputed.
    """

    index: int
    token_ids: tuple[int, ...] = ()
    finish_reason: str = "length"
    stop_string: str | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    error: RequestError | None = None
    num_preemptions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """The log probability of one token at one position (vLLM's fields, and one more).

    Attributes:
        rank: 1 for the likeliest.
        decoded_token: its own text as it is within a text, with its leading space.
        token_bytes: its own bytes where it is a part of a character, whose text is a replacement character; None where they
            are those of the text.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None
    token_bytes: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One answer to one prompt (vLLM's fields).

    Attributes:
        stop_reason: the stop token or string that ended it; None for the model's own end; the code of an error.
        cumulative_logprob: of the generated tokens together, if logprobs were asked for.
        logprobs: per generated token, token id -> its log probability; the generated token comes first.
        text_offsets: per generated token, where its text begins in that of the answer (before anything is cut off), if logprobs
            were asked for and there is a tokenizer.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    text_offsets: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """All answers to one prompt (vLLM's fields)."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True
