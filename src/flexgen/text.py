"""Text to token ids and back, many at once.  Knows the tokenizer; nothing of requests, files or engines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexgen.errors import ModelError, RequestError
from flexgen.private_folder import tokenizer_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # decoders' character for bytes that are none, or not yet
_MAX_HELD = 16  # tokens whose text may wait for what completes it


class Tokenizer:
    """A Hugging Face tokenizer, in batches.

    Special tokens written in a prompt are recognised.

    Attributes:
        hf: the Hugging Face tokenizer itself.
    """

    def __init__(self, hf: PreTrainedTokenizerBase) -> None:
        self.hf = hf

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Raises ModelError when the files are unusable; code that comes with them is never run."""
        from transformers import AutoTokenizer

        try:
            with tokenizer_folder(folder) as vetted:
                tokenizer = AutoTokenizer.from_pretrained(str(vetted), local_files_only=True, trust_remote_code=False)
            tokenizer.name_or_path = str(folder)
            return cls(tokenizer)
        except ModelError:
            raise
        except Exception as error:  # its backends raise anything, bare Exception included
            reason = str(error).strip().partition("\n")[0]
            raise ModelError(f"the tokenizer in {folder} cannot be loaded: {reason}") from error

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's own end-of-sequence token."""
        token = self.hf.eos_token_id
        return token if isinstance(token, int) else None

    @property
    def chat_template(self) -> object:
        """The template, templates by name, or None: as transformers found it."""
        return self.hf.chat_template

    @property
    def special_tokens(self) -> dict[str, str]:
        """bos_token, eos_token, ... as text."""
        return dict(self.hf.special_tokens_map)

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text, special tokens added as asked (a rendered chat has them already), nothing truncated.

        Raises:
            RequestError: a text holds a lone surrogate (`check_text` finds which).
        """
        for text in texts:
            check_text(text)
        if not texts:
            return []
        encoded = self.hf(
            list(texts), add_special_tokens=add_special_tokens, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        return encoded["input_ids"]

    def encode_word(self, word: str) -> list[list[int]]:
        """The ids of a word as it stands at the beginning of a text and, if that only changes its first token, behind a space.

        These are what vLLM forbids for one of `bad_words`.

        Raises:
            RequestError: the word has no tokens.
        """
        first, later = self.encode([word.lstrip(), " " + word.lstrip()], add_special_tokens=False)
        if not first:
            raise RequestError(f"bad_words: {word!r} has no tokens", param="bad_words")
        return [first, later] if later and later[0] != first[0] and len(later) == len(first) else [first]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of some ids; ids that the tokenizer does not know (padding of the vocabulary) are left out."""
        text = self.hf.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text if isinstance(text, str) else "".join(text)


class TextStream:
    """The text of ids that come one by one; each costs the same, however many there were.

    Ids are decoded behind a few earlier ones, because a decoder may treat the first of a text differently.  What ends in the middle
    of a character is held back, for at most `_MAX_HELD` tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip_special_tokens = tokenizer, skip_special_tokens
        self._ids: list[int] = []  # what is decoded together
        self._num_context = 0  # ids among them whose text was given out before
        self._num_given = 0  # characters of their text that were given out

    def push(self, token_id: int) -> str:
        """The characters that the id completes."""
        self._ids.append(token_id)
        text = self._decode()
        waits_too_long = len(self._ids) - self._num_context >= _MAX_HELD
        num_whole = len(text) if waits_too_long else len(text.rstrip(UNFINISHED))
        new = text[self._num_given : num_whole]
        self._num_given = max(self._num_given, num_whole)
        if waits_too_long or (new and num_whole == len(text)):
            self._ids = self._ids[self._num_context :]
            self._num_context, self._num_given = len(self._ids), len(self._decode())
        return new

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=self._skip_special_tokens)


def check_text(text: str) -> None:
    """Raises RequestError when the text is no Unicode text: a lone surrogate, which JSON can write and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt has a lone surrogate at character {error.start}", param="prompt") from error


def eos_token_ids(config: dict[str, Any], generation_config: dict[str, Any], tokenizer: Tokenizer | None) -> frozenset[int]:
    """Every id that ends an answer: generation_config.json's, else config.json's, and the tokenizer's own (as vLLM).

    Raises:
        ModelError: an eos_token_id that is neither an id nor a list of ids.
    """
    value = generation_config.get("eos_token_id")
    if value is None:
        value = config.get("eos_token_id")
    if value is None and isinstance(config.get("text_config"), dict):
        value = config["text_config"].get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ModelError(f"eos_token_id is {json.dumps(value)}, neither an id nor a list of ids")
    own = tokenizer.eos_token_id if tokenizer is not None else None
    return frozenset(ids if own is None else [*ids, own])
