"""Requests and answers as values, with vLLM's names and defaults.  Knows nothing of text, files or engines."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from flexgen.errors import RequestError

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request is continued (vLLM's names and defaults).

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: keep the smallest set of tokens whose probability reaches this, in (0, 1].
        top_k: keep this many tokens; 0 or -1 keeps all.
        seed: with the position it fixes every random choice; None derives one from the engine's seed and the request.
        max_tokens: most tokens to generate; None means up to the model's context.
        ignore_eos: go on after an end-of-sequence token.
        stop_token_ids: tokens that end the answer besides the model's own.

    Raises:
        RequestError: on a value out of range, naming the field.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int | None = 16
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        _check(_is_number(self.temperature) and self.temperature >= 0, "temperature", "a finite number of at least 0")
        _check(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", "a number in (0, 1]")
        _check(_is_int(self.top_k) and self.top_k >= -1, "top_k", "an integer of at least -1")
        _check(self.seed is None or (_is_int(self.seed) and abs(self.seed) <= MAX_SEED), "seed", "a 64-bit integer")
        _check(self.max_tokens is None or (_is_int(self.max_tokens) and self.max_tokens >= 1), "max_tokens", "an integer of at least 1")
        _check(isinstance(self.ignore_eos, bool), "ignore_eos", "true or false")
        _check(isinstance(self.skip_special_tokens, bool), "skip_special_tokens", "true or false")
        ids = self.stop_token_ids
        _check(isinstance(ids, (tuple, list)) and all(_is_int(i) and i >= 0 for i in ids), "stop_token_ids", "a list of token ids")
        object.__setattr__(self, "stop_token_ids", tuple(ids))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_SEED  # no float holds more


def _check(good: bool, param: str, wanted: str) -> None:
    if not good:
        raise RequestError(f"{param} must be {wanted}", param=param)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRequest:
    """A request as the engine sees it: ids in, ids out.

    Attributes:
        index: the engine hands it back with the answer; unique among the requests of a run.
        prompt_token_ids: at least one id.
        max_tokens: resolved (never None), at least 1; prompt and answer together fit the context.
        stop_token_ids: every id that ends the answer (the model's own included unless `ignore_eos`).
        seed: resolved; samples depend on (seed, position) only.
    """

    index: int
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenResult:
    """What the engine answers.

    Attributes:
        index: the request's.
        token_ids: generated ids; the stop token, where one ended the answer, is the last.
        finish_reason: "stop" (a stop token), "length" (max_tokens), or "error".
        error: set when the request failed alone (never fitted, non-finite logits).
        num_preemptions: how often its KV was dropped and recomputed.
    """

    index: int
    token_ids: tuple[int, ...] = ()
    finish_reason: str = "length"
    error: RequestError | None = None
    num_preemptions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One answer to one prompt (vLLM's fields)."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None
    logprobs: None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """All answers to one prompt (vLLM's fields)."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True
