"""Recognises text that is not JSON lines (arrays, objects over several lines, web pages, tables), and says how to make requests of it."""

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
        content: The first bytes of the file, without a byte order mark.
        whole: Whether `content` is all of the file.
        suffix: The suffix of the file's name, in lower case.
        path: The path of the file, quoted for a shell.
        compressed: Whether the file is compressed by gzip.
        utf16: Python's name of the file's encoding if that is UTF-16, otherwise None.
    """

    content: bytes
    whole: bool
    suffix: str
    path: str
    compressed: bool
    utf16: str | None

    @property
    def start(self) -> bytes:
        """The content without leading white space."""
        return self.content.lstrip()

    def lines(self) -> list[bytes]:
        """Return the first lines that are not blank, without one that is cut off."""
        lines = self.content.split(b"\n")
        return [line.strip() for line in (lines if self.whole else lines[:-1]) if line.strip()][:_HEAD_LINES]

    def text(self) -> str:
        """Return the content as text."""
        return self.content.decode("utf-8", "replace")

    def opened(self) -> str:
        """Return the Python expression that opens the file as text in any locale.

        Text that is neither UTF-8 nor UTF-16 is taken for Windows-1252.
        """
        encoding = self.utf16 or "utf-8-sig"
        try:
            codecs.getincrementaldecoder("utf-8")().decode(self.content, final=self.whole)
        except UnicodeDecodeError:
            encoding = "cp1252"
        opener = '__import__("gzip").open(sys.argv[1], "rt"' if self.compressed else "open(sys.argv[1]"
        return f'{opener}, encoding="{encoding}", newline="")'


@dataclass(frozen=True, slots=True, kw_only=True)
class Mistake:
    """A file that is not a file of requests.

    Attributes:
        what: The kind of the file, for messages.
        remedy: The steps that make a file of requests of it.
    """

    what: str
    remedy: str


def is_object(line: bytes) -> bool:
    """Return whether a line holds a JSON object."""
    return isinstance(_value(line), dict)


def _value(text: bytes) -> Any:
    """Return the JSON value of a text; None where it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def is_array_over_lines(head: Head) -> bool:
    """Return whether the file is a JSON array over several lines, some of which may be objects by themselves."""
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
    """Recognise JSON objects that extend over several lines; return None for anything else."""
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
    except (ValueError, RecursionError):  # a number of thousands of digits, or deep nesting, is an error of that line alone
        return None
    else:
        if "\n" not in head.text().lstrip()[:end]:
            return None
    key = _list_in(found) if found else _list_after(lines[1])
    what = "JSON objects that go over several lines" if key is None else f"one JSON object with the list {key!r}"
    query = "." if key is None else f".[{json.dumps(key)}][]"
    return Mistake(what=what, remedy=f"write each on a line of its own: jq -c {shlex.quote(query)} {head.path} > requests.jsonl")


def _list_after(line: bytes) -> str | None:
    """Return the key of the list that begins on this line of an object that is longer than the head."""
    begin = re.match(rb'"(\w+)":\s*\[$', line)
    return None if begin is None or begin[1] == b"messages" else begin[1].decode()


def _list_in(found: dict[str, Any]) -> str | None:
    """Return the key of a list of objects in an object that is not itself a request."""
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
    """Recognise comma-separated values and the like: column names, and the same number of fields in every row."""
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
    return rows if head.whole else rows[:-1]  # the last row may have been cut within quotes


def _has_columns(rows: Sequence[Sequence[str]]) -> bool:
    if len(rows) < 2 or len(rows[0]) < 2:
        return False
    names = rows[0]
    are_names = len({*names}) == len(names) and all(re.fullmatch(r"[\w .:/#()%?-]{1,60}", name) for name in names)
    return are_names and list(rows[1]) != list(names) and all(len(row) == len(names) for row in rows)


def _from_table(head: Head, rows: Sequence[Sequence[str]], delimiter: str) -> str:
    """Return a command that makes requests of the rows.

    The prompt is the column named prompt, text, question or input, else the one with the longest text.
    """
    names = list(rows[0])
    lengths = [sum(len(row[column]) for row in rows[1:] if column < len(row)) for column in range(len(names))]
    known = [name for name in names if name.strip().lower() in ("prompt", "text", "question", "input")]
    prompt = known[0] if known else names[lengths.index(max(lengths))]
    ids = [name for name in names if name.strip().lower() == "id" and name != prompt]
    fields = "".join(f'"id": row[{json.dumps(name, ensure_ascii=False)}], ' for name in ids[:1])
    fields += f'"prompt": row[{json.dumps(prompt, ensure_ascii=False)}]'
    how = "" if delimiter == "," else f", delimiter={json.dumps(delimiter)}"
    script = f"import csv, json, sys; [print(json.dumps({{{fields}}})) for row in csv.DictReader({head.opened()}{how})]"
    return (
        f"`flexgen map` takes tables; or make a line of each row: python3 -c {shlex.quote(script)} {head.path} > requests.jsonl "
        f"(here the column {prompt!r} is the prompt; --input-format text takes every line as a prompt as it stands)"
    )


LOOKS_AT_TEXT: tuple[Callable[[Head], Mistake | None], ...] = (_array, pretty_object, _web_page, _table)
