"""How a run is asked to stop, and how it reports that it has stopped.  Signals are handled in cli/."""

from __future__ import annotations

import time

PATIENCE_SECONDS = 10.0  # a pass that takes longer is abandoned, which loses one token per sequence


class Stopped(BaseException):
    """The run stopped because it was asked to.  It is not an Exception, so that no handler takes it for a failure."""


class StopRequest:
    """A request to stop, made in one place and checked by the run between two steps of its work."""

    def __init__(self) -> None:
        self._since: float | None = None

    def ask(self) -> None:
        """Ask the run to stop soon."""
        if self._since is None:
            self._since = time.monotonic()

    @property
    def asked(self) -> bool:
        """Whether the run should stop at the end of its pass."""
        return self._since is not None

    @property
    def overdue(self) -> bool:
        """Whether the run should stop without finishing its pass, because PATIENCE_SECONDS have passed."""
        return self._since is not None and time.monotonic() - self._since >= PATIENCE_SECONDS
