"""The bytes that an entry of a vocabulary stands for, by its name.  Knows no tokenizer."""

from __future__ import annotations

import functools
import re

_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")  # how a vocabulary with byte fallback names a byte


def piece_bytes(piece: object, text: str) -> bytes:
    """Return the bytes of a vocabulary entry that is not a whole text.

    It is named as byte fallback does, or written in the alphabet of byte-level vocabularies.
    """
    if not isinstance(piece, str):
        return text.encode()
    if (byte := _BYTE_PIECE.fullmatch(piece)) is not None:
        return bytes.fromhex(byte[1])
    alphabet = _byte_alphabet()
    return bytes(alphabet[each] for each in piece) if all(each in alphabet for each in piece) else text.encode()


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet of bytes.

    Printable bytes stand for themselves; the others, in their order, are written as the characters from the 256th on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
