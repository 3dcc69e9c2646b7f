"""A simulated device with a clock: copies and kernels take the time that they would take on a machine of known rates, in slow motion.

It has no memory and computes nothing: its tensors, and those of the host beside it, have no numbers (timed_tensor.py), and every operation
has a price.  The program that drives it, with its threads, rings and streams, is the real one; so what is learned is when everything
would happen if things took as long as is assumed.

Computing is one stream.  Copies to the device share one copy engine, those from it have another.  What has been submitted to an engine goes
in the order of submission; an urgent copy may use the gap before a bulk copy that waits for a marker.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from flexgen.devices.base import Arenas, Event
from flexgen.devices.chunks import CHUNK_BYTES, OUTSTANDING_BYTES, Chunks
from flexgen.devices.clock import Clock, Resource
from flexgen.devices.timed_tensor import META, Effect, TimedTensor
from flexgen.plan.machine import Machine


class Prices(Protocol):
    """The prices of operations (plan/price/operations.py)."""

    def seconds(self, kind: str, flops: float, nbytes: float, rows: float) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyRules:
    """How copies to the device are made, to find out what each of these is worth.

    Attributes:
        chunk_bytes: The bytes of a chunk of a bulk copy; None for copies in one piece, of which one is submitted at a time.
        urgent: Whether urgent copies have a stream of their own; otherwise they go behind the bulk copies that were submitted before.
        waits: Whether a thread other than the one that computes waits for the end of its urgent copies.
    """

    chunk_bytes: int | None = CHUNK_BYTES
    urgent: bool = True
    waits: bool = False


class TimedEvent:
    """The completion of a copy, or a marker of computing.

    Attributes:
        end: When it happens.
    """

    def __init__(self, clock: Clock, end: float) -> None:
        self._clock, self.end = clock, end

    def done(self) -> bool:
        return self._clock.now() >= self.end

    def wait(self) -> None:
        self._clock.wait_until(self.end)

    def seconds(self) -> float:
        return self.end


class _DeviceComputing:
    """The stream of computing: the host goes on while it computes.

    Attributes:
        end: When all that was submitted is done.
        busy_seconds: The seconds of all that was submitted.
        synchronisations: How often the host has waited for a number.
    """

    def __init__(self, clock: Clock, prices: Prices) -> None:
        self._clock, self._seconds = clock, functools.cache(prices.seconds)
        self.effects: dict[Hashable, Effect] = {}
        self.end = self.busy_seconds = 0.0
        self.synchronisations = 0

    def operation(self, kind: str, *, flops: float = 0.0, nbytes: float = 0.0, rows: float = 1.0) -> None:
        if self._clock.runs:
            seconds = self._seconds(kind, flops, nbytes, rows)
            self.end = max(self.end, self._clock.now()) + seconds
            self.busy_seconds += seconds

    spend = operation

    def synchronise(self) -> None:
        self.synchronisations += 1
        self._clock.wait_until(self.end)


class _HostComputing:
    """The host's cores: kernels run one at a time, and the thread that calls one sleeps until it is done.

    What only reads and writes memory does so beside them, on the thread that asks for it; if it is a kernel, the next one begins that much
    later, since both share the memory.
    """

    def __init__(self, clock: Clock, prices: Prices, cores: Resource, lock: threading.Lock) -> None:
        self._clock, self._prices, self._cores, self._lock = clock, prices, cores, lock
        self.effects: dict[Hashable, Effect] = {}

    def operation(self, kind: str, *, flops: float = 0.0, nbytes: float = 0.0, rows: float = 1.0) -> None:
        if self._clock.runs:
            self._clock.wait_until(self._clock.now() + self._prices.seconds(kind, flops, nbytes, rows))

    def spend(self, kind: str, *, flops: float = 0.0, nbytes: float = 0.0, rows: float = 1.0) -> None:
        if self._clock.runs:
            seconds, now = self._prices.seconds(kind, flops, nbytes, rows), self._clock.now()
            with self._lock:
                end = self._cores.give(now, now, seconds)
            self._clock.wait_until(now + seconds if kind == "memory" else end)

    def synchronise(self) -> None:
        """Do nothing: the host computes at once."""


class TimedDevice(Arenas):
    """The simulated device, whose clock the caller starts when the model is loaded.

    Args:
        budget_bytes: The budget of its arenas.
        machine: The machine, whose rates of links and of the disk are its typical ones.
        prices: The prices of operations on the "device" and on the "host".
        clock: The clock.
        rules: How copies are made; None for the usual way.
    """

    def __init__(
        self, budget_bytes: int, machine: Machine, prices: Mapping[str, Prices], clock: Clock, rules: CopyRules | None = None
    ) -> None:
        super().__init__(budget_bytes)
        assert machine.host_to_device is not None
        assert machine.device_to_host is not None
        self.device = self.host_device = META
        self.clock, self._rules = clock, rules or CopyRules()
        self._in_rate, self._out_rate, self._disk_rate = (
            each.typical for each in (machine.host_to_device, machine.device_to_host, machine.disk_read)
        )
        self._lock = threading.Lock()
        self._in, self._out, self._cores, self._disk = Resource(), Resource(), Resource(), Resource()
        self._in.beside = [(self._out, machine.duplex_slowdown), (self._cores, machine.link_slowdown)]
        self._out.beside = [(self._in, machine.duplex_slowdown)]
        self._cores.beside = [(self._in, machine.host_slowdown)]
        self._bulk_end = self._urgent_end = self._out_end = 0.0  # of what was submitted to each stream
        self._computing = _DeviceComputing(self.clock, prices["device"])
        self._host = _HostComputing(self.clock, prices["host"], self._cores, self._lock)
        whole = self._rules.chunk_bytes is None
        self._chunks = Chunks(self._start_bulk, self._rules.chunk_bytes or budget_bytes, 0 if whole else OUTSTANDING_BYTES)
        self._thread = threading.get_ident()  # the one that computes

    @property
    def synchronisations(self) -> int:
        """How often the host has waited for a number of the device."""
        return self._computing.synchronisations

    def busy_seconds(self) -> dict[str, float]:
        """Return for each resource the seconds of all that it was given since the clock was started."""
        resources = {"disk": self._disk, "host_to_device": self._in, "device_to_host": self._out, "host_compute": self._cores}
        return {name: each.busy_seconds for name, each in resources.items()} | {"compute": self._computing.busy_seconds}

    def now(self) -> float:
        return self.clock.now()

    def allocate(self, size_bytes: int) -> TimedTensor:
        self._charge(size_bytes)
        return TimedTensor(torch.empty(size_bytes, dtype=torch.uint8, device=META), self._computing)

    def allocate_host(self, size_bytes: int) -> TimedTensor:
        return TimedTensor(torch.empty(size_bytes, dtype=torch.uint8, device=META), self._host)

    allocate_pages = allocate_host

    def copy_in(self, destination: torch.Tensor, source: torch.Tensor, after: Event | None = None) -> TimedEvent:
        self.bytes_in += source.nbytes
        if after is not None:
            assert isinstance(after, TimedEvent)
            with self._lock:
                self._bulk_end = max(self._bulk_end, after.end)
        return self._chunks.copy(destination, source)

    def _start_bulk(self, destination: torch.Tensor, source: torch.Tensor) -> TimedEvent:
        with self._lock:
            self._bulk_end = self._copied_in(self._bulk_end, source.nbytes)
            return TimedEvent(self.clock, self._bulk_end)

    def copy_in_urgently(self, destination: torch.Tensor, source: torch.Tensor) -> TimedEvent:
        self.bytes_in += source.nbytes
        with self._lock:
            ready = self._urgent_end if self._rules.urgent else self._bulk_end
            self._urgent_end = self._copied_in(ready, source.nbytes)
            if not self._rules.urgent:
                self._bulk_end = self._urgent_end
            event = TimedEvent(self.clock, self._urgent_end)
        if self._rules.waits and threading.get_ident() != self._thread:
            event.wait()
        return event

    def _copied_in(self, ready: float, size_bytes: int) -> float:
        """Return when a copy to the device ends that may begin when it is `ready`."""
        return self._in.give(self.now(), ready, size_bytes / self._in_rate) if self.clock.runs else 0.0

    def copy_out(self, destination: torch.Tensor, source: torch.Tensor) -> TimedEvent:
        self.bytes_out += source.nbytes
        if self.clock.runs:
            with self._lock:
                ready = max(self._computing.end, self._out_end)
                self._out_end = self._out.give(self.now(), ready, source.nbytes / self._out_rate)
        return TimedEvent(self.clock, self._out_end)

    def read(self, size_bytes: int) -> None:
        """Return when so many bytes would have been read from the disk."""
        if self.clock.runs:
            now = self.now()
            with self._lock:
                end = self._disk.give(now, now, size_bytes / self._disk_rate)
            self.clock.wait_until(end)

    def marker(self) -> TimedEvent:
        return TimedEvent(self.clock, self._computing.end)

    def moment(self) -> TimedEvent:
        return TimedEvent(self.clock, max(self._computing.end, self.now()))

    def await_in(self, event: Event) -> None:
        assert isinstance(event, TimedEvent)
        self._computing.end = max(self._computing.end, event.end)

    def close(self) -> None:
        self.clock.stop()
