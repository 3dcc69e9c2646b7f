"""Durations as people write them."""

from __future__ import annotations

import re

_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_PLAIN = re.compile(_NUMBER)
_UNITS = (("d(?:ays?)?", 86400.0), ("h(?:ours?|rs?)?", 3600.0), ("m(?:in(?:utes?|s)?)?", 60.0), ("s(?:ec(?:onds?|s)?)?", 1.0))
_PARTS = re.compile("".join(f"(?:{_NUMBER}{unit})?" for unit, _ in _UNITS))


def parse_seconds(text: str) -> float:
    """Seconds meant by "90", "90s", "30min", "8h", "1h30m" or "1d".

    Raises:
        ValueError: the text is no duration.
    """
    given = "".join(text.lower().split())
    if _PLAIN.fullmatch(given):
        return float(given)
    parts = _PARTS.fullmatch(given)
    if not given or parts is None:
        raise ValueError(f"{text!r} is not a time; write seconds (90), or 30min, 8h, 1h30m, 1d")
    return sum(float(number) * seconds for number, (_, seconds) in zip(parts.groups(default="0"), _UNITS, strict=True))


def format_seconds(seconds: float | None) -> str:
    """A duration for people: 31 ms, 4.2 s, 3:07 min, 1:02:33 h; a dash for None."""
    if seconds is None:
        return "-"
    if 0 < seconds < 0.0995:
        return f"{1000 * seconds:.2g} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"
