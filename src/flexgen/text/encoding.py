"""Texts to token ids, within the model's context and a bound of memory; each text that has none has its own error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from flexgen.errors import RequestError
from flexgen.text.prompts import naming
from flexgen.text.tokenizer import Tokenizer


class Encoder:
    """Encodes the prompts of a model.

    Args:
        name: the name of the model, for messages.
        tokenizer: None where the model has none.
        max_tokens: texts with more tokens have an error.
        memory_bytes: returns the memory for one text while it is tokenised; asked when a text is first encoded.
    """

    def __init__(self, name: str, tokenizer: Tokenizer | None, max_tokens: int, memory_bytes: Callable[[], int]) -> None:
        self._name, self._tokenizer, self._max_tokens, self._memory_bytes = name, tokenizer, max_tokens, memory_bytes

    def each(self, texts: Iterable[str | RequestError], *, add_special_tokens: bool = True) -> Iterator[list[int] | RequestError]:
        """The token ids of each text, or why it has none; errors among the texts are handed on."""
        if self._tokenizer is None:
            error = RequestError(f"{self._name} has no tokenizer: give the prompt as token ids", param="prompt")
            return (text if isinstance(text, RequestError) else error for text in texts)
        return self._tokenizer.encode_each(
            texts, add_special_tokens=add_special_tokens, max_tokens=self._max_tokens, memory_bytes=self._memory_bytes()
        )

    def all(self, what: str, texts: Iterable[str | RequestError], *, add_special_tokens: bool = True) -> list[list[int]]:
        """The token ids of all texts.  Raises the first error, which names its place, such as "text 3"."""
        ids: list[list[int]] = []
        for place, each in enumerate(self.each(texts, add_special_tokens=add_special_tokens)):
            with naming(what, place):
                ids.append(ids_or_raise(each))
        return ids


def ids_or_raise(encoded: list[int] | RequestError) -> list[int]:
    """Token ids as they are; raises the error in place of which there are none."""
    if isinstance(encoded, RequestError):
        raise encoded
    return encoded
