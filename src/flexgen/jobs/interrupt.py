"""How a run is asked to stop, and how it says that it has.  What asks (signals) is the command's business."""

from __future__ import annotations

import time

PATIENCE_SECONDS = 10.0  # a pass that ends within this is finished; of a longer one a token per sequence is given up


class Stopped(BaseException):
    """The run stopped because it was asked to.  No Exception, so that nobody takes it for a failure of theirs."""


class StopRequest:
    """Asked for by one, looked at by another between two steps of the work."""

    def __init__(self) -> None:
        self._since: float | None = None

    def ask(self) -> None:
        """Ask the run to stop, soon."""
        if self._since is None:
            self._since = time.monotonic()

    @property
    def asked(self) -> bool:
        """Whether the run should stop at the end of its pass."""
        return self._since is not None

    @property
    def overdue(self) -> bool:
        """Whether the pass takes too long to be finished."""
        return self._since is not None and time.monotonic() - self._since >= PATIENCE_SECONDS
