"""How a loop is handed to whoever runs it, on one thread or on several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Parallel(Protocol):
    """Runs a function over a range, on one thread or on several."""

    def __call__(self, function: Callable[[int, int], None], count: int) -> None:
        """Call `function(begin, end)` for ranges that cover [0, count) once, in any order, and return when all calls have returned."""


def serially(function: Callable[[int, int], None], count: int) -> None:
    """Run a function over a range on the calling thread: the simplest `Parallel`."""
    function(0, count)
