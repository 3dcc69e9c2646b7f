"""Reads the lines of a request file, one at a time and in bounded memory even for hostile files.  Knows JSON, but not requests."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

from flexgen.base.quantities import MIB, format_size
from flexgen.errors import RequestError

MAX_LINE_BYTES = 16 * MIB  # some two million token ids
_BOM = b"\xef\xbb\xbf"
_CHUNK_BYTES = MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line that is not blank.

    Attributes:
        number: The line's number, from 1; blank lines are counted.
        content: The line without its end; None if it is longer than the limit.
        digest: 64 bits of the content's hash, never 0.
    """

    number: int
    content: bytes | None
    digest: int


def read_lines(file: BinaryIO, *, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[Line]:
    """Yield every line that is not blank.  Lines end in LF or CRLF; a byte order mark before the first line is dropped."""
    number = 0
    while start := file.readline(max_line_bytes + 2):
        number += 1
        whole = start.endswith(b"\n") or len(start) < max_line_bytes + 2
        if number == 1:
            start = start.removeprefix(_BOM)
        content = start.rstrip(b"\r\n")
        hasher = hashlib.blake2b(content, digest_size=8)
        if not whole:
            _skip_line(file, hasher)
        if content.strip() or not whole:
            digest = int.from_bytes(hasher.digest(), "little") or 1
            yield Line(number=number, content=content if whole and len(content) <= max_line_bytes else None, digest=digest)


def _skip_line(file: BinaryIO, hasher: hashlib.blake2b) -> None:
    """Read to the end of a line that is too long, in pieces."""
    while piece := file.readline(_CHUNK_BYTES):
        hasher.update(piece)
        if piece.endswith(b"\n"):
            return


def parse_text(line: Line) -> str:
    """Return the text of a line.

    Raises:
        RequestError: The line is too long (`line_too_long`) or not UTF-8 (`invalid_utf8`).
    """
    if line.content is None:
        raise RequestError(f"the line is longer than {format_size(MAX_LINE_BYTES)}", code="line_too_long")
    try:
        return line.content.decode()
    except UnicodeDecodeError as error:
        found = f"0x{line.content[error.start]:02x} at byte {error.start}"
        hint = "in Windows-1252 or Latin-1, iconv -f WINDOWS-1252 -t UTF-8 converts it"
        raise RequestError(f"the line is not UTF-8 ({found}); if the file is {hint}", code="invalid_utf8") from error


def parse_object(line: Line) -> dict[str, Any]:
    """Parse a line as a JSON object, more strictly than Python: standard JSON only, each key once, and no lone surrogates.

    Raises:
        RequestError: The line is not a JSON object (`invalid_json`), or see `parse_text`.
    """
    text = parse_text(line)
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise _invalid("it is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise _invalid("it has a lone surrogate") from error
    except ValueError as error:  # JSONDecodeError, or an integer of thousands of digits
        raise _invalid(str(error)) from error
    if not isinstance(value, dict):
        raise _invalid("it is not a JSON object")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        name = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _invalid(f"the key {name!r} is there twice")
    return value


def _constant(name: str) -> NoReturn:
    raise _invalid(f"{name} is not a JSON number")


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _invalid(f"the number {digits[:20]} is out of range")
    return value


def _invalid(reason: str) -> RequestError:
    return RequestError(f"the line is not valid JSON: {reason}", code="invalid_json")
