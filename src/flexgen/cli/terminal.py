"""What commands share on the terminal: a display for their messages and the library's log, and their last words."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from flexgen.report.show import Display


@contextmanager
def showing(progress: str, *, messages: TextIO | None = None, results: TextIO | None = None, steps: bool = True) -> Iterator[Display]:
    """A display to which the library's log goes, too; its first step is the loading of libraries, which takes seconds.

    Args:
        messages, results: Where these go; None is stderr, and stdout for what may be lost.
        steps: Whether to say what begins.
    """
    from flexgen.base.steps import LOGGER as STEPS
    from flexgen.base.steps import step
    from flexgen.cli.streams import reports
    from flexgen.report.show import open_display

    display = open_display(progress, messages or sys.stderr, results or reports(), steps=sys.stderr)

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name != STEPS:
                display.message(self.format(record))
            elif steps:
                display.step(self.format(record))

    log, handler = logging.getLogger("flexgen"), Handler()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        step("loading libraries")
        yield display
    finally:
        log.removeHandler(handler)
        display.close()
