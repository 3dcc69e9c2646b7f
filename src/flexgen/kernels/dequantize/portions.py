"""How many numbers torch operations decode at once, which bounds what they allocate."""

from __future__ import annotations

from collections.abc import Iterator

_AT_ONCE = 1 << 21  # in a few tensors of 4 or 8 bytes for each number


def portions(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows whose numbers are few enough to be decoded at once."""
    step = max(_AT_ONCE // max(columns, 1), 1)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
