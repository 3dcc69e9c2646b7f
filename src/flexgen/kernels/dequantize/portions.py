"""How many numbers torch operations decode at once, which bounds what they allocate."""

from __future__ import annotations

from collections.abc import Iterator

from flexgen.plan.policy import DECODED_AT_ONCE


def portions(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows whose numbers are few enough to be decoded at once."""
    step = max(DECODED_AT_ONCE // max(columns, 1), 1)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
