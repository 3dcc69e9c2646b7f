"""What takes long says so when it begins: one logger, whose lines a display may take away when the next step comes."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

LOGGER = "flexgen.base.steps"
_logger = logging.getLogger(LOGGER)
_COUNT_SECONDS = 5.0

Item = TypeVar("Item")


def step(text: str) -> None:
    """What begins now, such as "loading weights"."""
    _logger.info("%s ...", text)


def counted_lines(lines: Iterable[Item], text: str) -> Iterator[Item]:
    """The lines themselves; says what begins, and now and then how many there were."""
    step(text)
    due = time.monotonic() + _COUNT_SECONDS
    for count, line in enumerate(lines):
        if time.monotonic() >= due:
            step(f"{text}: {count:,} lines so far")
            due = time.monotonic() + _COUNT_SECONDS
        yield line
