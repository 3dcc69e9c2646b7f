"""The display that commands share, for their own messages and for the library's log."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from flexgen.cli.spelling import in_flags

if TYPE_CHECKING:
    from flexgen.report.show import Display


@contextmanager
def showing(progress: str, *, messages: TextIO | None = None, results: TextIO | None = None, steps: bool = True) -> Iterator[Display]:
    """Open a display that also shows the library's log.  Its first step is the loading of libraries, which takes seconds.

    Args:
        progress: The value of `--progress`.
        messages: The stream for messages and progress; None for stderr.
        results: The stream for reports; None for stdout, where they are dropped if they cannot be written.
        steps: Whether to show steps when they begin.
    """
    from flexgen.base.steps import LOGGER as STEPS
    from flexgen.base.steps import step
    from flexgen.cli.streams import reports
    from flexgen.report.show import open_display

    display = open_display(progress, messages or sys.stderr, results or reports(), steps=sys.stderr, spelled=in_flags)

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                display.warning(in_flags(self.format(record)))
            elif record.name != STEPS:
                display.message(in_flags(self.format(record)))
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
