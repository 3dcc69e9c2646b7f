"""What both ends of a channel have in common: a thread, its connection, bounded memory, and what becomes of errors."""

from __future__ import annotations

import threading
from collections.abc import Callable

from flexgen.distributed.frames import FrameError
from flexgen.distributed.health import Health
from flexgen.distributed.wire import SilenceError, Wire, WireError
from flexgen.errors import StageError, is_failure

CHECK_SECONDS = 1.0  # how often a wait looks for a loss, besides being woken by it


class StoppedError(Exception):
    """The run ends, so that nothing is sent or received any more."""


class End:
    """One end of a channel.

    Args:
        peer: The rank at the other end.
        name: The name of the thread.
        connect: A function that returns the connection when the other end is there.
        health: The health of the run, which is told of errors.
        most_bytes: Bytes of waiting frames, but for one frame, which may be larger.
    """

    def __init__(self, peer: int, name: str, connect: Callable[[], Wire], health: Health, most_bytes: int) -> None:
        self.peer = peer
        self.num_frames = self.num_bytes = 0
        self.busy_seconds = 0.0
        self._connect, self._health, self._most_bytes = connect, health, most_bytes
        self._waiting_bytes = 0
        self._changed = threading.Condition()
        self._wire: Wire | None = None
        self._is_over = False
        self._thread = threading.Thread(target=self._guarded, name=name, daemon=True)

    def start(self) -> None:
        """Begin to connect."""
        self._health.on_failure(self._wake)
        self._thread.start()

    def shut(self) -> None:
        """Break the connection if there is still one."""
        self._is_over = True
        self._wake()
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.close()

    def join(self, timeout: float) -> None:
        """Wait for the thread, which may be left behind in a connection that does not come about."""
        self._thread.join(timeout)

    def _guarded(self) -> None:
        """Run the thread's work; an error of any kind is a loss for all."""
        own = self._health.name(self._health.rank)
        try:
            wire = self._wire = self._connect()
            self._health.on_failure(wire.close)
            self._run(wire)
        except StoppedError:
            pass
        except SilenceError as error:
            self._suspect(self.peer, f"does not answer: {error} on its connection to {own}")
        except WireError as error:
            self._suspect(self.peer, f"has ended or cannot be reached: its connection to {own} broke ({error})")
        except FrameError as error:
            self._suspect(self.peer, f"{error}, which {own} refused")
        except BaseException as error:
            if not is_failure(error):
                raise
            self._suspect(self._health.rank, f"failed: {type(error).__name__}: {error}")
        finally:
            with self._changed:
                self._is_over = True
            self._wake()

    def _run(self, wire: Wire) -> None:
        raise NotImplementedError

    def _suspect(self, rank: int, reason: str) -> None:
        if not self._is_over:
            self._health.suspect(rank, reason)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _must_stop(self) -> bool:
        return self._is_over or self._health.has_failed

    def _has_room(self, num_bytes: int) -> bool:
        return self._waiting_bytes == 0 or self._waiting_bytes + num_bytes <= self._most_bytes

    def _raise_ended(self) -> None:
        """Raise the error of a channel that has ended, when it has; a loss that is not decided yet comes first.

        Raises:
            StageError: The thread has ended.
        """
        if self._is_over:
            self._health.settle()
            raise StageError(f"{self._health.name(self.peer)} has ended, and {self._health.name(self._health.rank)} has not")
