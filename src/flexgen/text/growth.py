"""How large a text may become on its way to token ids, found from a tokenizer's parts, to keep tokenising within bounds.

Knows the parts of the tokenizers library by their names in tokenizer.json; knows no requests or budgets.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexgen.base.quantities import format_size
from flexgen.errors import ModelError, RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MEMORY_PER_BYTE = 300  # of text while it is tokenised: pieces, offsets, tokens, ids (measured: 140 to 260)
_MAX_PART_CHARS = 1024  # of a text that a part of the tokenizer inserts; real ones have a few characters
_MAX_ADDED_TOKENS = 1024  # that a tokenizer puts around every text
_MAX_FILE_BYTES = 256 << 20  # the largest known tokenizer.json has 35 MB
_MAX_PARTS = 10_000  # normalizers, pre-tokenizers, decoders and tokens around a text
_SLICE_CHARS = 1024  # normalised at once, while it is only measured
_UNSURE = 16  # how many times more characters a token may stand for where parts of the text may be dropped

# Parts of tokenizer.json that drop no character, by type; a normalizer among the second kind makes no text longer, either.
_KEEP = {"NFC", "NFD", "NFKD", "Lowercase", "Prepend", "ByteLevel", "Metaspace", "Split", "Digits", "Punctuation", "UnicodeScripts"}
_DO_NOT_GROW = {"NFC", "Lowercase", "Strip", "StripAccents", "Prepend", "ByteLevel"}
_PATTERNS = ("Regex", "precompiled_charsmap")  # longer texts, which are never inserted as they are


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSizes:
    """How a tokenizer changes the size of a text.

    Attributes:
        chars_per_token: Most characters that a token stands for.  Where the tokenizer may drop characters (spaces that it collapses,
            accents that it strips), a generous guess.
        growing: Normalizers that may make a text longer, with those between them, in order; empty where none does.
    """

    chars_per_token: int
    growing: tuple[Any, ...]

    @classmethod
    def of(cls, hf: PreTrainedTokenizerBase) -> TextSizes:
        """Examine a tokenizer.

        Raises:
            ModelError: The tokenizer would make any text enormous.
        """
        longest = max(map(len, hf.get_vocab()), default=1)
        backend = getattr(hf, "backend_tokenizer", None)
        if backend is None:
            return cls(chars_per_token=_UNSURE * longest, growing=())
        for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
            _check_part(name, getattr(backend, name))
        _check_model(backend)
        steps = [*_parts(_state(backend.normalizer), "normalizers")]
        pre_tokenizers = [*_parts(_state(backend.pre_tokenizer), "pretokenizers")]
        sure = all(map(_keeps, [*steps, *pre_tokenizers])) and _covers_all(backend, [*steps, *pre_tokenizers])
        composes = 4 if any(step["type"] == "NFC" for step in steps) else 1  # characters that become one
        growing = _normalizers(backend.normalizer) if any(map(_grows, steps)) else ()
        return cls(chars_per_token=longest * (composes if sure else _UNSURE), growing=growing)

    def check_bytes(self, text: str, least_bytes: int, memory_bytes: int | None) -> int:
        """Return the number of bytes of the text that are cut into tokens.

        Args:
            text: The text.
            least_bytes: Number of bytes that is always allowed.
            memory_bytes: Most memory that tokenising may take; None is any amount.

        Raises:
            RequestError: Tokenising would take more.
        """
        most = sys.maxsize if memory_bytes is None else max(least_bytes, memory_bytes // MEMORY_PER_BYTE)
        num_bytes = self._normalized_bytes(text, most)
        if num_bytes > most:
            needs, granted = format_size(num_bytes * MEMORY_PER_BYTE), format_size(most * MEMORY_PER_BYTE)
            grown = f", of which the tokenizer makes over {num_bytes:,} bytes" if num_bytes > 4 * len(text) else ""
            message = (
                f"the prompt has {len(text):,} characters{grown}; tokenising takes some {needs}, {granted} are granted: "
                "raise host_mem (--host-mem)"
            )
            raise RequestError(message, code="prompt_too_large", param="prompt")
        return num_bytes

    def _normalized_bytes(self, text: str, most: int) -> int:
        """Return the size of the normalized text; if it is more than `most`, some number above `most`.

        It is measured slice by slice and step by step, so that nothing enormous is made.
        """
        if not self.growing:
            return len(text.encode())
        total = 0
        for start in range(0, len(text), _SLICE_CHARS):
            total += _grown(text[start : start + _SLICE_CHARS], self.growing, most)
            if total > most:
                break
        return total


def check_file(path: Path) -> None:
    """Check a tokenizer.json before it is loaded, which takes some twenty times its size.

    Raises:
        ModelError: The file is larger, or has more parts, than any real tokenizer's.
    """
    if not path.is_file():
        return
    if (size := path.stat().st_size) > _MAX_FILE_BYTES:
        raise ModelError(f"{path.name} has {format_size(size)}; no real tokenizer has more than {format_size(_MAX_FILE_BYTES)}")
    data = path.read_bytes()
    num_parts = sum(data.count(sign) for sign in (b'"type"', b'"SpecialToken"'))
    if num_parts > _MAX_PARTS:
        raise ModelError(f"{path.name} is made of {num_parts:,} parts; no real tokenizer has more than {_MAX_PARTS:,}")


def _grown(text: str, steps: tuple[Any, ...], most: int) -> int:
    for step in steps:
        text = "".join(step.normalize_str(text[at : at + _SLICE_CHARS]) for at in range(0, len(text), _SLICE_CHARS))
        if len(text) > most:
            break
    return len(text.encode())


def _state(part: Any) -> dict[str, Any]:
    """Return a part of the tokenizer as it stands in tokenizer.json."""
    return {} if part is None else json.loads(part.__getstate__())


def _parts(state: Mapping[str, Any], name: str) -> Iterator[Mapping[str, Any]]:
    """Yield the parts of a sequence, or the part itself."""
    if state.get("type") == "Sequence":
        for part in state.get(name, ()):
            yield from _parts(part, name)
    elif state:
        yield state


def _normalizers(normalizer: Any) -> tuple[Any, ...]:
    if type(normalizer).__name__ != "Sequence":
        return (normalizer,)
    return tuple(step for index in range(len(normalizer)) for step in _normalizers(normalizer[index]))


def _keeps(part: Mapping[str, Any]) -> bool:
    """Return whether every character of the text is still there, perhaps as another, when this part has done its work."""
    if part.get("type") == "Replace":
        return len(part["content"]) >= len(part["pattern"].get("String", part["content"] + " "))
    return part.get("type") in _KEEP and part.get("behavior") != "Removed"


def _grows(part: Mapping[str, Any]) -> bool:
    if part.get("type") == "Replace":
        return len(part["content"]) > len(part["pattern"].get("String", ""))
    return part.get("type") not in _DO_NOT_GROW


def _covers_all(backend: Any, parts: list[Mapping[str, Any]]) -> bool:
    """Return whether every character ends in a token, and no token takes any number of characters."""
    if any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values()):
        return False  # takes all spaces beside it
    kind = type(backend.model).__name__
    in_bytes = any(part["type"] == "ByteLevel" for part in parts) or getattr(backend.model, "byte_fallback", False)
    return kind in ("BPE", "Unigram") and bool(in_bytes)


def _check_part(name: str, part: Any) -> None:
    """Refuse a part of the tokenizer that could insert a text of absurd length."""
    for path, text in _texts(_state(part), name):
        if len(text) > _MAX_PART_CHARS and not path.endswith(_PATTERNS):
            raise ModelError(f"the tokenizer's {path} is a text of {len(text):,} characters, more than any real tokenizer inserts")


def _texts(value: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(item, f"{path}.{name}")
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, path)


def _check_model(backend: Any) -> None:
    added = backend.num_special_tokens_to_add(False)
    if added > _MAX_ADDED_TOKENS:
        raise ModelError(f"the tokenizer's post_processor adds {added:,} tokens to every text")
    for name in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        text = getattr(backend.model, name, None)
        if isinstance(text, str) and len(text) > _MAX_PART_CHARS:
            raise ModelError(f"the tokenizer's {name} has {len(text):,} characters")
