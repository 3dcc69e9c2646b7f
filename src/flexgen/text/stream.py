"""The text that token ids add to what stands before them, at once or as they come one by one."""

from __future__ import annotations

from collections.abc import Sequence

from flexgen.text.tokenizer import UNFINISHED, Tokenizer

_MAX_HELD = 16  # tokens whose text may wait for what completes it


class TextStream:
    """The text of ids that come one by one behind a prompt.  Each costs the same, however many there were.

    Ids are decoded behind a few earlier ones, because a decoder may treat the first id of a text differently.  Text that ends in the
    middle of a character is held back, for at most `_MAX_HELD` tokens.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip_special_tokens = tokenizer, skip_special_tokens
        self._context: list[int] = []  # the last ids whose text was given out
        self._context_text = ""
        self._held: list[int] = []  # ids behind them
        self._given = ""  # the part of their text that was given out
        for token_id in tokenizer.tail(prompt, skip_special_tokens=skip_special_tokens):
            self.push(token_id)
        self._given = self._text()  # the prompt may end within a character

    def push(self, token_id: int) -> str:
        """Take an id, and return the characters that it completes."""
        if self._tokenizer.leaves_out(token_id, skip_special_tokens=self._skip_special_tokens):
            return ""
        self._held.append(token_id)
        text = self._text()
        waits_too_long = len(self._held) >= _MAX_HELD
        whole = text if waits_too_long else text.rstrip(UNFINISHED)
        new = _behind(self._given, whole)
        if waits_too_long or (new and whole == text):
            self._context, self._held, self._given = self._held, [], ""
            self._context_text = self._decode(self._context)
        elif new:
            self._given = whole
        return new

    def rest(self) -> str:
        """Return the text that is held back, for when nothing follows that completes it."""
        return _behind(self._given, self._text())

    def _text(self) -> str:
        """Return the text of the ids that are held, behind the context."""
        text = self._decode([*self._context, *self._held])
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        return self._decode(self._held)  # bytes that are no text change what stands before them

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)


def _behind(given: str, text: str) -> str:
    """Return the text behind the beginning that was given out.

    Characters that were unfinished when they were given out may be others now.
    """
    pairs = enumerate(zip(given, text, strict=False))
    num_given = next((index for index, (old, new) in pairs if old != new), min(len(given), len(text)))
    return text[num_given:]


def decode_behind(tokenizer: Tokenizer, prompt: Sequence[int], token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """Return the text that some ids add to that of a prompt.

    Many decoders strip the space at the beginning of what they are given, so the ids are decoded behind the last ids of the prompt.
    """
    context = tokenizer.tail(prompt, skip_special_tokens=skip_special_tokens)
    before = tokenizer.decode(context, skip_special_tokens=skip_special_tokens)
    whole = tokenizer.decode([*context, *token_ids], skip_special_tokens=skip_special_tokens)
    if whole.startswith(before) and not (UNFINISHED in whole and tokenizer.has_byte_fallback):
        return whole[len(before) :]
    # The ids complete a character that the prompt began, or one byte that is no text has spoilt all bytes beside it.
    stream = TextStream(tokenizer, prompt, skip_special_tokens=skip_special_tokens)
    return "".join(map(stream.push, token_ids)) + stream.rest()
