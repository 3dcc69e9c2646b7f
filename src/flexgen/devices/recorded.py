"""A device whose copies and computing are recorded for the trace, whatever its kind."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import torch

from flexgen.base.recorder import DEVICE_COMPUTE, DEVICE_TO_HOST, HOST_TO_DEVICE, URGENT_TO_DEVICE, Moment, Recorder
from flexgen.devices.base import Device, Event
from flexgen.devices.wrapped import WrappedDevice


class _Stream:
    """The copies in one stream, which run in the order of their submission.

    A copy is recorded when the host sees that it, or a later one, is complete, so times are those of the host; it looks whenever it
    submits something.  A kind of device whose events know when their copies began and ended would give these times here.
    """

    def __init__(self, recorder: Recorder, track: str) -> None:
        self._recorder, self._track = recorder, track
        self._lock = threading.Lock()
        self._copies: deque[RecordedCopy] = deque()  # those that are not recorded

    def submitted(self, event: Event, size_bytes: int, start: int) -> RecordedCopy:
        copy = RecordedCopy(self, event, size_bytes, start)
        self._copies.append(copy)
        return copy

    def look(self) -> None:
        """Record the copies that are complete."""
        with self._lock:
            while self._copies and self._copies[0].event.done():
                self._record(self._copies.popleft())

    def complete(self, copy: RecordedCopy | None = None) -> None:
        """Record a copy, and those before it; None for all."""
        with self._lock:
            while self._copies and not (copy is not None and copy.recorded):
                self._record(self._copies.popleft())

    def _record(self, copy: RecordedCopy) -> None:
        copy.recorded = True
        self._recorder.transfer(self._track, "copy", copy.start, bytes=copy.size_bytes)


class RecordedCopy:
    """The completion of a copy that is recorded.

    Attributes:
        event: The event of the device.
        size_bytes: The bytes that are copied.
        start: When the copy was submitted, in the recorder's time.
        recorded: Whether the copy is in the trace.
    """

    def __init__(self, stream: _Stream, event: Event, size_bytes: int, start: int) -> None:
        self._stream = stream
        self.event, self.size_bytes, self.start, self.recorded = event, size_bytes, start, False

    def done(self) -> bool:
        done = self.event.done()
        if done:
            self._stream.complete(self)
        return done

    def wait(self) -> None:
        self.event.wait()
        self._stream.complete(self)


class _Computing:
    """What the device computes: a slice begins when it is submitted, or when what was submitted before it is done."""

    def __init__(self, recorder: Recorder, device: Device) -> None:
        self._recorder, self._device = recorder, device
        self._slices: deque[tuple[Moment, Moment, str, dict[str, Any]]] = deque()  # those that are not recorded

    def moment(self) -> Moment:
        return self._device.moment()

    def computed(self, begun: Moment, name: str, args: dict[str, Any]) -> None:
        self._slices.append((begun, self._device.moment(), name, args))
        while self._slices and self._slices[0][1].done():
            self._record()

    def complete(self) -> None:
        """Record what was submitted, of which the end must have come."""
        while self._slices:
            self._record()

    def _record(self) -> None:
        begun, ended, name, args = self._slices.popleft()
        self._recorder.span(DEVICE_COMPUTE, name, begun.seconds(), ended.seconds(), args)


class RecordedDevice(WrappedDevice):
    """A device that records its copies, and what it computes.

    Args:
        device: The device.
        recorder: The recorder of the trace.
    """

    def __init__(self, device: Device, recorder: Recorder) -> None:
        super().__init__(device)
        self._recorder = recorder
        self._computing = recorder.stream = _Computing(recorder, device)
        self._in, self._urgent, self._out = (_Stream(recorder, track) for track in (HOST_TO_DEVICE, URGENT_TO_DEVICE, DEVICE_TO_HOST))

    def copy_in(self, destination: torch.Tensor, source: torch.Tensor, after: Event | None = None) -> RecordedCopy:
        start = self._look()
        return self._in.submitted(self._of.copy_in(destination, source, after), source.nbytes, start)

    def copy_in_urgently(self, destination: torch.Tensor, source: torch.Tensor) -> RecordedCopy:
        start = self._look()
        return self._urgent.submitted(self._of.copy_in_urgently(destination, source), source.nbytes, start)

    def copy_out(self, destination: torch.Tensor, source: torch.Tensor) -> RecordedCopy:
        start = self._look()
        return self._out.submitted(self._of.copy_out(destination, source), source.nbytes, start)

    def _look(self) -> int:
        """Record what is complete in all streams, and return the time."""
        for stream in (self._in, self._urgent, self._out):
            stream.look()
        return self._recorder.now()

    def await_in(self, event: Event) -> None:
        assert isinstance(event, RecordedCopy)
        self._of.await_in(event.event)

    def close(self) -> None:
        self._recorder.stream = None
        super().close()
        self._computing.complete()
        for stream in (self._in, self._urgent, self._out):
            stream.complete()
