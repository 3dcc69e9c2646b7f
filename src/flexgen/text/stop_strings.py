"""Stop strings: found in the text of an answer as it grows, and cut off at its end.  Knows text, but no engines."""

from __future__ import annotations

from collections.abc import Sequence

from flexgen.text.stream import TextStream
from flexgen.text.tokenizer import UNFINISHED, Tokenizer


class StopStrings:
    """The stop strings of one request (its `request.Stops`).

    The result depends on the ids alone.  What was decoded of fewer ids is remembered, so that each further id costs the same.

    Args:
        tokenizer: Decodes the ids.
        stop: The stop strings: at least one, none empty.
        prompt: Ids that the answer follows, which decide about a space at its beginning.
        min_tokens: Number of tokens within which a complete stop string does not count.
        skip_special_tokens: Whether special tokens are left out of the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        *,
        prompt: Sequence[int] = (),
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer, self._stop, self._min_tokens = tokenizer, tuple(stop), min_tokens
        self._prompt = tokenizer.tail(prompt, skip_special_tokens=skip_special_tokens)
        self._skip_special_tokens = skip_special_tokens
        self._overlap = max(map(len, stop)) - 1
        self._begin()

    def __call__(self, token_ids: Sequence[int]) -> str | None:
        """Return the stop string that has ended the text of these ids, or None.  Of several, the one that begins first counts."""
        if len(token_ids) <= self._num_seen:  # another run of the same request
            self._begin()
        found = None
        while found is None and self._num_seen < len(token_ids):
            found = self._push(token_ids[self._num_seen])
        return found

    def _begin(self) -> None:
        self._text = TextStream(self._tokenizer, self._prompt, skip_special_tokens=self._skip_special_tokens)
        self._num_seen = 0
        self._tail = ""  # the last characters so far: a stop string may have begun in them

    def _push(self, token_id: int) -> str | None:
        self._num_seen += 1
        text = self._tail + self._text.push(token_id)
        num_old = len(self._tail)
        self._tail = text[max(0, len(text) - self._overlap) :]
        if self._num_seen <= self._min_tokens:
            return None
        found = [(begin, each) for each in self._stop if (begin := _find(text, each, num_old)) >= 0]
        return min(found, key=lambda each: each[0])[1] if found else None


def cut_at_stop(text: str, text_before: str, stop: str, *, include: bool) -> str:
    """Cut an answer at the stop string that ended it.

    Args:
        text: Text of all ids of the answer.
        text_before: Text of all ids but the last, which completed the stop string.
        stop: The stop string.
        include: Whether the stop string itself stays.
    """
    begin = _find(text, stop, len(text_before.rstrip(UNFINISHED)))
    if begin < 0:  # decoded as a whole the text may differ from its parts, where a tokenizer tidies up spaces
        return text
    return text[: begin + len(stop) if include else begin]


def _find(text: str, stop: str, num_old: int) -> int:
    """Return where `stop` first begins, where it ends behind the first `num_old` characters; -1 if nowhere."""
    return text.find(stop, max(0, num_old - len(stop) + 1))
