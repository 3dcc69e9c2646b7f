"""Refuses files that are not files of requests: recognises them by their first bytes, and says how to make requests of them.

One bad line must not stop the others: text with lines that are JSON objects is refused only where these are parts of one larger array or
object.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

from flexgen.base.text_input import READ_ERRORS, is_compressed, open_input, utf16_of
from flexgen.errors import JobError, StorageError
from flexgen.jobs.mistaken_text import LOOKS_AT_TEXT, Head, Mistake, is_array_over_lines, is_object, pretty_object

_HEAD_BYTES = 64 << 10
_BOM = b"\xef\xbb\xbf"

_UNPACK = "unpack it first: {} {{path}} > requests.jsonl"
_TO_JSONL = 'to_json("requests.jsonl", orient="records", lines=True)'
_TABLE = "make JSON lines of it, with a column named prompt: python3 -c 'import pandas, sys; pandas.{}(sys.argv[1]).{}' {{path}}"
_PROMPTS = "give a text file with one JSON object per line"
_WEIGHTS = "requests come from a file of JSON lines: flexgen run MODEL INPUT -o OUTPUT"
# (first bytes of a file, its kind, the remedy)
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"\x28\xb5\x2f\xfd", "a file compressed by zstd", _UNPACK.format("zstd -dc")),
    (b"\xfd7zXZ\0", "a file compressed by xz", _UNPACK.format("xz -dc")),
    (b"\x04\x22\x4d\x18", "a file compressed by lz4", _UNPACK.format("lz4 -dc")),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first: 7z x {path}"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it first: unrar x {path}"),
    (b"PAR1", "a Parquet file", "`flexgen map` takes tables; or " + _TABLE.format("read_parquet", _TO_JSONL)),
    (b"ARROW1", "an Arrow file", _TABLE.format("read_feather", _TO_JSONL)),
    (b"FEA1", "a Feather file", _TABLE.format("read_feather", _TO_JSONL)),
    (b"ORC", "an ORC file", _TABLE.format("read_orc", _TO_JSONL)),
    (b"\x89HDF\r\n", "an HDF5 file", _TABLE.format("read_hdf", _TO_JSONL)),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Excel or other Office file", _TABLE.format("read_excel", _TO_JSONL)),
    (b"SQLite format 3\0", "an SQLite database", "write a JSON object for each row: sqlite3 {path} -json 'SELECT ...' | jq -c '.[]'"),
    (b"Obj\x01", "an Avro file", "make JSON lines of it, such as: avro-tools tojson {path} > requests.jsonl"),
    (b"%PDF-", "a PDF document", "take its text out first (pdftotext), and write a JSON object for each prompt"),
    (b"\x93NUMPY", "a NumPy array", 'write a line {{"prompt": [ids]}} for each of its rows'),
    (b"\x80\x02", "a Python pickle", "pickles are never opened here: write JSON lines"),
    (b"\x80\x03", "a Python pickle", "pickles are never opened here: write JSON lines"),
    (b"\x80\x04", "a Python pickle", "pickles are never opened here: write JSON lines"),
    (b"\x80\x05", "a Python pickle", "pickles are never opened here: write JSON lines"),
    (b"\x89PNG\r\n", "a PNG image", _PROMPTS),
    (b"\xff\xd8\xff", "a JPEG image", _PROMPTS),
    (b"GIF8", "a GIF image", _PROMPTS),
    (b"\x7fELF", "a program", _PROMPTS),
    (b"GGUF", "a GGUF file, which holds the weights of a model", _WEIGHTS),
    (b"\xff\xfe\0\0", "text in UTF-32", "make it UTF-8: iconv -f UTF-32 -t UTF-8 {path} > requests.jsonl"),
    (b"\0\0\xfe\xff", "text in UTF-32", "make it UTF-8: iconv -f UTF-32 -t UTF-8 {path} > requests.jsonl"),
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer, which stands for a file that was not downloaded",
        "run `git lfs pull` in its repository",
    ),
)  # fmt: skip
_ZIP = b"PK\x03\x04"
_BZIP2 = re.compile(rb"BZh[1-9]1AY&SY")
_TAR = b"ustar"
_CONTROL = bytes(byte for byte in range(32) if byte not in b"\t\n\r\f\x1b")


def check_input(path: Path, *, input_format: str = "jsonl", name: str | None = None) -> None:
    """Check by its first bytes that the input is a file of requests.

    Args:
        path: The input file.
        input_format: The format of the input, see `Forms`.
        name: The name of the input in messages; None for its path.

    Raises:
        JobError: The file is not a file of requests.
        StorageError: The file cannot be read.
    """
    try:
        with open_input(path) as file:
            content = file.read(_HEAD_BYTES + 1)
        compressed, utf16 = is_compressed(path), utf16_of(path)
    except READ_ERRORS as error:
        raise StorageError(f"{name or path} cannot be read: {error}") from error
    head = Head(
        content=content[:_HEAD_BYTES].removeprefix(_BOM),
        whole=len(content) <= _HEAD_BYTES,
        suffix=path.suffix.lower(),
        path=shlex.quote(str(path)) if name is None else "FILE",
        compressed=compressed,
        utf16=utf16,
    )
    if not head.start:
        return
    mistake = next((found for look in _LOOKS_AT_BYTES if (found := look(head)) is not None), None)
    if mistake is None and input_format == "jsonl" and not is_array_over_lines(head) and any(map(is_object, head.lines())):
        mistake = pretty_object(head)
    elif mistake is None and input_format == "jsonl":
        mistake = next((found for look in LOOKS_AT_TEXT if (found := look(head)) is not None), None)
    if mistake is not None:
        raise JobError(f"{name or path} is not a file of requests but {mistake.what}: {mistake.remedy}")


# -- whatever the format of the input -------------------------------------------------------------------------------------------------


def _by_magic(head: Head) -> Mistake | None:
    for magic, what, remedy in _MAGIC:
        if head.content.startswith(magic):
            return Mistake(what=what, remedy=remedy.format(path=head.path))
    return None


def _archive(head: Head) -> Mistake | None:
    if head.content.startswith(_ZIP):
        if b"xl/" in head.content or b"[Content_Types].xml" in head.content:
            return Mistake(what="an Excel or other Office file", remedy=_TABLE.format("read_excel", _TO_JSONL).format(path=head.path))
        return Mistake(what="a zip archive", remedy=f"unpack it first: unzip -p {head.path} > requests.jsonl")
    if _BZIP2.match(head.content):
        return Mistake(what="a file compressed by bzip2", remedy=f"unpack it first: bzip2 -dc {head.path} > requests.jsonl")
    if head.content[257:262] == _TAR:
        return Mistake(what="a tar archive", remedy=f"unpack it first: tar -xf {head.path}")
    return None


def _weights(head: Head) -> Mistake | None:
    if len(head.content) > 9 and head.content[8:10] == b'{"' and int.from_bytes(head.content[:8], "little") < 1 << 32:
        return Mistake(what="a safetensors file, which holds the weights of a model", remedy=_WEIGHTS)
    return None


def _binary(head: Head) -> Mistake | None:
    """Recognise files of NUL bytes alone, and those whose lines are mostly not text and have control characters among them.

    A file in another encoding has none: its lines are errors of their own.
    """
    if not head.content.strip(b"\0"):
        return Mistake(what="nothing but NUL bytes", remedy="a full disk or an interrupted copy may have damaged it: write it again")
    lines = head.lines() or [head.content]
    if sum(map(_is_no_text, lines)) * 2 <= len(lines) or _num_control(head.content) * 20 <= len(head.content):
        return None
    if any(map(is_object, lines)):
        return None
    what = f"binary data (it begins with {head.content[:8].hex(' ')})"
    return Mistake(what=what, remedy="give a text file with one JSON object per line, or with --input-format text a prompt per line")


def _is_no_text(line: bytes) -> bool:
    """Return whether a line is not UTF-8, or has more control characters than text has."""
    try:
        line.decode()
    except UnicodeDecodeError:
        return True
    return _num_control(line) * 10 > len(line)


def _num_control(content: bytes) -> int:
    return len(content) - len(content.translate(None, _CONTROL))


def _carriage_returns(head: Head) -> Mistake | None:
    pieces = head.content.split(b"\r")
    if b"\n" in head.content or sum(bool(piece.strip()) for piece in pieces) < 2 or is_object(head.content):
        return None
    remedy = f"make them line feeds: tr '\\r' '\\n' < {head.path} > requests.jsonl"
    return Mistake(what="text whose lines end in carriage returns alone", remedy=remedy)


_LOOKS_AT_BYTES: tuple[Callable[[Head], Mistake | None], ...] = (_by_magic, _archive, _weights, _binary, _carriage_returns)
