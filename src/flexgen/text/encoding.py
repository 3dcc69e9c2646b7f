"""Encodes texts as token ids, within the model's context and a bound on memory; a text that cannot be encoded has an error of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from flexgen.errors import RequestError
from flexgen.text.prompts import naming
from flexgen.text.tokenizer import Tokenizer


class Encoder:
    """Encodes the prompts of a model.

    Args:
        name: The name of the model, for messages.
        tokenizer: The model's tokenizer; None where it has none.
        max_tokens: The most tokens of a text; a longer one has an error.
        memory_bytes: Returns the memory that one text may use while it is tokenised; called once for every group of texts.
    """

    def __init__(self, name: str, tokenizer: Tokenizer | None, max_tokens: int, memory_bytes: Callable[[], int]) -> None:
        self._name, self._tokenizer, self._max_tokens, self._memory_bytes = name, tokenizer, max_tokens, memory_bytes

    def each(self, texts: Iterable[str | RequestError], *, add_special_tokens: bool = True) -> Iterator[list[int] | RequestError]:
        """Return the token ids of each text, or the error that explains why it has none; errors among the texts are passed through."""
        if self._tokenizer is None:
            error = RequestError(f"{self._name} has no tokenizer: give the prompt as token ids", param="prompt")
            return (text if isinstance(text, RequestError) else error for text in texts)
        return self._tokenizer.encode_each(
            texts, add_special_tokens=add_special_tokens, max_tokens=self._max_tokens, memory_bytes=self._memory_bytes()
        )

    def all(self, what: str, texts: Iterable[str | RequestError], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Return the token ids of all texts.

        Raises:
            RequestError: A text cannot be encoded; the message names the first such text, for example "text 3".
        """
        ids: list[list[int]] = []
        for index, each in enumerate(self.each(texts, add_special_tokens=add_special_tokens)):
            with naming(f"{what} {index}"):
                ids.append(ids_or_raise(each))
        return ids


def ids_or_raise(encoded: list[int] | RequestError) -> list[int]:
    """Return token ids unchanged, or raise the error that stands in their place."""
    if isinstance(encoded, RequestError):
        raise encoded
    return encoded
