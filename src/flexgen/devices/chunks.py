"""Large copies, cut into chunks of which few are outstanding at a time, so that small copies of another stream get through between them.

A link may carry one copy at a time, and a copy that has begun is not interrupted; priorities of streams do not concern copies.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from flexgen.base.quantities import MIB
from flexgen.devices.base import Event

# At 25 GB/s a copy of another stream waits for at most 1 ms of outstanding chunks, and the thread that submits them has 0.7 ms to notice
# that one has ended before the link would be idle.
CHUNK_BYTES = 8 * MIB
OUTSTANDING_BYTES = 3 * CHUNK_BYTES

SomeEvent = TypeVar("SomeEvent", bound=Event)


class Chunks(Generic[SomeEvent]):
    """Copies in one stream, submitted chunk by chunk.  Thread-safe: copies of several threads share the stream, a chunk at a time.

    Args:
        start: A function that starts a copy of bytes, uint8 (n,), from its second argument to its first, after those before it.
        chunk_bytes: The bytes of a chunk.
        outstanding_bytes: The bytes that may be outstanding; at least those of a chunk.
    """

    def __init__(
        self,
        start: Callable[[torch.Tensor, torch.Tensor], SomeEvent],
        chunk_bytes: int = CHUNK_BYTES,
        outstanding_bytes: int = OUTSTANDING_BYTES,
    ) -> None:
        self._start, self._chunk_bytes, self._most_bytes = start, chunk_bytes, outstanding_bytes
        self._lock = threading.Lock()
        self._outstanding: deque[tuple[SomeEvent, int]] = deque()
        self._bytes = 0

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> SomeEvent:
        """Copy a contiguous tensor; the thread sleeps while as many bytes as may be are outstanding.

        Returns:
            The completion of the last chunk, and so of all of them.
        """
        parts = zip(*(each.view(-1).view(torch.uint8).split(self._chunk_bytes) for each in (destination, source)), strict=True)
        return [self._submit(*part) for part in parts][-1]

    def _submit(self, destination: torch.Tensor, source: torch.Tensor) -> SomeEvent:
        with self._lock:
            while self._outstanding and self._bytes + source.nbytes > self._most_bytes:
                oldest, size_bytes = self._outstanding.popleft()
                self._bytes -= size_bytes
                oldest.wait()
            event = self._start(destination, source)
            self._outstanding.append((event, source.nbytes))
            self._bytes += source.nbytes
            return event
