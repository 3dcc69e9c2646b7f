"""Reads the texts of an evaluation: a text file is one document, a file of JSON lines has one in each line."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

from flexgen.base.text_input import READ_ERRORS, open_input
from flexgen.errors import JobError, StorageError

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_JSON_LINES = (".jsonl", ".ndjson")


def read_documents(path: Path, limit: int | None = None) -> list[str]:
    """Return the texts of a file, in UTF-8 or UTF-16, plain or compressed by gzip.

    Args:
        path: A file of JSON lines with the key `text`, by its name, or any other file, which is one text.
        limit: The most texts to read; None for all.

    Raises:
        JobError: A line is not such an object, the file is not text in UTF-8, or it has nothing but white space.
        StorageError: The file cannot be read.
    """
    name = path.name.removesuffix(".gz")
    found = _lines(path) if name.endswith(_JSON_LINES) else iter([_whole(path)])
    documents = [text for text in itertools.islice(found, limit) if text]
    if not any(text.strip() for text in documents):
        raise JobError(f"{path} has no text: it is empty, or white space only")
    return documents


def read_lines(path: Path, limit: int | None = None) -> list[str]:
    """Return the texts of a file of JSON lines with the key `text`, whatever its name; see `read_documents`."""
    texts = list(itertools.islice(_lines(path), limit))
    if not texts:
        raise JobError(f"{path} has no lines")
    return texts


def _whole(path: Path) -> str:
    try:
        with open_input(path) as file:
            content = file.read()
    except READ_ERRORS as error:
        raise _unreadable(path, error) from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JobError(f"{path} is not text in UTF-8: byte {error.start:,} is {error.object[error.start]:#04x}") from error
    if "\0" in text:
        raise JobError(f"{path} is not text but binary data: byte {content.index(0):,} is 0x00")
    return text


def _unreadable(path: Path, error: Exception) -> StorageError:
    return StorageError(f"{path} cannot be read: {(error.strerror if isinstance(error, OSError) else None) or error}")


def _lines(path: Path) -> Iterator[str]:
    try:
        with open_input(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _text(path, number, line)
    except READ_ERRORS as error:
        raise _unreadable(path, error) from error


def _text(path: Path, number: int, line: bytes) -> str:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise JobError(f'{path}, line {number}: not JSON; each line must be an object like {{"text": "..."}}') from error
    text = found.get("text") if isinstance(found, dict) else None
    if not isinstance(text, str):
        raise JobError(f'{path}, line {number}: there is no "text"; each line must be an object like {{"text": "..."}}')
    if (lone := _LONE_SURROGATE.search(text)) is not None:
        raise JobError(f"{path}, line {number}: the text has a lone surrogate at character {lone.start()}, which is no character")
    return text
