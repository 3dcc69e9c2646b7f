"""Files that are no files of requests: what they are, by their first bytes, and how to make requests of them.

A file is refused here only if no line that was looked at is a JSON object: one bad line must not stop the others.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen.errors import JobError, StorageError
from flexgen.jobs.input_file import READ_ERRORS, is_compressed, open_input, utf16_of

_HEAD_BYTES = 64 << 10
_HEAD_LINES = 100
_BOM = b"\xef\xbb\xbf"

_UNPACK = "unpack it first: {} {{path}} > requests.jsonl"
_TO_JSONL = 'to_json("requests.jsonl", orient="records", lines=True)'
_TABLE = "make JSON lines of it, with a column named prompt: python3 -c 'import pandas, sys; pandas.{}(sys.argv[1]).{}' {{path}}"
_WEIGHTS = "requests come from a file of JSON lines: flexgen run MODEL INPUT -o OUTPUT"
# The bytes that a file begins with: what it is, and what to do.
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"\x28\xb5\x2f\xfd", "a file compressed by zstd", _UNPACK.format("zstd -dc")),
    (b"\xfd7zXZ\0", "a file compressed by xz", _UNPACK.format("xz -dc")),
    (b"\x04\x22\x4d\x18", "a file compressed by lz4", _UNPACK.format("lz4 -dc")),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first: 7z x {path}"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it first: unrar x {path}"),
    (b"PAR1", "a Parquet file", _TABLE.format("read_parquet", _TO_JSONL)),
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    """The beginning of a file.

    Attributes:
        content: without a byte order mark. whole: whether this is all of the file. suffix: of its name, in lower case.
        path: as a shell understands it. compressed: by gzip. utf16: what Python calls its encoding, if that is UTF-16.
    """

    content: bytes
    whole: bool
    suffix: str
    path: str
    compressed: bool
    utf16: str | None

    @property
    def start(self) -> bytes:
        return self.content.lstrip()

    def lines(self) -> list[bytes]:
        """The first lines that are not blank; one that is cut off is left out."""
        lines = self.content.split(b"\n")
        return [line.strip() for line in (lines if self.whole else lines[:-1]) if line.strip()][:_HEAD_LINES]

    def text(self) -> str:
        return self.content.decode("utf-8", "replace")

    def opened(self) -> str:
        """The expression that opens the text in a Python script, whatever the locale; what is not Unicode is taken to be Excel's."""
        encoding = self.utf16 or "utf-8-sig"
        try:
            codecs.getincrementaldecoder("utf-8")().decode(self.content, final=self.whole)
        except UnicodeDecodeError:
            encoding = "cp1252"
        opener = '__import__("gzip").open(sys.argv[1], "rt"' if self.compressed else "open(sys.argv[1]"
        return f'{opener}, encoding="{encoding}", newline="")'


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mistake:
    """What a file is, and what to do about it."""

    what: str
    remedy: str


def check_input(path: Path, *, input_format: str = "jsonl", name: str | None = None) -> None:
    """Look at the first bytes of the input.

    Args:
        name: what messages call it, where that is not its path.

    Raises:
        JobError: it is something else than lines of requests.
        StorageError: it cannot be read.
    """
    try:
        with open_input(path) as file:
            content = file.read(_HEAD_BYTES + 1)
        compressed, utf16 = is_compressed(path), utf16_of(path)
    except READ_ERRORS as error:
        raise StorageError(f"{name or path} cannot be read: {error}") from error
    head = _Head(
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
    if mistake is None and input_format == "jsonl" and not _is_array_over_lines(head) and any(map(_is_object, head.lines())):
        mistake = _pretty_object(head)
    elif mistake is None and input_format == "jsonl":
        mistake = next((found for look in _LOOKS_AT_TEXT if (found := look(head)) is not None), None)
    if mistake is not None:
        raise JobError(f"{name or path} is not a file of requests but {mistake.what}: {mistake.remedy}")


# -- whatever the format of the input -------------------------------------------------------------------------------------------------


def _by_magic(head: _Head) -> _Mistake | None:
    for magic, what, remedy in _MAGIC:
        if head.content.startswith(magic):
            return _Mistake(what=what, remedy=remedy.format(path=head.path))
    return None


def _archive(head: _Head) -> _Mistake | None:
    if head.content.startswith(_ZIP):
        if b"xl/" in head.content or b"[Content_Types].xml" in head.content:
            return _Mistake(what="an Excel or other Office file", remedy=_TABLE.format("read_excel", _TO_JSONL).format(path=head.path))
        return _Mistake(what="a zip archive", remedy=f"unpack it first: unzip -p {head.path} > requests.jsonl")
    if _BZIP2.match(head.content):
        return _Mistake(what="a file compressed by bzip2", remedy=f"unpack it first: bzip2 -dc {head.path} > requests.jsonl")
    if head.content[257:262] == _TAR:
        return _Mistake(what="a tar archive", remedy=f"unpack it first: tar -xf {head.path}")
    return None


def _weights(head: _Head) -> _Mistake | None:
    if len(head.content) > 9 and head.content[8:10] == b'{"' and int.from_bytes(head.content[:8], "little") < 1 << 32:
        return _Mistake(what="a safetensors file, which holds the weights of a model", remedy=_WEIGHTS)
    return None


def _binary(head: _Head) -> _Mistake | None:
    """NUL bytes alone, or so many control characters that it is no text."""
    if not head.content.strip(b"\0"):
        return _Mistake(what="nothing but NUL bytes", remedy="a full disk or an interrupted copy may have damaged it: write it again")
    start = head.content[:512]
    num_control = sum(byte < 32 and byte not in b"\t\n\r\f\x1b" for byte in start)
    if num_control * 10 > len(start) and not any(map(_is_object, head.lines())):
        return _Mistake(what=f"binary data (it begins with {start[:8].hex(' ')})", remedy="give a text file with one JSON object per line")
    return None


def _carriage_returns(head: _Head) -> _Mistake | None:
    pieces = head.content.split(b"\r")
    if b"\n" in head.content or sum(bool(piece.strip()) for piece in pieces) < 2 or _is_object(head.content):
        return None
    remedy = f"make them line feeds: tr '\\r' '\\n' < {head.path} > requests.jsonl"
    return _Mistake(what="text whose lines end in carriage returns alone", remedy=remedy)


# -- text that is no JSON lines -------------------------------------------------------------------------------------------------------


def _is_object(line: bytes) -> bool:
    return isinstance(_value(line), dict)


def _value(text: bytes) -> Any:
    """What JSON says there; None where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_array_over_lines(head: _Head) -> bool:
    """Whether an array is spread over lines, some of which may be objects by themselves."""
    return head.start.startswith(b"[") and (head.lines() or [b""])[0] == b"[" and head.whole and isinstance(_value(head.content), list)


def _array(head: _Head) -> _Mistake | None:
    if not head.start.startswith(b"["):
        return None
    script = f"import json, sys; [print(json.dumps(each)) for each in json.load({head.opened()})]"
    remedy = f"python3 -c {shlex.quote(script)} {head.path} > requests.jsonl"
    if not head.compressed and head.utf16 is None:
        remedy = f"jq -c '.[]' {head.path} > requests.jsonl, or {remedy}"
    remedy = f"write a line for each of its elements: {remedy}"
    return _Mistake(what="one JSON array", remedy=remedy)


def _pretty_object(head: _Head) -> _Mistake | None:
    """JSON that goes over several lines."""
    lines = head.lines()
    if not head.start.startswith(b"{") or len(lines) < 2 or _is_object(lines[0]):
        return None
    found: Any = None
    try:
        found, end = json.JSONDecoder().raw_decode(head.text().lstrip())
    except json.JSONDecodeError as error:
        cut_off = not head.whole and (error.pos > len(head.text().lstrip()) - 8 or error.msg.startswith("Unterminated string"))
        if not cut_off:
            return None
    except (ValueError, RecursionError):  # a number of thousands of digits, or deep nesting: the line's own error
        return None
    else:
        if "\n" not in head.text().lstrip()[:end]:
            return None
    key = _list_in(found) if found else _list_after(lines[1])
    what = "JSON objects that go over several lines" if key is None else f"one JSON object with the list {key!r}"
    query = "." if key is None else f".[{json.dumps(key)}][]"
    return _Mistake(what=what, remedy=f"write each on a line of its own: jq -c {shlex.quote(query)} {head.path} > requests.jsonl")


def _list_after(line: bytes) -> str | None:
    """The key of the list that begins on a line of an object that is too long to be looked at whole."""
    begin = re.match(rb'"(\w+)":\s*\[$', line)
    return None if begin is None or begin[1] == b"messages" else begin[1].decode()


def _list_in(found: dict[str, Any]) -> str | None:
    """The key of the list of objects that an object which is no request itself holds."""
    if "messages" in found or "body" in found:
        return None
    return next((key for key, value in found.items() if isinstance(value, list) and value and isinstance(value[0], dict)), None)


def _web_page(head: _Head) -> _Mistake | None:
    start = head.start[:64].lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head")):
        return _Mistake(what="a web page", remedy="a download may have ended in an error page or a login: download the file itself")
    if start.startswith(b"<?xml"):
        return _Mistake(what="an XML document", remedy="write a JSON object for each request, one per line")
    return None


def _table(head: _Head) -> _Mistake | None:
    """Comma-separated values and their kin: the same number of fields in every row, below names of columns."""
    if head.start.startswith((b"{", b"[", b"<")):
        return None
    for delimiter, kind in (
        ("\t", "tab-separated values (TSV)"),
        (",", "comma-separated values (CSV)"),
        (";", "values between semicolons"),
    ):
        rows = _rows(head, delimiter)
        if _has_columns(rows):
            return _Mistake(what=f"a table of {kind}", remedy=_from_table(head, rows, delimiter))
    if head.suffix in (".csv", ".tsv") and (rows := _rows(head, ",")):
        return _Mistake(what="a table", remedy=_from_table(head, rows, ","))
    return None


def _rows(head: _Head, delimiter: str) -> list[list[str]]:
    text = head.text()
    text = text if head.whole else text[: text.rfind("\n") + 1]
    try:
        rows = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter) if row]
    except csv.Error:
        return []
    return rows if head.whole else rows[:-1]  # the last may have been cut within quotes


def _has_columns(rows: Sequence[Sequence[str]]) -> bool:
    if len(rows) < 2 or len(rows[0]) < 2:
        return False
    names = rows[0]
    are_names = len({*names}) == len(names) and all(re.fullmatch(r"[\w .:/#()%?-]{1,60}", name) for name in names)
    return are_names and list(rows[1]) != list(names) and all(len(row) == len(names) for row in rows)


def _from_table(head: _Head, rows: Sequence[Sequence[str]], delimiter: str) -> str:
    """A command that makes requests of the rows: the prompt is a column of that name, else the one with the longest text."""
    names = list(rows[0])
    lengths = [sum(len(row[place]) for row in rows[1:] if place < len(row)) for place in range(len(names))]
    known = [name for name in names if name.strip().lower() in ("prompt", "text", "question", "input")]
    prompt = known[0] if known else names[lengths.index(max(lengths))]
    ids = [name for name in names if name.strip().lower() == "id" and name != prompt]
    fields = "".join(f'"id": row[{json.dumps(name, ensure_ascii=False)}], ' for name in ids[:1])
    fields += f'"prompt": row[{json.dumps(prompt, ensure_ascii=False)}]'
    how = "" if delimiter == "," else f", delimiter={json.dumps(delimiter)}"
    script = f"import csv, json, sys; [print(json.dumps({{{fields}}})) for row in csv.DictReader({head.opened()}{how})]"
    return (
        f"make a line of each row: python3 -c {shlex.quote(script)} {head.path} > requests.jsonl "
        f"(here the column {prompt!r} is the prompt; --input-format text takes every line as a prompt as it stands)"
    )


_Look = Callable[[_Head], _Mistake | None]
_LOOKS_AT_BYTES: tuple[_Look, ...] = (_by_magic, _archive, _weights, _binary, _carriage_returns)
_LOOKS_AT_TEXT: tuple[_Look, ...] = (_array, _pretty_object, _web_page, _table)
