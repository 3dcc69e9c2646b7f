"""Reads files as bytes of UTF-8: those that are compressed by gzip or written in UTF-16 are converted as they are read.

Knows nothing of lines.
"""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from flexgen.base.quantities import MIB

READ_ERRORS = (OSError, EOFError, zlib.error)  # the last two come from damaged archives
_GZIP = b"\x1f\x8b"
_UTF16_LOOK_BYTES = 8  # a request begins with ASCII characters


@contextmanager
def open_input(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for reading as UTF-8, decompressed if need be.  Reading may raise any of READ_ERRORS."""
    with ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        if file.peek(2)[:2] == _GZIP:
            file = stack.enter_context(io.BufferedReader(gzip.GzipFile(fileobj=file), MIB))  # pyright: ignore[reportArgumentType]
        encoding = _utf16(file.peek(_UTF16_LOOK_BYTES)[:_UTF16_LOOK_BYTES])
        if encoding is not None:
            file = stack.enter_context(io.BufferedReader(_AsUTF8(file, encoding), MIB))
        yield file


def is_compressed(path: Path) -> bool:
    """Return whether the file is compressed by gzip, so that `open_input` decompresses it."""
    with path.open("rb") as file:
        return file.read(len(_GZIP)) == _GZIP


def utf16_of(path: Path) -> str | None:
    """Return Python's name of the encoding of a file in UTF-16, compressed or not; None for any other encoding."""
    with gzip.open(path) if is_compressed(path) else path.open("rb") as file:
        start = file.read(_UTF16_LOOK_BYTES)
    return "utf-16" if (encoding := _utf16(start)) and start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else encoding


def _utf16(start: bytes) -> str | None:
    """Return the encoding of a file that begins with `start` if it is UTF-16, recognised by its mark or because every other byte is 0."""
    if start.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):  # UTF-32
        return None
    if start.startswith(codecs.BOM_UTF16_LE):
        return "utf-16-le"
    if start.startswith(codecs.BOM_UTF16_BE):
        return "utf-16-be"
    start = start[: len(start) // 2 * 2]
    zeros = [[byte == 0 for byte in start[offset::2]] for offset in (0, 1)]
    if start and not any(zeros[0]) and all(zeros[1]):
        return "utf-16-le"
    return "utf-16-be" if start and all(zeros[0]) and not any(zeros[1]) else None


class _AsUTF8(io.RawIOBase):
    """A file in another encoding, read as UTF-8.  Lone surrogates become malformed UTF-8, so that only their line fails."""

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            piece = self._file.read(MIB)
            text = self._decode(piece)
            self._left = text.encode("utf-8", "surrogatepass")
            if not piece:
                break
        count = min(len(self._left), len(buffer))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count

    def _decode(self, piece: bytes) -> str:
        if not piece:
            self._decoder.errors = "replace"  # half a character at the end
        return self._decoder.decode(piece, final=not piece)
