"""One direction between two ranks: a gloo group of the two, with a connection of its own, and windows of messages on it.

gloo moves a message when its receiver has taken memory for it.  The receiver therefore keeps memory for several messages posted
ahead, so that those of many frames are on the way at once and none waits for a round trip.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage] (documented as public)
from torch.distributed.distributed_c10d import ProcessGroupGloo

from flexgen.distributed.frames import CHUNK_BYTES

WINDOW = 8  # messages on their way at once
_DATA, _BREAK = 0, 1  # tags
_FOREVER = timedelta(days=30)  # gloo counts in nanoseconds, which end after some hundred years


class WireError(Exception):
    """The connection broke, or could not be made; the message says what gloo says."""


class SilenceError(WireError):
    """Nothing arrived for too long."""


class Wire:
    """The connection of a sender (0) and a receiver (1).

    Args:
        store: A store that only the two use, through a connection that nobody else uses.
        device: gloo's device, which says on which address to listen.
        sends: Whether this is the sender's end.
        timeout: Seconds until both must be there.

    Raises:
        WireError: The other end did not come.
    """

    def __init__(self, store: Store, device: Any, *, sends: bool, timeout: float) -> None:
        gloo: Any = ProcessGroupGloo  # torch's stubs lack what its own tests use
        options = gloo._Options()
        options._devices, options._threads, options._timeout = [device], 1, timedelta(seconds=timeout)
        self._peer = 1 if sends else 0
        self._lock = threading.Lock()
        self._is_open = True
        try:
            self._group: Any = gloo(store, 1 - self._peer, 2, options)
        except RuntimeError as error:
            raise WireError(_first_line(error)) from error

    def send(self, message: torch.Tensor) -> Any:
        """Begin to send a message, and return gloo's work; the tensor may not change until the work is done."""
        return self._begin(self._group.send, message)

    def receive(self, buffer: torch.Tensor) -> Any:
        """Begin to receive a message of at most the buffer's size, and return gloo's work."""
        return self._begin(self._group.recv, buffer)

    def wait(self, work: Any, seconds: float | None = None) -> None:
        """Wait until a message is sent or received.

        Args:
            work: What `send` or `receive` returned.
            seconds: How long at most; the connection is broken afterwards.

        Raises:
            SilenceError: The time has passed.
            WireError: The connection broke.
        """
        start = time.monotonic()
        try:
            work.wait(_FOREVER if seconds is None else timedelta(seconds=seconds))
        except RuntimeError as error:
            if seconds is not None and time.monotonic() - start >= seconds:
                raise SilenceError(f"nothing has arrived for {seconds:g} s") from error
            raise WireError(_first_line(error)) from error

    def close(self) -> None:
        """Break the connection, which ends the waits of other threads, too.

        A receive that times out is gloo's one way to do so from here: it closes the connections of its group.
        """
        with self._lock:
            is_open, self._is_open = self._is_open, False
        if is_open:
            with suppress(WireError):
                self.wait(self._begin(self._group.recv, torch.empty(1, dtype=torch.uint8), _BREAK), 0.001)

    def _begin(self, operation: Any, tensor: torch.Tensor, tag: int = _DATA) -> Any:
        try:
            return operation([tensor], self._peer, tag)
        except RuntimeError as error:
            raise WireError(_first_line(error)) from error


class Outflow:
    """Messages of one sender, at most WINDOW under way."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._under_way: deque[Any] = deque()

    def send(self, message: torch.Tensor) -> None:
        """Send a message, as soon as there is room in the window.

        Raises:
            WireError: The connection broke.
        """
        while len(self._under_way) >= WINDOW:
            self._wire.wait(self._under_way.popleft())
        self._under_way.append(self._wire.send(message))

    def settle(self) -> None:
        """Wait until all messages are sent.

        Raises:
            WireError: The connection broke.
        """
        while self._under_way:
            self._wire.wait(self._under_way.popleft())


class Inflow:
    """Messages of one receiver, for WINDOW of which memory is posted ahead.

    Args:
        wire: The connection.
        silence_seconds: For how long it may be silent.
    """

    def __init__(self, wire: Wire, silence_seconds: float) -> None:
        self._wire, self._silence_seconds = wire, silence_seconds
        self._posted: deque[tuple[torch.Tensor, Any]] = deque()
        self._read: torch.Tensor | None = None
        for _ in range(WINDOW):
            self._post(torch.empty(CHUNK_BYTES, dtype=torch.uint8))

    def message(self) -> torch.Tensor:
        """Wait for the next message, and return the memory that begins with it; it is valid until the next call.

        Raises:
            WireError: The connection broke or is silent.
        """
        if self._read is not None:
            self._post(self._read)
        self._read, work = self._posted.popleft()
        self._wire.wait(work, self._silence_seconds)
        return self._read

    def _post(self, buffer: torch.Tensor) -> None:
        self._posted.append((buffer, self._wire.receive(buffer)))


def _first_line(error: BaseException) -> str:
    """Return what gloo says, without the place in its sources and without its advice."""
    said = str(error).partition("\n")[0]
    _, bracket, rest = said.partition("] ")
    return (rest if bracket and said.startswith("[") else said).partition(". This is typically")[0]
