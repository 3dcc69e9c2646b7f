"""Text to token ids and back, many texts at once.  Knows the tokenizer, but no requests, files or engines."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from flexgen.errors import FlexGenError, ModelError, RequestError, is_failure
from flexgen.hub.private_folder import tokenizer_folder
from flexgen.text.growth import TextSizes, check_file
from flexgen.text.pieces import piece_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # decoders' character for bytes that are none, or not yet
_BATCH_BYTES = 256 << 10  # of texts that are tokenised together
_BATCH_TEXTS = 256
_NUM_CONTEXT = 5  # tokens of a prompt behind which its answer is decoded: vLLM's number
_NUM_CHARACTER = 4  # tokens that may make up one character: UTF-8's most


class Tokenizer:
    """A Hugging Face tokenizer, used in batches.  Special tokens written in a prompt are recognised.

    Attributes:
        hf: The Hugging Face tokenizer itself.
    """

    def __init__(self, hf: PreTrainedTokenizerBase) -> None:
        self.hf = hf
        self._named = functools.cache(self._name)  # at most once per entry of the vocabulary
        self._sizes = TextSizes.of(hf)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Load the tokenizer of a folder.  Code that comes with it is never run.

        Raises:
            ModelError: The files are unusable.
        """
        from transformers import AutoTokenizer

        try:
            check_file(folder / "tokenizer.json")
            with tokenizer_folder(folder) as vetted:
                tokenizer = AutoTokenizer.from_pretrained(str(vetted), local_files_only=True, trust_remote_code=False)
            tokenizer.name_or_path = str(folder)
            return cls(tokenizer)
        except BaseException as error:  # its backends raise anything, and panic
            if isinstance(error, ModelError) or not is_failure(error):
                raise
            raise ModelError(f"the tokenizer in {folder} cannot be loaded: {_reason(error)}") from error

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's own end-of-sequence token; None if it has none."""
        token = self.hf.eos_token_id
        return token if isinstance(token, int) else None

    @property
    def chat_template(self) -> object:
        """The template, templates by name, or None, as transformers found it."""
        return self.hf.chat_template

    @property
    def special_tokens(self) -> dict[str, str]:
        """Special tokens (bos_token, eos_token, ...) as text."""
        return dict(self.hf.special_tokens_map)

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Return the token ids of each text.  Nothing is truncated.

        Args:
            texts: The texts.
            add_special_tokens: Whether to add special tokens; a rendered chat has them already.

        Raises:
            RequestError: A text has no token ids (see `encode_each`); the error is that of the first.
        """
        return [_unless_error(ids) for ids in self.encode_each(texts, add_special_tokens=add_special_tokens)]

    def encode_each(
        self,
        texts: Iterable[str | RequestError],
        *,
        add_special_tokens: bool = True,
        max_tokens: int | None = None,
        memory_bytes: int | None = None,
    ) -> Iterator[list[int] | RequestError]:
        """Yield the token ids of each text, or the error of one that has none.

        A text has no token ids if it is not Unicode, is too long, or makes the tokenizer fail.  Texts are pulled as they are needed and
        tokenised a few at a time.  Errors among them are passed on.

        Args:
            texts: The texts, or errors found earlier.
            add_special_tokens: Whether to add special tokens.
            max_tokens: Context length.  A text with more tokens than these and one that they predict is refused, without being tokenised
                where its length already shows it.
            memory_bytes: Most memory that tokenising a text may take; None allows any.
        """
        batch: list[str | RequestError] = []
        size = 0
        for text in texts:
            checked, num_bytes = self._checked(text, max_tokens, memory_bytes)
            if batch and (size + num_bytes > _BATCH_BYTES or len(batch) == _BATCH_TEXTS):
                yield from self._encode_batch(batch, add_special_tokens, max_tokens)
                batch, size = [], 0
            batch.append(checked)
            size += num_bytes
        yield from self._encode_batch(batch, add_special_tokens, max_tokens)

    def max_chars(self, max_tokens: int) -> int:
        """Return the most characters that a text of so few tokens can have."""
        return max_tokens * self._sizes.chars_per_token

    def _checked(self, text: str | RequestError, max_tokens: int | None, memory_bytes: int | None) -> tuple[str | RequestError, int]:
        """Return a text and the number of its bytes that are cut into tokens; or its error, and 0."""
        if isinstance(text, RequestError):
            return text, 0
        try:
            if max_tokens is not None:
                self._check_chars(text, max_tokens)
            check_text(text)
            return text, self._sizes.check_bytes(text, _BATCH_BYTES, memory_bytes)
        except BaseException as error:  # noqa: BLE001  (raised again there unless it is a failure)
            return _request_error(error), 0

    def _check_chars(self, text: str, max_tokens: int) -> None:
        most = self.max_chars(max_tokens + 1)
        if len(text) > most:
            message = f"the prompt has {len(text):,} characters, and no more than {most:,} fit a context of {max_tokens:,} tokens"
            raise RequestError(message, code="context_length_exceeded", param="prompt")

    def _encode_batch(
        self, batch: list[str | RequestError], add_special_tokens: bool, max_tokens: int | None
    ) -> Iterator[list[int] | RequestError]:
        """Encode a few texts together.  If the tokenizer fails on them, each is tried by itself."""
        texts = [text for text in batch if isinstance(text, str)]
        try:
            encoded: Iterator[list[int] | RequestError] = iter(self._encode(texts, add_special_tokens))
        except BaseException as error:  # noqa: BLE001  (raised again there unless it is a failure)
            alone = _request_error(error)
            one_by_one = (ids for text in texts for ids in self._encode_batch([text], add_special_tokens, max_tokens))
            encoded = one_by_one if len(texts) > 1 else iter([alone])
        for text in batch:
            ids = text if isinstance(text, RequestError) else next(encoded)
            if max_tokens is not None and not isinstance(ids, RequestError) and len(ids) > max_tokens + 1:
                ids = no_room(len(ids), max_tokens)
            yield ids

    def _encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.hf(
            texts, add_special_tokens=add_special_tokens, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        return encoded["input_ids"]

    def encode_word(self, word: str) -> list[list[int]]:
        """Return the ids of a word at the beginning of a text and, if that only changes its first token, behind a space.

        These are what vLLM forbids for one of `bad_words`.

        Raises:
            RequestError: The word has no tokens.
        """
        forms = self.encode_each([word.lstrip(), " " + word.lstrip()], add_special_tokens=False, memory_bytes=_BATCH_BYTES)
        try:
            first, later = map(_unless_error, forms)
        except RequestError as error:
            raise RequestError(f"bad_words: {word[:40]!r}: {error}", code=error.code, param="bad_words") from error
        if not first:
            raise RequestError(f"bad_words: {word!r} has no tokens", param="bad_words")
        return [first, later] if later and later[0] != first[0] and len(later) == len(first) else [first]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of some ids.  Ids that the tokenizer does not know (padding of the vocabulary) are left out."""
        try:
            text = self.hf.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        except BaseException as error:
            raise _request_error(error, "these tokens", param=None) from error
        return text if isinstance(text, str) else "".join(text)

    def tail(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> list[int]:
        """Return the last few ids that have a text, beginning at the start of a character where possible."""
        found: list[int] = []
        for token_id in reversed(token_ids):
            if self.leaves_out(token_id, skip_special_tokens=skip_special_tokens):
                continue
            found.append(token_id)
            if len(found) >= _NUM_CONTEXT + _NUM_CHARACTER:
                break
            if len(found) >= _NUM_CONTEXT and self.token_bytes(token_id)[:1] not in _CONTINUATIONS:
                break
        return found[::-1]

    def leaves_out(self, token_id: int, *, skip_special_tokens: bool = True) -> bool:
        """Return whether `decode` skips the id, wherever it stands."""
        piece = cast("str | None", self.hf.convert_ids_to_tokens(token_id))  # None for an id that the tokenizer does not know
        return piece is None or (skip_special_tokens and token_id in self._skipped)

    def token_text(self, token_id: int) -> str:
        """Return a token's own text as it is within a text; a part of a character becomes a replacement character."""
        return self._named(token_id)[0]

    def token_bytes(self, token_id: int) -> bytes:
        """Return a token's own bytes, also those of a part of a character."""
        text, own = self._named(token_id)
        return text.encode() if own is None else own

    def _name(self, token_id: int) -> tuple[str, bytes | None]:
        """Return a token's text, and its bytes where they are not those of the text.

        The text is what a second such token adds, because decoders strip a first one.
        """
        text = self.decode([token_id], skip_special_tokens=False)
        if UNFINISHED in text:
            return text, piece_bytes(self.hf.convert_ids_to_tokens(token_id), text)
        if token_id in self._skipped:
            return text, None
        twice = self.decode([token_id, token_id], skip_special_tokens=False)
        return (twice.removeprefix(text) if twice.startswith(text) else text), None

    @functools.cached_property
    def _skipped(self) -> frozenset[int]:
        """Special tokens that `decode` leaves out."""
        try:
            added = [token_id for token_id, token in self.hf.added_tokens_decoder.items() if token.special]
        except NotImplementedError:  # mistral-common's tokenizers cannot tell
            added = []
        return frozenset(token_id for token_id in {*added, *self.hf.all_special_ids} if not self.decode([token_id]))

    @functools.cached_property
    def has_byte_fallback(self) -> bool:
        piece = "<0x0A>"
        token_id = self.hf.convert_tokens_to_ids(piece)
        return isinstance(token_id, int) and self.hf.convert_ids_to_tokens(token_id) == piece


_CONTINUATIONS = frozenset(bytes([byte]) for byte in range(0x80, 0xC0))  # bytes of UTF-8 that begin no character


def no_room(num_tokens: int, max_model_len: int) -> RequestError:
    """Make the error of a prompt that leaves no room for an answer."""
    message = f"the prompt has {num_tokens} tokens, which leaves no room for an answer in a context of {max_model_len}"
    return RequestError(message, code="context_length_exceeded", param="prompt")


def _unless_error(ids: list[int] | RequestError) -> list[int]:
    if isinstance(ids, RequestError):
        raise ids
    return ids


def _reason(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def _request_error(error: BaseException, what: str = "the prompt", param: str | None = "prompt") -> RequestError:
    """Make the error of a request on which the tokenizer fails.  An exception that is not such a failure is raised again."""
    if isinstance(error, RequestError):
        return error
    if not is_failure(error) or isinstance(error, FlexGenError):
        raise error
    return RequestError(f"the tokenizer fails on {what}: {_reason(error)}", code="tokenizer_error", param=param)


def check_text(text: str) -> None:
    """Check that a text is Unicode; JSON can write a lone surrogate, and UTF-8 cannot.

    Raises:
        RequestError: The text has a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt has a lone surrogate at character {error.start}", param="prompt") from error
