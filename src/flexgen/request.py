"""Requests and results as values, with vLLM's names and defaults.  Knows nothing of text, files or engines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from flexgen.base.keywords import names_keywords
from flexgen.base.parameters import CHECKS, must_be
from flexgen.base.structured import StructuredOutputsParams, structured_outputs
from flexgen.errors import RequestError

if TYPE_CHECKING:
    import numpy as np

# Keywords of vLLM whose effect is not supported, with the value that asks for no effect, as None always does.
_UNSUPPORTED: Mapping[str, Any] = {
    "best_of": 1, "detokenize": True, "extra_args": None, "flat_logprobs": False, "guided_decoding": None, "logits_processors": None,
    "logprob_token_ids": None, "output_kind": None, "repetition_detection": None,
    "skip_reading_prefix_cache": None, "spaces_between_special_tokens": True, "stream_interval": None, "thinking_token_budget": None,
    "truncate_prompt_tokens": None,
}  # fmt: skip

_CHECKS: Mapping[str, Callable[[str, object], Any]] = {**CHECKS, "structured_outputs": structured_outputs}


@names_keywords(_UNSUPPORTED)
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """The sampling parameters of one prompt (vLLM's names and defaults).

    Numbers may be those of numpy or torch, integers may be written as 16.0, and lists may be anything that holds several values; all
    are converted to plain values.

    Attributes:
        n: Number of answers; they are equal if temperature is 0.
        presence_penalty: Number subtracted once from the logits of generated tokens, in [-2, 2].
        frequency_penalty: Number subtracted from the logits of generated tokens once per occurrence, in [-2, 2].
        repetition_penalty: Number by which logits of tokens in the prompt and the answer are divided, or multiplied if they are negative;
            from 1e-38 to 1e38.
        temperature: Number by which logits are divided; 0 is greedy.
        top_p: Probability that the smallest set of tokens to sample from must reach, in (0, 1]; 0 is allowed where temperature is 0.
        top_k: Number of likeliest tokens to sample from; 0 or -1 for all.
        min_p: Least probability of a token relative to that of the likeliest, in [0, 1].
        seed: Seed that determines every random choice together with the position; None derives one from the engine's seed and the request.
        stop: At most 4,096 texts that end the answer and are cut off it; becomes a tuple.
        stop_token_ids: Tokens that end the answer besides the model's own; becomes a tuple.
        bad_words: At most 4,096 texts whose tokens are never completed; becomes a tuple.
        ignore_eos: Whether to go on after an end-of-sequence token.
        max_tokens: Most tokens to generate; 0 to generate nothing, as for prompts that are only scored; None for as many as the model's
            context allows.
        min_tokens: Number of tokens before which nothing stops the answer.
        logprobs: Number of likeliest tokens whose log probabilities are returned beside the generated one's; -1 is all.
        prompt_logprobs: Number of likeliest tokens whose log probabilities are returned beside those of the prompt's own tokens; -1 is all,
            None does not score the prompt.
        include_stop_str_in_output: Whether the stop string stays in the text.
        skip_special_tokens: Whether special tokens are left out of the text.
        logit_bias: Token id -> number added to its logit, clamped to [-100, 100]; becomes a dict with integer keys.
        allowed_token_ids: The only tokens that may be generated; becomes a tuple.
        structured_outputs: What the answer must consist of; an object with the fields of StructuredOutputsParams becomes one.

    Raises:
        RequestError: A keyword or value cannot be served; the message names it.
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
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logit_bias: Mapping[int, float] | Mapping[str, float] | None = field(default=None, hash=False)
    allowed_token_ids: Sequence[int] | None = None
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            if (value := getattr(self, each.name)) is not each.default:
                object.__setattr__(self, each.name, _CHECKS[each.name](each.name, value))
        if self.top_p == 0 and self.temperature > 0:
            raise must_be("top_p", "a number above 0, unless temperature is 0", self.top_p)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise must_be("min_tokens", f"at most max_tokens={self.max_tokens}", self.min_tokens)


class Stops(Protocol):
    """The stop strings of one request, as the engine sees them."""

    def __call__(self, token_ids: Sequence[int]) -> str | None:
        """Return the stop string that ends the answer, or None; called after each generated token.

        Args:
            token_ids: All tokens that were generated so far.
        """
        ...


class Guide(Protocol):
    """The constraint on one answer, as the engine sees it.

    What its methods return depends on the ids alone.  What was found out for fewer ids is remembered, so that each further id costs the
    same.
    """

    def prepare(self, token_ids: Sequence[int]) -> None:
        """Begin to find out on another thread which tokens may come next, so that `allowed` need not wait.

        Args:
            token_ids: All tokens that were generated so far.

        Raises:
            RequestError: The constraint cannot be followed any further.
        """
        ...

    def allowed(self, token_ids: Sequence[int]) -> np.ndarray:
        """Return whether each token of the vocabulary may come next, (vocab,) bool; tokens beyond its end may not.

        Args:
            token_ids: All tokens that were generated so far.

        Raises:
            RequestError: See `prepare`.
        """
        ...

    def is_complete(self, token_ids: Sequence[int]) -> bool:
        """Return whether these tokens are a whole answer that nothing can continue.

        Args:
            token_ids: All tokens that were generated so far.

        Raises:
            RequestError: See `prepare`.
        """
        ...

    def forget(self) -> None:
        """Free what is remembered, because the answer has ended."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Natural log probabilities at one generated or scored token, from the model's own logits (before penalties, masks and temperature).

    Attributes:
        token_ids: The token itself, then as many of the likeliest as were asked for, best first (it may be among them).
        logprobs: Log probability of each of `token_ids`.
        rank: Rank of the token, from 1; None for a token of a prompt that is not among the likeliest ones.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    rank: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """The part of an answer that was generated so far.

    Attributes:
        token_ids: The generated tokens.
        logprobs: One entry per token if log probabilities were asked for, otherwise None.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None

    def __post_init__(self) -> None:
        if self.logprobs is not None and len(self.logprobs) != len(self.token_ids):
            raise ValueError(f"{len(self.logprobs)} logprobs for {len(self.token_ids)} generated tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRequest:
    """A request as the engine sees it: ids in, ids out.

    Attributes:
        index: Number that the engine hands back with the answer; unique among the requests of a run.
        prompt_token_ids: The prompt, at least one id.
        max_tokens: Most tokens to generate, at least 1, or 0 for a prompt that is only scored; prompt and answer together fit the context.
        seed: Seed of the request; samples depend only on seed and position.
        stop_token_ids: Every id that ends the answer (the model's own included unless `ignore_eos`).
        logit_bias: Pairs of token id and bias, each id once.
        bad_words_token_ids: Sequences of ids; the last id of each is not generated after the others.
        num_logprobs: Number of log probabilities per token; None for none, -1 for all.
        num_prompt_logprobs: Number of likeliest tokens whose log probabilities are wanted beside those of the prompt's tokens; None if the
            prompt is not scored, -1 for all.
        first_scored: The position of the first token of the prompt that is scored, at least 1, because nothing predicts the first token.
        alternatives: Tokens that are scored as alternatives of the token after the prompt; needs `num_prompt_logprobs`.
        stops: The stop strings; None without any.
        guide: The constraint on the answer; None without any.
        generated: The tokens that an earlier run generated.  The answer goes on after them, and `max_tokens` counts them.
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
    num_prompt_logprobs: int | None = None
    first_scored: int = 1
    alternatives: tuple[int, ...] = ()
    stops: Stops | None = None
    guide: Guide | None = None
    generated: Generated = Generated()

    @property
    def may_end_early(self) -> bool:
        """Whether the answer may have fewer than `max_tokens`."""
        has_end = bool(self.stop_token_ids) or self.stops is not None or self.guide is not None
        return has_end and self.min_tokens < self.max_tokens

    @property
    def least_tokens(self) -> int:
        """The fewest tokens of the answer."""
        return min(self.min_tokens, self.max_tokens) if self.may_end_early else self.max_tokens

    @property
    def sharable(self) -> tuple[int, ...]:
        """The leading tokens of the prompt, of which all but the last may be computed by another request that begins with them.

        A sequence computes the positions itself whose logits it needs: after its last token, and before each token that is scored.
        """
        return self.prompt_token_ids if self.num_prompt_logprobs is None else self.prompt_token_ids[: self.first_scored]

    @property
    def offered(self) -> tuple[int, ...]:
        """The tokens of the prompt after the sharable ones that this request computes, so that others can begin with them, too."""
        return self.prompt_token_ids[len(self.sharable) : self.num_computed]

    @property
    def num_computed(self) -> int:
        """The number of tokens of the prompt that are computed: all if an answer follows, else those before the last token to score."""
        if self.max_tokens or self.alternatives:
            return len(self.prompt_token_ids)
        is_scored = self.num_prompt_logprobs is not None and self.first_scored < len(self.prompt_token_ids)
        return len(self.prompt_token_ids) - 1 if is_scored else 0

    @property
    def num_scored(self) -> int:
        """The number of positions of the prompt at which tokens are scored; alternatives of each other have one position."""
        if self.num_prompt_logprobs is None:
            return 0
        return max(len(self.prompt_token_ids) - self.first_scored, 0) + bool(self.alternatives)

    def __post_init__(self) -> None:
        if self.num_logprobs is not None and self.generated.token_ids and self.generated.logprobs is None:
            raise ValueError("logprobs are asked for, and those of the tokens generated before are missing")


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialAnswer:
    """The part of an answer that is generated so far.

    Attributes:
        index: Index of the request.
        generated: The tokens generated so far, those of earlier runs included.
    """

    index: int
    generated: Generated


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenResult:
    """The engine's answer to a TokenRequest.

    Attributes:
        index: Index of the request.
        token_ids: Generated ids, those of an earlier run included; a stop token that ended the answer is the last.
        finish_reason: "stop" (a stop token or string, or the end of a guide), "length" (max_tokens), or "error".
        stop_string: The stop string that ended the answer, or None.
        logprobs: One entry per generated token if log probabilities were asked for, otherwise None.
        prompt_logprobs: One entry per token of the prompt from `first_scored` on, and one per token of `alternatives`, if the prompt was
            scored; otherwise None.
        error: The error with which the request failed alone (it never fitted, non-finite logits, every token masked); None otherwise.
        num_preemptions: Number of times that the KV of the sequence was dropped and computed again.
    """

    index: int
    token_ids: tuple[int, ...] = ()
    finish_reason: str = "length"
    stop_string: str | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    error: RequestError | None = None
    num_preemptions: int = 0
