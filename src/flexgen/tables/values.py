"""The text of a value of a table, for prompts and for formats that hold text only."""

from __future__ import annotations

import json
from typing import Any

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


def cell_of(value: Any) -> str:
    """Return a value as text for a table to be written: that of `text_of`, and bytes that are not UTF-8 with escapes such as \\xff."""
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else text_of(value)
