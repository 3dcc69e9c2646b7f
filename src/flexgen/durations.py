"""Durations as people write them."""

from __future__ import annotations


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
