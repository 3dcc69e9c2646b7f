"""The answers to one prompt: turns a prompt and its parameters into requests for the engine, and results into what the caller sees.

Knows the model's vocabulary, context and tokenizer; knows nothing of engines and files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from flexgen.base.isolation import for_one_request
from flexgen.base.structured import StructuredOutputsParams
from flexgen.errors import RequestError
from flexgen.outputs import CompletionOutput, Logprob, RequestOutput
from flexgen.request import Guide, SamplingParams, Stops, TokenLogprobs, TokenRequest, TokenResult
from flexgen.text.choices import choice_requests
from flexgen.text.defaults import choice_seed, derive_seed
from flexgen.text.guides import Guides
from flexgen.text.stop_strings import StopStrings, cut_at_stop
from flexgen.text.stream import TextStream, decode_behind
from flexgen.text.tokenizer import Tokenizer, no_room

_MAX_BAD_WORDS_CHARS = 1 << 20  # of one request, whose tokens stay in memory while it runs


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTranslator:
    """Translates prompts with their sampling parameters into the engine's requests, and the engine's results into vLLM's outputs.

    Attributes:
        tokenizer: The model's tokenizer; None where it has none.
        vocab_size: The size of the vocabulary; all token ids are below it.
        max_model_len: The most tokens that a prompt and its answer have together.
        eos_token_ids: The tokens that end an answer unless its parameters ignore them.
        seed: The base of the seeds of prompts that name none.
        max_logprobs: The most log probabilities that a prompt may request; -1 allows any number.
        guides: The maker of guides for answers that are constrained; None where no answer can be.
    """

    tokenizer: Tokenizer | None
    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]
    seed: int
    max_logprobs: int = 20
    guides: Guides | None = None

    def requests(self, index: int, prompt_token_ids: Sequence[int], params: SamplingParams) -> list[TokenRequest]:
        """Return one request per answer, with indices from `index` on.

        As in vLLM, `max_tokens` is cut to the context that the prompt leaves; also to the longest text, if the answer is one of several.
        The first request also scores the prompt, if that is asked for.

        Raises:
            RequestError: The prompt is empty, has ids outside the vocabulary or leaves no room for an answer (`context_length_exceeded`),
                or the parameters hold texts although there is no tokenizer.
        """
        prompt = tuple(prompt_token_ids)
        room = self._room(prompt, least=0 if params.max_tokens == 0 else 1)
        self._check_ids(params)
        self._check_logprobs(params)
        first = TokenRequest(
            index=index,
            prompt_token_ids=prompt,
            max_tokens=self._most_tokens(room, params),
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            repetition_penalty=params.repetition_penalty,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=max(0, params.top_k),
            min_p=params.min_p,
            stop_token_ids=frozenset(params.stop_token_ids or ()) | (frozenset() if params.ignore_eos else self.eos_token_ids),
            min_tokens=params.min_tokens,
            logit_bias=tuple((int(token_id), bias) for token_id, bias in (params.logit_bias or {}).items()),
            allowed_token_ids=None if params.allowed_token_ids is None else tuple(params.allowed_token_ids),
            bad_words_token_ids=self._bad_words(params),
            num_logprobs=params.logprobs,
        )
        return [
            dataclasses.replace(
                first, index=index + choice, seed=self._seed(params, index, choice), stops=self._stops(prompt, params),
                guide=self._guide(params), num_prompt_logprobs=params.prompt_logprobs if choice == 0 else None,
            )
            for choice in range(params.n)
        ]  # fmt: skip

    def choice_requests(self, index: int, prompt_token_ids: Sequence[int], choices: Sequence[Sequence[int]]) -> list[TokenRequest]:
        """Return the requests that score choices after a prompt (see `text/choices.py`).

        Raises:
            RequestError: The prompt or a choice is empty, has ids outside the vocabulary, or both together exceed the context.
        """
        prompt = tuple(prompt_token_ids)
        self._room(prompt, least=0)
        if not choices:
            raise RequestError("there are no choices", param="choices")
        for place, choice in enumerate(choices):
            if not choice:
                raise RequestError(f"choices[{place}] has no tokens", param="choices")
            self._check_vocabulary(f"choices[{place}] has", choice, "choices")
            # The last token is only predicted, and needs no place of its own.
            if (needed := len(prompt) + len(choice) - 1) > self.max_model_len:
                message = f"the prompt and choices[{place}] have {needed + 1} tokens, and the context is {self.max_model_len}"
                raise RequestError(message, code="context_length_exceeded", param="choices")
        return choice_requests(index, prompt, choices)

    def output(
        self, results: Iterable[TokenResult], params: SamplingParams, prompt_token_ids: Sequence[int], prompt: str | None = None
    ) -> RequestOutput:
        """Return the answers to one prompt as vLLM shows them; their text excludes whatever stopped them unless the parameters include it.

        Args:
            results: The engine's results for the prompt, in any order.
            params: The sampling parameters of the prompt.
            prompt_token_ids: The prompt, which decides about a space at the beginning of an answer.
            prompt: The text of the prompt, if it was given as text.
        """
        in_order = sorted(results, key=lambda result: result.index)
        return RequestOutput(
            request_id=str(in_order[0].index),
            prompt=prompt,
            prompt_token_ids=tuple(prompt_token_ids),
            prompt_logprobs=self._prompt_logprobs(in_order[0]),
            outputs=[self._completion(choice, result, params, prompt_token_ids) for choice, result in enumerate(in_order)],
        )

    def shown(
        self, results: Sequence[TokenResult], params: SamplingParams, prompt_token_ids: Sequence[int], prompt: str | None = None
    ) -> RequestOutput:
        """Return the same as `output`, but with an error in place of each answer if they cannot be shown."""
        output = for_one_request(self.output, results, params, prompt_token_ids, prompt)
        if not isinstance(output, RequestError):
            return output
        failed = CompletionOutput(index=0, text="", token_ids=(), finish_reason="error", stop_reason=output.code)
        outputs = [dataclasses.replace(failed, index=choice) for choice in range(len(results))]
        first = min(result.index for result in results)
        return RequestOutput(request_id=str(first), prompt=prompt, prompt_token_ids=tuple(prompt_token_ids), outputs=outputs)

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Return the text of a prompt that was given as token ids, special tokens included.

        Raises:
            RequestError: There is no tokenizer.
        """
        return decode_behind(self._needed_tokenizer("echo"), (), token_ids, skip_special_tokens=False)

    # -- requests -------------------------------------------------------------------------------------------------------------------

    def _room(self, prompt: tuple[int, ...], *, least: int) -> int:
        """Return the number of tokens that the prompt leaves for an answer, which must be `least` or more."""
        if not prompt:
            raise RequestError("the prompt has no tokens", param="prompt")
        room = self.max_model_len - len(prompt)
        if room < least:
            raise no_room(len(prompt), self.max_model_len)
        self._check_vocabulary("the prompt has", prompt, "prompt")
        return room

    def _most_tokens(self, room: int, params: SamplingParams) -> int:
        """Return the most tokens that the answer may have; one of given texts has at most a token for each byte, and one for its end."""
        constraint = cast("StructuredOutputsParams | None", params.structured_outputs)
        texts = () if constraint is None else constraint.choice or ()
        longest = max((len(text.encode()) for text in texts), default=room) + 1
        return min(room, longest, room if params.max_tokens is None else params.max_tokens)

    def _check_vocabulary(self, what: str, token_ids: Sequence[int], param: str) -> None:
        if min(token_ids) < 0 or max(token_ids) >= self.vocab_size:
            raise RequestError(f"{what} token ids outside the vocabulary of {self.vocab_size}", param=param)

    def _check_ids(self, params: SamplingParams) -> None:
        named = {
            "stop_token_ids": params.stop_token_ids,
            "allowed_token_ids": params.allowed_token_ids,
            "logit_bias": params.logit_bias,
        }
        for param, ids in named.items():
            if any(int(token_id) >= self.vocab_size for token_id in ids or ()):
                raise RequestError(f"{param} has token ids outside the vocabulary of {self.vocab_size}", param=param)

    def _check_logprobs(self, params: SamplingParams) -> None:
        for param, number in {"logprobs": params.logprobs, "prompt_logprobs": params.prompt_logprobs}.items():
            asked = self.vocab_size if number == -1 else number or 0
            if 0 <= self.max_logprobs < asked:
                what = f"is all {asked:,} tokens of the vocabulary, which is" if number == -1 else "is"
                message = f"{param} {number} {what} more than {self.max_logprobs}, which max_logprobs (--max-logprobs) can raise"
                raise RequestError(message, param=param)

    def _seed(self, params: SamplingParams, index: int, choice: int) -> int:
        return derive_seed(self.seed, index + choice) if params.seed is None else choice_seed(params.seed, choice)

    def _stops(self, prompt: Sequence[int], params: SamplingParams) -> Stops | None:
        stop = cast("tuple[str, ...]", params.stop)
        if not stop:
            return None
        tokenizer = self._needed_tokenizer("stop")
        skip = params.skip_special_tokens
        return StopStrings(tokenizer, stop, prompt=prompt, min_tokens=params.min_tokens, skip_special_tokens=skip)

    def _guide(self, params: SamplingParams) -> Guide | None:
        constraint = cast("StructuredOutputsParams | None", params.structured_outputs)
        if constraint is None:
            return None
        if self.guides is None:
            raise RequestError("structured_outputs is not supported here", code="unsupported_field", param="structured_outputs")
        return self.guides.guide(constraint, ignore_eos=params.ignore_eos)

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        if (num_chars := sum(map(len, params.bad_words or ()))) > _MAX_BAD_WORDS_CHARS:
            raise RequestError(f"bad_words have {num_chars:,} characters, more than {_MAX_BAD_WORDS_CHARS:,}", param="bad_words")
        words = [(word, ids) for word in params.bad_words or () for ids in self._needed_tokenizer("bad_words").encode_word(word)]
        for word, ids in words:
            if max(ids, default=0) >= self.vocab_size:
                message = f"bad_words: {word!r} has a token that the vocabulary of {self.vocab_size:,} does not"
                raise RequestError(message, param="bad_words")
        return tuple(tuple(ids) for _, ids in words)

    def _needed_tokenizer(self, param: str) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(f"{param} needs a tokenizer, and the model has none", param=param)
        return self.tokenizer

    # -- results --------------------------------------------------------------------------------------------------------------------

    def _completion(self, choice: int, result: TokenResult, params: SamplingParams, prompt: Sequence[int]) -> CompletionOutput:
        if result.error is not None:
            return CompletionOutput(index=choice, text="", token_ids=(), finish_reason="error", stop_reason=result.error.code)
        logprobs = result.logprobs
        return CompletionOutput(
            index=choice,
            text=self._text(result, params, prompt),
            token_ids=result.token_ids,
            finish_reason=result.finish_reason,
            stop_reason=self._stop_reason(result, params),
            cumulative_logprob=None if logprobs is None else sum(each.logprobs[0] for each in logprobs),
            logprobs=None if logprobs is None else self._named(logprobs),
            text_offsets=None if logprobs is None else self._text_offsets(result, params, prompt),
        )

    def _text(self, result: TokenResult, params: SamplingParams, prompt: Sequence[int]) -> str:
        if self.tokenizer is None:
            return ""
        ids, include, skip = result.token_ids, params.include_stop_str_in_output, params.skip_special_tokens
        if result.stop_string is None:
            hides_last = result.finish_reason == "stop" and not include and not self._was_completed(result, params)
            return decode_behind(self.tokenizer, prompt, ids[:-1] if hides_last else ids, skip_special_tokens=skip)
        text, before = (decode_behind(self.tokenizer, prompt, each, skip_special_tokens=skip) for each in (ids, ids[:-1]))
        return cut_at_stop(text, before, result.stop_string, include=include)

    def _text_offsets(self, result: TokenResult, params: SamplingParams, prompt: Sequence[int]) -> tuple[int, ...] | None:
        if self.tokenizer is None:
            return None
        stream = TextStream(self.tokenizer, prompt, skip_special_tokens=params.skip_special_tokens)
        offsets: list[int] = []
        length = 0
        for token_id in result.token_ids:
            before, length = length, length + len(stream.push(token_id))
            # Text that was held back and is emitted together with this token lies before the token's own text.
            offsets.append(max(before, length - len(self.tokenizer.token_text(token_id))))
        return tuple(offsets)

    def _stop_reason(self, result: TokenResult, params: SamplingParams) -> int | str | None:
        """Return the stop string or token; None for the model's own end, as in vLLM, and for an answer that nothing can continue."""
        if result.finish_reason != "stop" or result.stop_string is not None:
            return result.stop_string
        last = result.token_ids[-1]
        is_own_end = last in self.eos_token_ids and not params.ignore_eos
        return None if is_own_end or self._was_completed(result, params) else last

    def _was_completed(self, result: TokenResult, params: SamplingParams) -> bool:
        """Return whether an answer ended because its constraint allows nothing more, and not by a token that is no part of it."""
        last = result.token_ids[-1]
        ends = last in (params.stop_token_ids or ()) or (last in self.eos_token_ids and not params.ignore_eos)
        return params.structured_outputs is not None and not ends

    def _prompt_logprobs(self, result: TokenResult) -> list[dict[int, Logprob] | None] | None:
        return None if result.prompt_logprobs is None or result.error is not None else [None, *self._named(result.prompt_logprobs)]

    def _named(self, logprobs: Sequence[TokenLogprobs]) -> list[dict[int, Logprob]]:
        """Return log probabilities in vLLM's form: each token with its own text, the generated one first."""
        named: list[dict[int, Logprob]] = []
        for each in logprobs:
            ranks = (each.rank, *range(1, len(each.token_ids)))
            entries = zip(each.token_ids, each.logprobs, ranks, strict=True)
            named.append({token_id: self._logprob(token_id, value, rank) for token_id, value, rank in entries})
        return named

    def _logprob(self, token_id: int, value: float, rank: int | None) -> Logprob:
        if self.tokenizer is None:
            return Logprob(logprob=value, rank=rank)
        text, own = self.tokenizer.token_text(token_id), self.tokenizer.token_bytes(token_id)
        return Logprob(logprob=value, rank=rank, decoded_token=text, token_bytes=None if own == text.encode() else own)
