"""Handles SIGINT, SIGTERM and SIGHUP: the first signal asks the run to stop, a second one ends the process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

from flexgen.cli.exit_codes import ExitCode
from flexgen.jobs.interrupt import Stopped, StopRequest

_SIGNALS = {signal.SIGINT: ExitCode.INTERRUPTED, signal.SIGTERM: ExitCode.TERMINATED, signal.SIGHUP: ExitCode.HANGUP}


class StopSignals:
    """A context in which signals become a request to stop.

    The first signal raises Stopped, or within `deferred` asks the job to stop after its pass; a second one ends the process at once, which
    loses nothing that is durable.  Signals that were ignored before (nohup, background jobs) stay ignored.

    Attributes:
        request: The request to stop, which the job checks.
    """

    def __init__(self) -> None:
        self.request = StopRequest()
        self._received: signal.Signals | None = None
        self._deferring = False
        self._previous: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    @property
    def name(self) -> str:
        """The name of the signal that was received."""
        assert self._received is not None
        return self._received.name

    @property
    def exit_code(self) -> ExitCode:
        """The exit code of a command that stops because of the signal."""
        assert self._received is not None
        return _SIGNALS[self._received]

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the first signal only ask the job to stop, instead of raising Stopped, while the context is open."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a child of a library's pool, which ends its children by signals
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if self._received is not None:
            _say(b"flexgen: stopped at once; the same command goes on\n")
            os._exit(_SIGNALS[signal.Signals(number)])
        self._received = signal.Signals(number)
        if not self._deferring:
            raise Stopped
        self.request.ask()
        _say(b"flexgen: stopping after this pass (once more stops at once)\n")

    def __enter__(self) -> StopSignals:
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)


def _say(text: bytes) -> None:
    """Write to stderr if possible: after SIGHUP the terminal may be gone."""
    with suppress(OSError):
        os.write(2, text)
