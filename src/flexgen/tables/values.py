"""The text of a value of a table, for prompts and for formats that hold text only."""

from __future__ import annotations

import json
from typing import Any, cast

from flexgen.errors import RequestError


def text_of(value: Any) -> str:
    """Return a value as text.

    None and NaN are empty; numbers are written as Python writes them, true and false as JSON does; lists and objects are JSON; dates, times
    and decimals have their usual form.

    Raises:
        RequestError: The value is bytes that are not UTF-8.
    """
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple, dict)):
        return json.dumps(value, ensure_ascii=False, default=cell_of)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise RequestError("the value is bytes that are not UTF-8", code="invalid_row") from error
    return str(value)


def surrogate_fault(text: str) -> str | None:
    """Return what is wrong with a text that is not Unicode, "half of a surrogate pair (...)"; None if nothing is.

    JSON can write such a text, and no file in UTF-8 can hold it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"half of a surrogate pair ({escaped(text[error.start])}), which is no character"
    return None


def unicode_text(text: str, what: str) -> str:
    """Return a text.

    Args:
        text: The text.
        what: What it is, for the message.

    Raises:
        RequestError: It is not Unicode.
    """
    if fault := surrogate_fault(text):
        raise RequestError(f"{what} has {fault}", code="invalid_row")
    return text


def escaped(value: Any) -> Any:
    """Return a value whose texts UTF-8 can hold: half of a surrogate pair becomes an escape such as \\ud800, as JSON has it."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, list):
        return [escaped(each) for each in cast("list[Any]", value)]
    if isinstance(value, dict):
        return {escaped(name): escaped(each) for name, each in cast("dict[str, Any]", value).items()}
    return value


def cell_of(value: Any) -> str:
    """Return a value as text for a table to be written: that of `text_of`, and bytes that are not UTF-8 with escapes such as \\xff."""
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else text_of(value)
