"""Text that is not JSON lines: arrays, objects over several lines, web pages and tables, and how to make requests of them."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_HEAD_LINES = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The beginning of a file.

    Attributes:
        content: Its first bytes, without a byte order mark.
        whole: Whether this is all of the file.
        suffix: The ending of its name, in lower case.
        path: Its path as a shell understands it.
        compressed: Whether it is compressed by gzip.
        utf16: Python's name of its encoding, if that is UTF-16.
    """

    content: bytes
    whole: bool
    suffix: str
    path: str
    compressed: bool
    utf16: str | None

    @property
    def start(self) -> bytes:
        """The content without blanks before it."""
        return self.content.lstrip()

    def lines(self) -> list[bytes]:
        """The first lines that are not blank; one that is cut off is left out."""
        lines = self.content.split(b"\n")
        return [line.strip() for line in (lines if self.whole else lines[:-1]) if line.strip()][:_HEAD_LINES]

    def text(self) -> str:
        """The content as text."""
        return self.content.decode("utf-8", "replace")

    def opened(self) -> str:
        """The expression that opens the text in a Python script, whatever the locale; text that is not Unicode is taken to be Excel's."""
        encoding = self.utf16 or "utf-8-sig"
        try:
            codecs.getincrementaldecoder("utf-8")().decode(self.content, final=self.whole)
        except UnicodeDecodeError:
            encoding = "cp1252"
        opener = '__import__("gzip").open(sys.argv[1], "rt"' if self.compressed else "open(sys.argv[1]"
        return f'{opener}, encoding="{encoding}", newline="")'


@dataclass(frozen=True, slots=True, kw_only=True)
class Mistake:
    """What a file is, and what to do about it."""

    what: str
    remedy: str


def is_object(line: bytes) -> bool:
    """Whether a line holds a JSON object."""
    return isinstance(_value(line), dict)


def _value(text: bytes) -> Any:
    """The JSON value that the text holds; None where it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def is_array_over_lines(head: Head) -> bool:
    """Whether an array is spread over lines, some of which may be objects by themselves."""
    return head.start.startswith(b"[") and (head.lines() or [b""])[0] == b"[" and head.whole and isinstance(_value(head.content), list)


def _array(head: Head) -> Mistake | None:
    if not head.start.startswith(b"["):
        return None
    script = f"import json, sys; [print(json.dumps(each)) for each in json.load({head.opened()})]"
    remedy = f"python3 -c {shlex.quote(script)} {head.path} > requests.jsonl"
    if not head.compressed and head.utf16 is None:
        remedy = f"jq -c '.[]' {head.path} > requests.jsonl, or {remedy}"
    remedy = f"write a line for each of its elements: {remedy}"
    return Mistake(what="one JSON array", remedy=remedy)


def pretty_object(head: Head) -> Mistake | None:
    """Finds JSON objects that go over several lines."""
    lines = head.lines()
    if not head.start.startswith(b"{") or len(lines) < 2 or is_object(lines[0]):
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
    return Mistake(what=what, remedy=f"write each on a line of its own: jq -c {shlex.quote(query)} {head.path} > requests.jsonl")


def _list_after(line: bytes) -> str | None:
    """The key of the list that begins on a line of an object that is too long to be looked at whole."""
    begin = re.match(rb'"(\w+)":\s*\[$', line)
    return None if begin is None or begin[1] == b"messages" else begin[1].decode()


def _list_in(found: dict[str, Any]) -> str | None:
    """The key of the list of objects in an object that is not a request itself."""
    if "messages" in found or "body" in found:
        return None
    return next((key for key, value in found.items() if isinstance(value, list) and value and isinstance(value[0], dict)), None)


def _web_page(head: Head) -> Mistake | None:
    start = head.start[:64].lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head")):
        return Mistake(what="a web page", remedy="a download may have ended in an error page or a login: download the file itself")
    if start.startswith(b"<?xml"):
        return Mistake(what="an XML document", remedy="write a JSON object for each request, one per line")
    return None


def _table(head: Head) -> Mistake | None:
    """Finds comma-separated values and the like: the same number of fields in every row, below names of columns."""
    if head.start.startswith((b"{", b"[", b"<")):
        return None
    for delimiter, kind in (
        ("\t", "tab-separated values (TSV)"),
        (",", "comma-separated values (CSV)"),
        (";", "values between semicolons"),
    ):
        rows = _rows(head, delimiter)
        if _has_columns(rows):
            return Mistake(what=f"a table of {kind}", remedy=_from_table(head, rows, delimiter))
    if head.suffix in (".csv", ".tsv") and (rows := _rows(head, ",")):
        return Mistake(what="a table", remedy=_from_table(head, rows, ","))
    return None


def _rows(head: Head, delimiter: str) -> list[list[str]]:
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


def _from_table(head: Head, rows: Sequence[Sequence[str]], delimiter: str) -> str:
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


LOOKS_AT_TEXT: tuple[Callable[[Head], Mistake | None], ...] = (_array, pretty_object, _web_page, _table)
