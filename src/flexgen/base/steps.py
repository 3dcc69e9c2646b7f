"""Announcements of steps that may take long, through one logger, so that a display may replace a line when the next step begins."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from flexgen.base.quantities import counted

LOGGER = "flexgen.base.steps"
_logger = logging.getLogger(LOGGER)
_COUNT_SECONDS = 5.0

Item = TypeVar("Item")


def step(text: str) -> None:
    """Announce the step that begins now, such as "loading weights"."""
    _logger.info("%s ...", text)


def counted_lines(lines: Iterable[Item], text: str) -> Iterator[Item]:
    """Yield the lines; announce the step at its beginning, and now and then how many lines there were."""
    step(text)
    due = time.monotonic() + _COUNT_SECONDS
    for count, line in enumerate(lines):
        if time.monotonic() >= due:
            step(f"{text}: {counted(count, 'line')} so far")
            due = time.monotonic() + _COUNT_SECONDS
        yield line
