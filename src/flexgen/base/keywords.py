"""Frozen dataclasses that name what is wrong with a keyword, instead of raising Python's own errors."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from flexgen.base.scalars import plain, shown_in_python
from flexgen.errors import RequestError

_Class = TypeVar("_Class")


def names_keywords(
    unsupported: Mapping[str, Any], *, write: Callable[[object], str] = shown_in_python
) -> Callable[[type[_Class]], type[_Class]]:
    """Return a decorator that makes a frozen dataclass refuse keywords by name, and explain how to change a value.

    Args:
        unsupported: Keywords whose effect is not supported, with the value that asks for no effect, as None always does.
        write: Writes a value that is not supported, for messages.
    """
    return lambda cls: _decorated(cls, unsupported, write)


def _decorated(cls: type[_Class], unsupported: Mapping[str, Any], write: Callable[[object], str]) -> type[_Class]:
    dataclass_type: Any = cls
    known = [each.name for each in dataclasses.fields(dataclass_type)]
    init = dataclass_type.__init__

    @functools.wraps(init)
    def __init__(self: Any, **keywords: Any) -> None:
        for name, value in keywords.items():
            if name in unsupported and value is not None and not _is_neutral(plain(value), unsupported[name]):
                raise RequestError(f"{name}={write(value)} is not supported yet", code="unsupported_field", param=name)
            if name not in known and name not in unsupported:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise RequestError(f"{cls.__name__} has no {name!r}{hint}", code="unknown_field", param=name)
        init(self, **{name: value for name, value in keywords.items() if name in known})

    def __setattr__(self: Any, name: str, value: object) -> None:
        other = f"dataclasses.replace(params, {name}={shown_in_python(value)})"
        raise dataclasses.FrozenInstanceError(f"{cls.__name__} does not change, because calls may share it: make another, {other}")

    dataclass_type.__init__, dataclass_type.__setattr__ = __init__, __setattr__
    return cls


def _is_neutral(value: Any, neutral: Any) -> bool:
    """Return whether a value asks for no effect: 1.0 is 1, but true is not."""
    return isinstance(value, (int, float)) and isinstance(value, bool) == isinstance(neutral, bool) and value == neutral
