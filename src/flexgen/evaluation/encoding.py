"""Texts to token ids by the rules of lm-evaluation-harness's `hf` backend, so that scores can be compared.  Knows tokenizers only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from flexgen.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pair = tuple[list[int], list[int]]  # the tokens of a context, and of what is scored after it


class Encoding:
    """Encodes contexts, continuations and prompts as lm-eval's `hf` backend does.

    Args:
        tokenizer: The Hugging Face tokenizer.
        add_bos_token: Whether texts get the beginning-of-sequence token; None for the tokenizer's own rule.
        prefix_token_id: The token that stands before the first token of a text that has no context; None for the tokenizer's token for
            the beginning of a sequence, or its end where there is none.

    Attributes:
        prefix_token_id: That token.

    Raises:
        ModelError: The tokenizer has no such token and none is given.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, add_bos_token: bool | None = None, prefix_token_id: int | None = None
    ) -> None:
        self._tokenizer, self._add_bos_token = tokenizer, add_bos_token
        own = (prefix_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
        found = next((each for each in own if isinstance(each, int)), None)
        if found is None:
            raise ModelError("the tokenizer has no token for the beginning or the end of a text: give prefix_token_id")
        self.prefix_token_id = found
        self._prefix = self._decode(found)

    def encode(self, text: str, *, add_special_tokens: bool | None = None) -> list[int]:
        """Return the tokens of a text.

        Args:
            text: The text.
            add_special_tokens: Whether special tokens are added; None for the tokenizer's own rule (or `add_bos_token`), where a text that
                begins with the prefix token gets none.
        """
        if add_special_tokens is None and text.startswith(self._prefix):
            add_special_tokens = False
        return self._encode(text, self._add_bos_token if add_special_tokens is None else add_special_tokens)

    def prompt(self, text: str) -> list[int]:
        """Return the tokens of a prompt that is continued; a text that begins with the beginning-of-sequence token gets no other."""
        bos = self._tokenizer.bos_token
        tokens = self._encode(text, False if isinstance(bos, str) and text.startswith(bos) else self._add_bos_token)
        return tokens or [self.prefix_token_id]

    def pair(self, context: str, continuation: str) -> Pair:
        """Return the tokens of a context and of its continuation (see `pairs`)."""
        return self.pairs([(context, continuation)])[0]

    def pairs(self, texts: Iterable[tuple[str, str]]) -> list[Pair]:
        """Return the tokens of each context and of its continuation.

        Both are encoded as one text, and the continuation has the tokens beyond as many as the context alone has.  Spaces at the end of
        a context belong to the continuation.  An empty context becomes the prefix token, unless the continuation begins with it.

        Args:
            texts: The contexts and their continuations; a context that is given several times in a row is encoded once.
        """
        found: list[Pair] = []
        latest, encoded = "", []
        for context, continuation in texts:
            if not context:
                found.append(self._without_context(self.encode(continuation, add_special_tokens=False)))
                continue
            stripped = context.rstrip()
            if stripped != latest:
                latest, encoded = stripped, self.encode(stripped)
            rest = self.encode(context + continuation)[len(encoded) :]
            found.append((encoded, rest) if encoded else self._without_context(rest))
        return found

    def _without_context(self, tokens: list[int]) -> Pair:
        return (tokens[:1], tokens[1:]) if tokens[:1] == [self.prefix_token_id] else ([self.prefix_token_id], tokens)

    def _encode(self, text: str, add_special_tokens: bool | None) -> list[int]:
        added: dict[str, Any] = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        tokens = self._tokenizer.encode(text, verbose=False, **added)
        bos = self._tokenizer.bos_token_id
        if add_special_tokens and self._add_bos_token and isinstance(bos, int) and tokens[:1] != [bos]:
            return [bos, *tokens]  # a tokenizer that adds none by itself, which lm-eval would load with add_bos_token
        return tokens

    def _decode(self, token_id: int) -> str:
        text = self._tokenizer.decode(token_id)
        return text if isinstance(text, str) else "".join(text)
