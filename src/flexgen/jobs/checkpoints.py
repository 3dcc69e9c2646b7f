"""What a run does between two steps of the engine: it stores what is due, tells how far it is, and stops if it was asked to."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from flexgen.errors import StorageError
from flexgen.jobs.interrupt import Stopped, StopRequest
from flexgen.jobs.results import Results
from flexgen.jobs.serving import Serving
from flexgen.report.progress import Progress
from flexgen.request import PartialAnswer

logger = logging.getLogger(__name__)


class Checkpoints:
    """The callbacks of one run of the engine.

    Args:
        results: What takes the results.
        serving: The lines that the model is answering.
        stop: The request to stop.
        seconds: The least time between two passes after which the tokens of answers in progress are stored.
        tell: Called with the progress of the run.
    """

    def __init__(self, results: Results, serving: Serving, stop: StopRequest, *, seconds: float, tell: Callable[[Progress], None]) -> None:
        self._results, self._serving, self._stop, self._seconds, self._tell = results, serving, stop, seconds, tell
        self._next = time.monotonic() + seconds
        self._unfinished: Iterable[PartialAnswer] = ()

    def within_pass(self, progress: Progress) -> None:
        """Store what is due.

        Raises:
            Stopped: The run was asked to stop a while ago; the tokens up to the last pass are stored.
        """
        self._results.commit_if_due()
        if self._stop.overdue:
            self._results.commit(self._serving.progress(self._unfinished))
            raise Stopped
        self._tell(progress)

    def after_pass(self, live: Iterable[PartialAnswer]) -> None:
        """Store the tokens of answers in progress, now and then.

        Raises:
            Stopped: The run was asked to stop; all tokens are stored.
        """
        self._unfinished = live
        asked = self._stop.asked  # read once, because it may change between two reads
        if asked or time.monotonic() >= self._next:
            self._results.commit(self._serving.progress(live))
            self._next = time.monotonic() + self._seconds
        if asked:
            raise Stopped


def rescue(results: Results) -> None:
    """Store finished lines when a run stops for any reason."""
    try:
        results.commit()
    except StorageError as error:
        logger.warning("what was finished last could not be stored, and will be answered again: %s", error)
