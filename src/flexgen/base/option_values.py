"""Checks of the values of options as Python's callers give them: each is returned in one form, or refused by the name of its option."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

from flexgen.base.scalars import as_float, as_int, in_python, plain, shown_in_python
from flexgen.errors import OptionError


def one_of(name: str, value: object, *, known: Sequence[str]) -> str:
    """Return one of several names."""
    if not isinstance(value, str) or value not in known:
        raise OptionError(f"{name}={in_python(value)} is unknown; known: {', '.join(known)}")
    return value


def integer(name: str, value: object, *, least: int) -> int:
    """Return an integer that fits 64 bits.  Integers of numpy and 16.0 are accepted, too."""
    number = as_int(value)
    if number is None or not least <= number < 2**63:
        wanted = {1: "a positive integer", -1: "an integer of at least -1"}.get(least, "an integer that fits 64 bits")
        raise OptionError(f"{name} must be {wanted}, not {shown_in_python(value)}")
    return number


def integer_or_none(name: str, value: object, *, least: int) -> int | None:
    """Return an integer, see `integer`, or None."""
    return None if value is None else integer(name, value, least=least)


def seconds_or_none(name: str, value: object) -> float | None:
    """Return a time, or None."""
    number = as_float(value)
    if value is not None and (number is None or number <= 0):
        raise OptionError(f"{name} must be a positive number of seconds, not {shown_in_python(value)}")
    return number


def share_or_none(name: str, value: object) -> float | None:
    """Return a share above 0 and up to 1, or None."""
    number = as_float(value)
    if value is not None and (number is None or not 0 < number <= 1):
        raise OptionError(f"{name} must be a share above 0 and up to 1 (0.1, not 10%), not {shown_in_python(value)}")
    return number


def flag(name: str, value: object) -> bool:
    """Return True or False."""
    found = plain(value)
    if not isinstance(found, bool):
        raise OptionError(f"{name} must be True or False, not {shown_in_python(value)}")
    return found


def text_or_none(name: str, value: object) -> str | None:
    """Return a text that is not empty, or None."""
    if value is not None and not (isinstance(value, str) and value.strip()):
        raise OptionError(f"{name} must be a text that is not empty, or None, not {shown_in_python(value)}")
    return value


def path_or_none(name: str, value: object, *, kind: str = "folder") -> str | None:
    """Return the path of a folder, or of another kind of thing, as a text, or None."""
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if path is not None and not (isinstance(path, str) and path.strip() and "\0" not in path):
        raise OptionError(f"{name} must be the path of a {kind}, or None, not {shown_in_python(value)}")
    return path


def passes_or_none(name: str, value: object) -> str | None:
    """Return passes such as "10:20" as a text, or None."""
    if value is None:
        return None
    try:
        passes = parse_passes(value)
    except ValueError as error:
        raise OptionError(f"{name} must be a range of passes such as '10:20', or None, not {shown_in_python(value)}") from error
    return f"{passes.start}:{'' if passes.stop == sys.maxsize else passes.stop}"


def parse_passes(text: object) -> range:
    """Parse passes such as "10:20", from the first one up to the one that is left out; either may be missing.

    Raises:
        ValueError: This is no such range, or it is empty.
    """
    found = re.fullmatch(r"\s*(\d{0,18})\s*:\s*(\d{0,18})\s*", text) if isinstance(text, str) else None
    passes = range(int(found[1] or 0), int(found[2] or sys.maxsize)) if found else range(0)
    if not passes:
        raise ValueError("these are no passes")
    return passes


def parse_placement(text: object, *, name: str, homes: Sequence[str]) -> dict[str, float]:
    """Parse shares per home such as "device=.2,host=.3,disk=.5", which must add up to 1.

    Args:
        text: The shares as the user wrote them.
        name: The name of the option, for messages.
        homes: The homes that may be named.

    Raises:
        OptionError: A home is unknown, a number is malformed, or the sum is not 1.
    """
    said = f"{name}={in_python(text)}"
    example = f"write shares of {', '.join(homes)}, such as device=.2,host=.3,disk=.5"
    if not isinstance(text, str):
        raise OptionError(f"{said} is not a text; {example}")
    shares: dict[str, float] = dict.fromkeys(homes, 0.0)
    named: set[str] = set()
    for part in text.split(","):
        home, separator, number = part.partition("=")
        home = home.strip()
        if home not in homes or not separator:
            wrong = f"{home!r} is not a tier" if separator else f"{part!r} is not a share"
            raise OptionError(f"{said}: {wrong}; {example}")
        if home in named:
            raise OptionError(f"{said}: {home} is there twice")
        named.add(home)
        try:
            shares[home] = float(number)
        except ValueError as error:
            raise OptionError(f"{said}: {number!r} is not a share: write a number between 0 and 1 (.25, not 25%)") from error
        if not 0 <= shares[home] <= 1:
            raise OptionError(f"{said}: a share must be between 0 and 1 (.25, not 25%)")
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise OptionError(f"{said}: the shares add up to {sum(shares.values()):g}, not 1")
    return shares
