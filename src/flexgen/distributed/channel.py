"""Frames from one rank to another, in order: a thread at each end, with bounded memory for frames that wait."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flexgen.base.quantities import MIB
from flexgen.distributed.ends import CHECK_SECONDS, End, StoppedError
from flexgen.distributed.frames import END, KEEPALIVE, LENGTH, Frame, Limits, mark, messages_of
from flexgen.distributed.health import Health
from flexgen.distributed.incoming import read_frame
from flexgen.distributed.shaping import LinkShape, Shaper
from flexgen.distributed.wire import Inflow, Outflow, Wire
from flexgen.errors import StageError

__all__ = ["Frame", "Limits", "Sender", "Receiver"]

QUEUE_BYTES = 256 * MIB


@dataclass(frozen=True, slots=True)
class _Outgoing:
    """A frame in the queue: its messages and bytes, and when it may arrive at the other end."""

    messages: list[torch.Tensor]
    num_bytes: int
    due: float


class Sender(End):
    """Sends frames to one rank.

    Args:
        peer: The rank.
        connect: A function that returns the connection when the other end is there.
        health: The health of the run.
        link: An artificial link that frames pass through.
        limits: The largest frame.
        most_bytes: Bytes of frames in the queue, but for one frame, which may be larger.

    Attributes:
        num_frames, num_bytes: What has been sent.
        busy_seconds: How long frames were on their way into the connection, or into the artificial link.
    """

    def __init__(
        self, peer: int, connect: Callable[[], Wire], health: Health, *,
        link: LinkShape | None = None, limits: Limits | None = None, most_bytes: int = QUEUE_BYTES,
    ) -> None:  # fmt: skip
        super().__init__(peer, f"send-to-{peer}", connect, health, most_bytes)
        self._shaper = Shaper(link) if link is not None else None
        self._limits = limits or Limits()
        self._queue: deque[_Outgoing] = deque()

    def send(self, kind: str, header: dict[str, Any], tensors: Sequence[torch.Tensor] = ()) -> None:
        """Queue a frame; wait while the queue is full.

        Args:
            kind: Its kind.
            header: Plain JSON values.
            tensors: Tensors in host memory, which nobody changes any more.

        Raises:
            StageError: A rank is lost.
            EngineError: The frame cannot be sent.
        """
        self._add(messages_of(kind, header, tensors, self._limits))

    def flush(self) -> None:
        """Wait until all frames have been handed to the system.

        Raises:
            StageError: A rank is lost.
        """
        with self._changed:
            self._health.check()
            while self._waiting_bytes:
                self._raise_ended()
                self._changed.wait(CHECK_SECONDS)
                self._health.check()

    def finish(self) -> None:
        """Tell the other end that no more frames come, and wait until that is on its way.

        Raises:
            StageError: A rank is lost.
        """
        self._add([mark(END)])
        self.flush()

    def _add(self, messages: list[torch.Tensor]) -> None:
        num_bytes = sum(message.numel() for message in messages)
        with self._changed:
            self._health.check()
            self._raise_ended()
            while not self._has_room(num_bytes):
                self._changed.wait(CHECK_SECONDS)
                self._health.check()
                self._raise_ended()
            due = self._shaper.due(num_bytes, time.monotonic()) if self._shaper is not None else 0.0
            self._queue.append(_Outgoing(messages, num_bytes, due))
            self._waiting_bytes += num_bytes
            self._changed.notify_all()

    def _run(self, wire: Wire) -> None:
        flow = Outflow(wire)
        while True:
            frame = self._next(flow)
            start = time.monotonic()
            for message in frame.messages:
                flow.send(message)
            flow.settle()
            taken = time.monotonic() - start if self._shaper is None else self._shaper.seconds(frame.num_bytes)
            with self._changed:
                self._waiting_bytes -= frame.num_bytes
                if frame.num_bytes > LENGTH.size:  # and not the mark of the end
                    self.num_frames, self.num_bytes = self.num_frames + 1, self.num_bytes + frame.num_bytes
                    self.busy_seconds += taken
                self._changed.notify_all()

    def _next(self, flow: Outflow) -> _Outgoing:
        """Wait for the next frame whose time has come, and give signs of life meanwhile."""
        beat_seconds = self._health.timings.beat_seconds
        keepalive_at = time.monotonic() + beat_seconds
        while True:
            with self._changed:
                now = time.monotonic()
                if self._must_stop():
                    raise StoppedError
                if self._queue and self._queue[0].due <= now:
                    return self._queue.popleft()
                until = min(self._queue[0].due, keepalive_at) if self._queue else keepalive_at
                self._changed.wait(max(until - now, 0.0))
            if time.monotonic() >= keepalive_at:
                flow.send(mark(KEEPALIVE))
                keepalive_at = time.monotonic() + beat_seconds


class Receiver(End):
    """Receives the frames of one rank.

    Args:
        peer: The rank.
        connect: A function that returns the connection when the other end is there.
        health: The health of the run.
        limits: The largest frame.
        most_bytes: Bytes of frames that nobody has taken yet, but for one frame, which may be larger.

    Attributes:
        on_arrival: A short function that is called, on some thread, when a frame has arrived, when no more can, and when a rank is lost.
        num_frames, num_bytes: What has been received.
        busy_seconds: How long frames took to arrive from their first message to their last.
    """

    def __init__(
        self, peer: int, connect: Callable[[], Wire], health: Health, *, limits: Limits | None = None, most_bytes: int = QUEUE_BYTES
    ) -> None:
        super().__init__(peer, f"receive-from-{peer}", connect, health, most_bytes)
        self.on_arrival: Callable[[], None] = lambda: None
        self._limits = limits or Limits()
        self._inbox: deque[tuple[Frame, int]] = deque()
        self._discards = self._at_end = False

    def poll(self) -> Frame | None:
        """Return the next frame if it is there.

        Raises:
            StageError: A rank is lost, or the other end has ended.
        """
        with self._changed:
            self._health.check()
            if not self._inbox:
                self._raise_ended()
                return None
            frame, num_bytes = self._inbox.popleft()
            self._waiting_bytes -= num_bytes
            self._changed.notify_all()
            return frame

    def holds(self, kind: str) -> bool:
        """Return whether a frame of this kind waits among those that have arrived."""
        with self._changed:
            return any(frame.kind == kind for frame, _ in self._inbox)

    def receive(self) -> Frame:
        """Wait for the next frame.

        Raises:
            StageError: A rank is lost, or the other end has ended.
        """
        with self._changed:  # which one thread may hold twice
            while (frame := self.poll()) is None:
                self._changed.wait(CHECK_SECONDS)
            return frame

    def finish(self, timeout: float) -> None:
        """Wait until the other end sends no more, and discard what comes until then.

        Raises:
            StageError: A rank is lost, or the other end goes on for too long.
        """
        until = time.monotonic() + timeout
        with self._changed:
            self._discards, self._waiting_bytes = True, 0
            self._inbox.clear()
            self._changed.notify_all()
            while not self._at_end:
                self._health.check()
                self._raise_ended()
                if time.monotonic() > until:
                    raise StageError(self._health.late(self.peer, timeout))
                self._changed.wait(CHECK_SECONDS)

    def _run(self, wire: Wire) -> None:
        flow = Inflow(wire, self._health.timings.connection_seconds)
        while (arrived := read_frame(flow, self._limits, self._admit)) is not None:
            with self._changed:
                self.num_frames, self.num_bytes = self.num_frames + 1, self.num_bytes + arrived.num_bytes
                self.busy_seconds += arrived.seconds
                if not self._discards:
                    self._inbox.append((arrived.frame, arrived.num_bytes))
                    self._waiting_bytes += arrived.num_bytes
            self._wake()
        with self._changed:
            self._at_end = True

    def _admit(self, num_bytes: int) -> None:
        """Wait until a frame of so many bytes has room."""
        with self._changed:
            while not self._has_room(num_bytes):
                if self._must_stop():
                    raise StoppedError
                self._changed.wait(CHECK_SECONDS)

    def _wake(self) -> None:
        super()._wake()
        self.on_arrival()
