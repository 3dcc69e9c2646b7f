"""Constraints on answers by llguidance: which tokens may come next so that the text stays one that a schema or grammar allows.

Knows tokenizers and constraints; knows nothing of engines, which see guides as `request.Guide`.  llguidance is imported when the first
constraint is used.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from flexgen.base.structured import StructuredOutputsParams
from flexgen.errors import RequestError, is_failure
from flexgen.text.constraint_words import PARAM, in_our_words, refused, short
from flexgen.text.endless import is_endless_grammar, is_endless_schema
from flexgen.text.masks import Mask, MaskThread
from flexgen.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_MOST_GRAMMARS = 64  # compiled and kept at the same time, besides those of live answers
_MOST_THREADS = 8
_DEAD_END = "NoExtensionBias"  # llguidance's reason to stop where the grammar goes on, and no token does
# White space between the tokens of JSON.  Without a bound a model that has lost its thread writes white space until `max_tokens`.
JSON_OPTIONS: Mapping[str, Any] = {"whitespace_pattern": r"[ \t]|\r?\n[ \t]{0,20}"}


class Guides:
    """Makes the guides of a model's answers, and owns the threads that find out which tokens may come next.

    Args:
        tokenizer: The model's tokenizer; None where it has none, so that nothing can be constrained.
        vocab_size: The number of logits that the model computes.
        eos_token_ids: The tokens that may end an answer which is complete.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos_token_ids = tokenizer, vocab_size, eos_token_ids
        self._compiled = functools.lru_cache(_MOST_GRAMMARS)(self._compile)
        self._thread: MaskThread | None = None

    def guide(self, params: StructuredOutputsParams, *, ignore_eos: bool = False) -> TokenGuide:
        """Return the guide of one answer.

        Args:
            params: The constraint.
            ignore_eos: Whether an end-of-sequence token may not even end an answer that is complete.

        Raises:
            RequestError: The constraint cannot be enforced, or llguidance is not installed.
        """
        prototype = self._compiled(params)
        ends = frozenset() if ignore_eos else self._eos_token_ids
        never = [token for token in self._tokens.eos_tokens if token not in ends]
        return TokenGuide(prototype, self._masks, num_tokens=self._tokens.vocab_size, never=never)

    def accepts(self, params: StructuredOutputsParams, text: str) -> bool:
        """Return whether a text is a whole answer that a constraint allows.

        Raises:
            RequestError: See `guide`.
        """
        matcher, tokens = self._compiled(params).deep_copy(), self._tokens
        matcher.consume_tokens(tokens.greedy_tokenize(text))
        written = tokens.decode_bytes(tokens.greedy_tokenize(text)) == text.encode()
        return written and not matcher.is_error() and matcher.is_accepting()

    def literal(self, text: str) -> str:
        """Write a text as a part of a rule of a grammar; special tokens in it become those tokens.

        Raises:
            RequestError: See `guide`.
        """
        hf: Any = self._tokenizer.hf if self._tokenizer is not None else None
        tokens = self._tokens
        special = {str(token): token_id for token_id, token in hf.added_tokens_decoder.items() if tokens.is_special_token(token_id)}
        pattern = "|".join(re.escape(each) for each in sorted(special, key=len, reverse=True) if each in text)
        pieces = re.split(f"({pattern})", text) if pattern else [text]
        return " ".join(f"<[{special[each]}]>" if each in special else json.dumps(each) for each in pieces if each) or '""'

    def close(self) -> None:
        """End the threads; the next guide would start others."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.close()

    def _masks(self) -> MaskThread:
        """Return the thread that fills masks, and start it if need be."""
        if self._thread is None:
            most = max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)) // 2))
            self._thread = MaskThread(self._tokens.vocab_size, most)
        return self._thread

    @functools.cached_property
    def _tokens(self) -> LLTokenizer:
        """The vocabulary as llguidance needs it; made once, because that takes about a second."""
        if self._tokenizer is None:
            raise RequestError(f"{PARAM} needs a tokenizer, and the model has none", param=PARAM)
        try:
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            message = f"{PARAM} needs llguidance: pip install 'flexgen-engine[grammar]'"
            raise RequestError(message, code="unsupported_field", param=PARAM) from error
        hf: Any = self._tokenizer.hf
        if not getattr(hf, "is_fast", False):
            message = f"{PARAM} needs a fast tokenizer (tokenizer.json), and the model has a {type(hf).__name__}"
            raise RequestError(message, code="unsupported_field", param=PARAM)
        try:
            return from_tokenizer(hf, n_vocab=max(self._vocab_size, len(hf)), eos_token=sorted(self._eos_token_ids) or None)
        except BaseException as error:
            if not is_failure(error):
                raise
            raise RequestError(f"{PARAM}: llguidance does not understand the tokenizer: {in_our_words(str(error))}", param=PARAM) from error

    def _compile(self, params: StructuredOutputsParams) -> LLMatcher:
        """Return a matcher of the constraint that has seen no token.

        Raises:
            RequestError: See `guide`.
        """
        tokens = self._tokens
        from llguidance import LLMatcher, LLParserLimits

        try:
            grammar = _grammar(params)
            matcher = LLMatcher(tokens, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
        except BaseException as error:
            if not is_failure(error):
                raise
            raise refused(params, in_our_words(str(error))) from error
        if matcher.is_error():
            raise refused(params, in_our_words(matcher.get_error()))
        if _is_endless(params, grammar):
            raise refused(params, "nothing meets it, because what it asks for always contains itself again, without an end")
        self._check_start(params, matcher)
        return matcher

    def _check_start(self, params: StructuredOutputsParams, matcher: LLMatcher) -> None:
        """Refuse a constraint that no answer can meet, as far as the text shows that all answers begin with.

        Args:
            params: The constraint.
            matcher: A matcher that has seen no token.
        """
        first = matcher.deep_copy().compute_ff_bytes().decode(errors="ignore")
        for text in params.choice or [first]:
            if (missing := self._missing(text)) is not None:
                raise refused(params, f"the model's vocabulary cannot write {missing!r}, which is in {short(text)}")
        for text in ("", first):
            after = matcher.deep_copy()
            after.consume_tokens(self._tokens.greedy_tokenize(text))
            goes_on = not after.is_stopped() and self._goes_on(after)
            if _is_dead_end(after):
                begin = (
                    f"every answer would have to begin with {short(text)}, and nothing can follow" if text else "no answer could even begin"
                )
                raise refused(params, f"nothing meets it: {begin}")
            if after.is_error() and not text:
                raise refused(params, in_our_words(after.get_error()))
            if not goes_on and not text:
                raise refused(params, "only the empty text meets it")

    def _goes_on(self, matcher: LLMatcher) -> bool:
        """Return whether a token may come next that does not end the answer."""
        allowed = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        allowed[list(self._tokens.eos_tokens)] = 0
        return bool(allowed.any())

    def _missing(self, text: str) -> str | None:
        """Return a character of a text that no token of the vocabulary has a byte of; None if there is none."""
        tokens = self._tokens
        if tokens.decode_bytes(tokens.greedy_tokenize(text)) == text.encode():
            return None
        return next((each for each in text if not self._alphabet.issuperset(each.encode())), None)

    @functools.cached_property
    def _alphabet(self) -> frozenset[int]:
        """All bytes that tokens have."""
        tokens = self._tokens
        written = (tokens.decode_bytes([token_id]) for token_id in range(tokens.vocab_size) if not tokens.is_special_token(token_id))
        return frozenset(byte for each in written for byte in each)


class TokenGuide:
    """The constraint on one answer (a `request.Guide`).

    Args:
        prototype: A matcher of the constraint that has seen no token; it is copied.
        masks: Returns the thread that fills masks.
        num_tokens: The number of tokens that the matcher knows.
        never: Tokens that may not come, whatever the matcher says.
    """

    def __init__(self, prototype: LLMatcher, masks: Callable[[], MaskThread], *, num_tokens: int, never: Sequence[int]) -> None:
        self._prototype, self._masks, self._num_tokens, self._never = prototype, masks, num_tokens, list(never)
        self._matcher: LLMatcher | None = None
        self._num_seen = 0
        self._mask: Mask | None = None  # for the tokens seen

    def prepare(self, token_ids: Sequence[int]) -> None:
        """Begin to find out on another thread which tokens may come next (see `request.Guide`)."""
        matcher = self._after(token_ids)
        if self._mask is None:
            self._mask = self._masks().ask(matcher)

    def allowed(self, token_ids: Sequence[int]) -> np.ndarray:
        """Return whether each token may come next (see `request.Guide`)."""
        self.prepare(token_ids)
        self._wait()
        assert self._mask is not None
        if self._mask.error is not None:
            raise self._mask.error
        self._check()
        words = self._mask.words
        assert words is not None
        allowed = np.unpackbits(words.view(np.uint8), bitorder="little")[: self._num_tokens].view(np.bool_)
        allowed[self._never] = False
        return allowed

    def is_complete(self, token_ids: Sequence[int]) -> bool:
        """Return whether nothing can continue the answer (see `request.Guide`)."""
        matcher = self._after(token_ids)
        self._wait()
        return matcher.is_stopped()

    def forget(self) -> None:
        """Free the matcher; another one begins anew if the guide is asked again."""
        self._wait()
        self._matcher, self._mask, self._num_seen = None, None, 0

    def _after(self, token_ids: Sequence[int]) -> LLMatcher:
        """Return the matcher once it has seen these tokens."""
        if len(token_ids) < self._num_seen:  # another run of the same request
            self.forget()
        if self._matcher is None:
            self._matcher = self._prototype.deep_copy()
        if len(token_ids) > self._num_seen:
            self._wait()
            self._mask = None
            self._matcher.consume_tokens(list(token_ids[self._num_seen :]))
            self._num_seen = len(token_ids)
            self._check()
        return self._matcher

    def _wait(self) -> None:
        """Wait until the matcher belongs to this thread again."""
        if self._mask is not None:
            self._masks().wait(self._mask)

    def _check(self) -> None:
        matcher = self._matcher
        if matcher is None or not (matcher.is_error() or matcher.stop_reason() == _DEAD_END):
            return
        said = f"the constraint on the answer cannot be followed any further ({in_our_words(matcher.get_error())})"
        if _is_dead_end(matcher):
            said = "no token of the vocabulary goes on as the constraint on the answer demands, so that perhaps nothing meets it"
        raise RequestError(f"after {self._num_seen:,} {'token' if self._num_seen == 1 else 'tokens'} {said}", code="constraint_failed")


def _grammar(params: StructuredOutputsParams) -> str:
    """Return the constraint in llguidance's own form."""
    from llguidance import LLMatcher, grammar_from

    if params.json is not None or params.json_object:
        schema = params.json if isinstance(params.json, str) else '{"type": "object"}'
        return LLMatcher.grammar_from_json_schema(schema, overrides=cast("Any", _white_space(params, schema)))
    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        return grammar_from("choice", json.dumps(params.choice))
    return grammar_from("grammar", params.grammar or "")


def _white_space(params: StructuredOutputsParams, schema: str) -> Mapping[str, Any]:
    """Return llguidance's options of white space in JSON: those of the constraint, of the schema itself, or else ours."""
    if params.disable_any_whitespace:
        return {"whitespace_flexible": False, "whitespace_pattern": None}
    if params.whitespace_pattern is not None:
        return {"whitespace_pattern": params.whitespace_pattern}
    own = json.loads(schema).get("x-guidance")
    has_own = isinstance(own, dict) and any(name.startswith("whitespace_") for name in own)
    return {} if has_own else JSON_OPTIONS


def _is_dead_end(matcher: LLMatcher) -> bool:
    """Return whether the constraint goes on, and no token does."""
    return matcher.stop_reason() == _DEAD_END or _DEAD_END in matcher.get_error()


def _is_endless(params: StructuredOutputsParams, grammar: str) -> bool:
    """Return whether no text of any length can meet a constraint, which is `grammar` in Lark's notation if it is one."""
    if isinstance(params.json, str):
        return is_endless_schema(json.loads(params.json))
    return params.grammar is not None and is_endless_grammar(grammar)
