"""A simulated device for tests: strict about where tensors live, and hostile in the timing of its copies.

Its tensors are of a type of their own (sim_tensor.py).  Each stream of copies is a queue that runs in its own order, as late as
the program allows or, at random, earlier: when the host asks for an event or computing waits for one.  Which queue goes on is
random too, so chunks of a bulk copy and other copies mix.  Until then the destination holds poison.

Computing runs when it is called, not later: results of queued kernels would need their shapes in advance, and finding
these costs more than the kernels of the tests.  Instead, the errors that a late kernel would expose are checked: a copy to bytes
that computing uses is refused unless it has a marker after that use, or the host has seen one, and so is a change of a copy's source
before the host has seen the copy end.
"""

from __future__ import annotations

import contextlib
import functools
import random
import threading
import time
import weakref
import zlib
from collections import deque

import torch

from flexgen.devices.arena import HostArena
from flexgen.devices.base import POISON, Arenas, Event
from flexgen.devices.chunks import Chunks
from flexgen.devices.sim_tensor import SimTensor, register, timeline
from flexgen.errors import EngineError

EARLY = 0.3  # the probability that a copy runs before anything waits for it
SEEN = 0.5  # the probability that polling a copy completes it, and that polling a marker finds that it has passed
CHUNK_BYTES, OUTSTANDING_BYTES = 1 << 16, 3 << 16  # of bulk copies


class SimMoment:
    """A moment in computing, which happens when it is called."""

    def __init__(self, at: float) -> None:
        self._at = at

    def done(self) -> bool:
        return True

    def seconds(self) -> float:
        return self._at


class SimEvent:
    """One copy, and its completion."""

    def __init__(self, device: SimulatedDevice, stream: deque[SimEvent], destination: torch.Tensor, source: torch.Tensor) -> None:
        self._device, self.stream = device, stream
        self.destination, self.source = destination, source
        self.submitted = timeline.now
        self.awaited = self.settled = False
        self.copied: int | None = None  # checksum of the bytes, once the copy has run
        self.kept: weakref.ref[SimTensor] | None = None  # a source that is no arena's, which the caller keeps

    def run(self) -> None:
        """Copy, unless that has happened already."""
        if self.copied is None:
            self.destination.copy_(self.source)
            self.copied = _checksum(self.source)

    def check_source(self) -> None:
        """Refuse a source that the program changed while a copy from it might still have been running."""
        if _checksum(self.source) != self.copied:
            raise EngineError(f"the source of a copy of {self.source.nbytes} bytes was changed before the copy was known to be complete")

    def check_alive(self) -> None:
        """Refuse a source of a copy out that the program let go while the copy might still have been running."""
        if self.kept is not None and self.kept() is None:
            raise EngineError(f"the source of a copy of {self.source.nbytes} bytes was freed before the copy was known to be complete")

    def done(self) -> bool:
        return self._device.poll(self)

    def wait(self) -> None:
        self._device.finish(self)


class SimMarker:
    """A marker in the device's computing.

    Attributes:
        when: The number of operations before it.
    """

    def __init__(self, device: SimulatedDevice) -> None:
        self._device, self.when = device, timeline.now

    def done(self) -> bool:
        return self._device.poll_marker(self)

    def wait(self) -> None:
        timeline.finish(self.when)


def _checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(_bytes(tensor).numpy().data)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


class SimulatedDevice(Arenas):
    """The simulated device.

    Args:
        budget_bytes: The budget of its arenas.
        seed: The seed of its random choices.
        max_delay_seconds: The longest time that waiting for a copy takes.

    Attributes:
        host: The host memory that was given out.
    """

    def __init__(self, budget_bytes: int, *, seed: int = 0, max_delay_seconds: float = 0.001) -> None:
        super().__init__(budget_bytes)
        self.device = register()
        self.host = HostArena(None)
        self._random = random.Random(seed)
        self._max_delay_seconds = max_delay_seconds
        self._lock = threading.RLock()
        self._bulk: deque[SimEvent] = deque()  # submitted, and not known to the host to be complete
        self._urgent: deque[SimEvent] = deque()
        self._out: deque[SimEvent] = deque()
        self._chunks = Chunks(functools.partial(self._submit, self._bulk), CHUNK_BYTES, OUTSTANDING_BYTES)
        self._synchronisations_before = timeline.synchronisations
        timeline.observers.append(self._synchronised)

    @property
    def synchronisations(self) -> int:
        """The number of times that the host has waited for the device's computing since the device was opened."""
        return timeline.synchronisations - self._synchronisations_before

    def allocate(self, size_bytes: int) -> SimTensor:
        self._charge(size_bytes)
        return SimTensor(torch.full((size_bytes,), POISON, dtype=torch.uint8), in_arena=True)

    def allocate_host(self, size_bytes: int) -> torch.Tensor:
        return self.host.allocate(size_bytes)

    def copy_in(self, destination: torch.Tensor, source: torch.Tensor, after: Event | None = None) -> SimEvent:
        assert after is None or isinstance(after, SimMarker)
        raw = self._to_write(destination, source, 0 if after is None else after.when)
        return self._chunks.copy(raw, source)

    def copy_in_urgently(self, destination: torch.Tensor, source: torch.Tensor) -> SimEvent:
        return self._submit(self._urgent, self._to_write(destination, source, 0), source)

    def _to_write(self, destination: torch.Tensor, source: torch.Tensor, when: int) -> torch.Tensor:
        """Return the memory that a copy in writes to, after operations up to `when`; refuse it if later ones may use it."""
        assert isinstance(destination, SimTensor)
        assert source.device.type == "cpu"
        self.bytes_in += source.nbytes
        if not destination.in_arena:
            raise EngineError("a copy to memory that computing may have used a moment ago: copies in end in arenas")
        if timeline.used_since(when, destination.raw):
            raise EngineError(f"a copy of {source.nbytes} bytes would overwrite what computing still uses: it needs a later marker")
        _bytes(destination.raw).fill_(POISON)
        return destination.raw

    def copy_out(self, destination: torch.Tensor, source: torch.Tensor) -> SimEvent:
        assert isinstance(source, SimTensor)
        assert destination.device.type == "cpu"
        self.bytes_out += source.nbytes
        event = self._submit(self._out, destination, source.raw)
        event.kept = None if source.in_arena else weakref.ref(source)
        return event

    def _submit(self, stream: deque[SimEvent], destination: torch.Tensor, source: torch.Tensor) -> SimEvent:
        with self._lock:
            _bytes(destination).fill_(POISON)
            event = SimEvent(self, stream, destination, source)
            stream.append(event)
            if self._random.random() < EARLY:
                self._run_one()
        return event

    def _run_one(self) -> None:
        """Run the next copy of a stream chosen at random."""
        waiting = [each for each in map(_next, (self._bulk, self._urgent, self._out)) if each is not None]
        if waiting:
            self._random.choice(waiting).run()

    def poll(self, event: SimEvent) -> bool:
        """Return whether the copy is complete, as the host sees it."""
        with self._lock:
            if not event.settled and (event.copied is not None or self._random.random() < SEEN):
                self._settle(event)
            return event.settled

    def poll_marker(self, marker: SimMarker) -> bool:
        """Return whether a marker has passed, as the host sees it."""
        with self._lock:
            seen = self._random.random() < SEEN
        if seen:
            timeline.finish(marker.when)
        return seen

    def finish(self, event: SimEvent) -> None:
        """Make the host wait for a copy."""
        if not event.settled:
            time.sleep(self._random.uniform(0, self._max_delay_seconds))
        with self._lock:
            self._settle(event)

    def _settle(self, event: SimEvent, *, closing: bool = False) -> None:
        """Record that the host knows that a copy, and all earlier copies of its stream, are complete."""
        while not event.settled:
            first = event.stream.popleft()
            if not closing:  # a run that failed lets everything go
                first.check_alive()
            if first.copied is not None:
                first.check_source()
            first.run()
            first.settled = True
        if event.stream is self._out:
            timeline.finish(event.submitted)

    def marker(self) -> SimMarker:
        return SimMarker(self)

    def moment(self) -> SimMoment:
        return SimMoment(self.now())

    def await_in(self, event: Event) -> None:
        assert isinstance(event, SimEvent)
        with self._lock:
            if not event.settled:
                for each in event.stream:
                    each.run()
                    each.awaited = True
                    if each is event:
                        break

    def _synchronised(self) -> None:
        """Record that the host has waited for computing, and so for every copy that computing waited for."""
        with self._lock:
            for stream in (self._bulk, self._urgent):
                awaited = [each for each in stream if each.awaited]
                if awaited:
                    self._settle(awaited[-1])

    def close(self) -> None:
        with self._lock, contextlib.ExitStack() as closing:
            closing.callback(self.host.close)
            for stream in (self._bulk, self._urgent, self._out):
                if stream:
                    self._settle(stream[-1], closing=True)
            if self._synchronised in timeline.observers:
                timeline.observers.remove(self._synchronised)
            timeline.finish(timeline.now)  # arenas that are opened later may have the same addresses


def _next(stream: deque[SimEvent]) -> SimEvent | None:
    return next((each for each in stream if each.copied is None), None)
