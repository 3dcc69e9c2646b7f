"""Records what happened when, and writes it while the run goes on: a trace for Perfetto and chrome://tracing (docs/trace.md).

The file is in the JSON object format of Chrome's trace events.  Every portion is written over the end of the object together with a new
end, so the file is valid JSON between any two writes, however the run ends.

Any thread adds events to a queue, without a lock; a thread of the recorder's own writes them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flexgen.base.files import check_target, create, follow, temporary_beside
from flexgen.base.quantities import MIB, counted, format_size
from flexgen.errors import OptionError, StorageError

logger = logging.getLogger(__name__)

# The tracks, from top to bottom; threads of the same kind have numbers behind the name.
PASSES, COMPUTE, DEVICE_COMPUTE = "passes", "compute", "device compute"
HOST_ATTENTION, DISK_ATTENTION = "host attention", "disk attention"
WEIGHTS_TO_DEVICE, KV_TO_DEVICE = "weights to device", "KV to device"
HOST_TO_DEVICE, URGENT_TO_DEVICE, DEVICE_TO_HOST = "host to device", "urgent to device", "device to host"
IO = "I/O thread"
_ORDER = (
    PASSES, COMPUTE, DEVICE_COMPUTE, HOST_ATTENTION, DISK_ATTENTION, "weights from disk", WEIGHTS_TO_DEVICE, KV_TO_DEVICE, "KV from disk",
    "KV to disk", HOST_TO_DEVICE, URGENT_TO_DEVICE, DEVICE_TO_HOST, IO,
)  # fmt: skip
_MOST_OF_A_KIND = 1000  # threads

WAITING = "terrible"  # the colour of waits: red in chrome://tracing; Perfetto takes colours from names only

WRITE_SECONDS = 0.25
MOST_BYTES = 256 * MIB  # of a file; viewers become slow before that
MOST_WAITING = 1 << 17  # events that wait to be written
_PORTION = 1024  # events that are written together
_END = b"\n]}\n"


def check_trace(path: str | None) -> None:
    """Check that a trace can be written, before anything else is done.

    Raises:
        OptionError: The file cannot be made or replaced; the message says why.
    """
    try:
        check_target(None if path is None else Path(path))
    except StorageError as error:
        raise OptionError(f"trace={path!r}: {error}") from error


@contextlib.contextmanager
def recorded(recorder: Recorder | None, track: str, name: str, colour: str = "", **args: Any) -> Iterator[dict[str, Any]]:
    """Record what happens in a block as one slice, whether it fails or not; without a recorder the block just runs.

    Args:
        recorder: The recorder of the trace; None without one.
        track: See `Recorder.slice`, as for the other arguments.
        name: See there.
        colour: See there.
        args: See there.

    Yields:
        The args, to which the block may add what it finds.
    """
    if recorder is None:
        yield args
        return
    begun = recorder.begin(track, colour)
    try:
        yield args
    finally:
        recorder.end(begun, name, **args)


class Moment(Protocol):
    """A moment in what a device computes, which comes later than the host's."""

    def done(self) -> bool: ...

    def seconds(self) -> float:
        """Return when it was, in seconds of the recorder; known once it is done."""
        ...


class Stream(Protocol):
    """What a device computes, in the order in which the host submits it."""

    def moment(self) -> Moment:
        """Return the moment at which everything submitted before is done, and what follows may begin."""
        ...

    def computed(self, begun: Moment, name: str, args: dict[str, Any]) -> None:
        """Record what was submitted since a moment, once it is known when it happened."""
        ...


@dataclass(frozen=True, slots=True)
class Begun:
    """A slice that has begun.

    Attributes:
        track: Its track.
        colour: Its colour, as in `Recorder.slice`.
        start: The time when it began.
        moment: The moment in what the device computes at which what it submits may begin; None for waits and for other tracks.
    """

    track: str
    colour: str
    start: int
    moment: Moment | None


class Recorder:
    """A recorder of one trace file, which is made, or replaced, at once.  Thread-safe.

    Times are microseconds since the recorder was made.

    Args:
        path: The file.
        passes: The passes whose events are recorded, counted from 0; None for all events, those outside of passes included.
        about: What the trace is of, for its reader.
        seconds: Returns the time in seconds.

    Attributes:
        pass_index: The index of the pass that began last; -1 before the first.
        stream: What the device computes, beside the COMPUTE track of what the host does and submits; None without a device.

    Raises:
        StorageError: The file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        passes: range | None = None,
        about: dict[str, str] | None = None,
        seconds: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.pass_index = -1
        self.stream: Stream | None = None
        self._path, self._passes = path, passes
        self._recording, self._ended = passes is None, False
        self._events: deque[dict[str, Any]] = deque()
        self._num_dropped = 0
        self._tracks: dict[str, int] = {}  # name -> id; the writer's
        self._lock = threading.Lock()
        self._transferred: dict[str, int] = {}  # track -> end of the last transfer
        self._seconds, self._origin = seconds, seconds()
        self._written = 0  # bytes before the end of the object
        self._open(about or {})
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flexgen-trace", daemon=True)
        self._thread.start()

    # -- what is recorded -----------------------------------------------------------------------------------------------------------

    def now(self) -> int:
        """Return the time."""
        return int((self._seconds() - self._origin) * 1e6)

    def begin_pass(self) -> int:
        """Record that the next pass begins, and return the time."""
        self.pass_index += 1
        self._recording = not self._ended and (self._passes is None or self.pass_index in self._passes)
        return self.now()

    def begin(self, track: str, colour: str = "") -> Begun:
        """Return the beginning of a slice."""
        submits = self._recording and track == COMPUTE and colour != WAITING
        moment = self.stream.moment() if self.stream is not None and submits else None
        return Begun(track, colour, self.now(), moment)

    def end(self, begun: Begun, name: str, **args: Any) -> None:
        """Record something that ends now, and what it has submitted to the device; see `slice`."""
        self.slice(begun.track, name, begun.start, begun.colour, **args)
        if self.stream is not None and begun.moment is not None:
            self.stream.computed(begun.moment, name, args)

    def slice(self, track: str, name: str, start: int, colour: str = "", **args: Any) -> int:
        """Record something that ends now, and return the time.

        What overlaps on a track must lie within each other.

        Args:
            track: The name of the track.
            name: A name; viewers add up what has the same name.
            start: The time when it began.
            colour: One of the names of colours of chrome://tracing; empty for one that follows from the name.
            args: What else there is to say of it.
        """
        end = self.now()
        if self._recording:
            self._add_slice(track, name, start, end, colour, args)
        return end

    def span(self, track: str, name: str, start: float, end: float, args: dict[str, Any]) -> None:
        """Record something that began and ended at other times than now, both in seconds, and was begun when recording."""
        first, last = (int((each - self._origin) * 1e6) for each in (start, end))
        self._add_slice(track, name, first, last, "", args)

    def _add_slice(self, track: str, name: str, start: int, end: int, colour: str, args: dict[str, Any]) -> None:
        event = {"ph": "X", "pid": 1, "tid": track, "name": name, "ts": start, "dur": end - start}
        if colour:
            event["cname"] = colour
        self._add(event | {"args": args})

    def transfer(self, track: str, name: str, submitted: int, **args: Any) -> None:
        """Record a transfer that ends now, on the track of a queue whose transfers take place one after another.

        It is drawn from its submission, or from the end of the one before.
        """
        with self._lock:
            start = max(submitted, self._transferred.get(track, 0))
            self._transferred[track] = self.slice(track, name, start, **args)

    def counter(self, name: str, value: int) -> None:
        """Record the value that a counter has from now on."""
        if self._recording:
            self._add({"ph": "C", "pid": 1, "name": name, "ts": self.now(), "args": {"bytes": value}})

    def _add(self, event: dict[str, Any]) -> None:
        if len(self._events) < MOST_WAITING:
            self._events.append(event)
        else:
            self._num_dropped += 1

    # -- how it is written ----------------------------------------------------------------------------------------------------------

    def _open(self, about: dict[str, str]) -> None:
        """Put a trace without events in the place of the file."""
        process = {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "flexgen"}}
        head = {"displayTimeUnit": "ms", "otherData": about, "traceEvents": [process]}
        try:
            check_target(self._path)
            target = follow(self._path)
            temporary = temporary_beside(target)
            self._file = create(temporary, target)
            try:
                self._write(json.dumps(head).removesuffix("]}").encode())
                temporary.replace(target)
            except BaseException:
                self._file.close()
                temporary.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise StorageError(f"{self._path} cannot be written: {error.strerror or error}") from error

    def _run(self) -> None:
        while not self._stop.wait(WRITE_SECONDS):
            self._drain()
        self._drain()

    def _drain(self) -> None:
        """Write the events that wait."""
        while self._events:
            lines: list[str] = []
            for _ in range(min(len(self._events), _PORTION)):
                event = self._events.popleft()
                if (track := event.get("tid")) is not None:
                    if track not in self._tracks:
                        lines += self._new_track(track)
                    event["tid"] = self._tracks[track]
                lines.append(json.dumps(event))
            if not self._ended:
                self._append("".join(f",\n{line}" for line in lines).encode())

    def _new_track(self, track: str) -> list[str]:
        """Return the events that name a track; ids are in the order in which viewers should show the tracks."""
        kind = next((index for index, name in enumerate(_ORDER) if track.startswith(name)), len(_ORDER))
        number = kind * _MOST_OF_A_KIND + sum(each // _MOST_OF_A_KIND == kind for each in self._tracks.values()) + 1
        self._tracks[track] = number
        told = {"thread_name": {"name": track}, "thread_sort_index": {"sort_index": number}}
        return [json.dumps({"ph": "M", "pid": 1, "tid": number, "name": name, "args": args}) for name, args in told.items()]

    def _append(self, data: bytes) -> None:
        """Append events, unless the file becomes too large or the disk is full: then the trace ends, and the run goes on."""
        if self._written + len(data) > MOST_BYTES:
            self._end(f"it has {format_size(MOST_BYTES)}, which is the most: choose passes with trace_passes")
            return
        try:
            self._write(data)
        except OSError as error:
            os.ftruncate(self._file.fileno(), self._written)
            os.pwrite(self._file.fileno(), _END, self._written)  # where it was before
            self._end(error.strerror or str(error))

    def _write(self, data: bytes) -> None:
        whole = memoryview(data + _END)
        done = 0
        while done < len(whole):
            done += os.pwrite(self._file.fileno(), whole[done:], self._written + done)
        self._written += len(data)

    def _end(self, why: str) -> None:
        self._ended, self._recording = True, False
        logger.warning("%s: the trace ends in pass %d: %s", self._path, self.pass_index, why)

    def close(self) -> None:
        """Write what is left, and close the file; nothing may be recorded any more.  May be called twice."""
        self._stop.set()
        self._thread.join()
        if self._num_dropped and not self._file.closed:
            logger.warning("%s: %s left out, which came faster than they could be written", self._path, counted(self._num_dropped, "event"))
        self._file.close()
