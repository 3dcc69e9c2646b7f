"""The links of a unit's way to where computing happens, each with a ring and a thread of its own.

A link brings the same units pass after pass, in the order of use, and runs ahead as far as its ring allows.  The next link, or the
sweep, takes each unit as it arrives and gives its slot back.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from flexgen.devices.base import POISON, Device, Event
from flexgen.errors import EngineError
from flexgen.io.direct_io import FileSet
from flexgen.io.pool import IOPool, Ticket
from flexgen.weights.ring import ByteRing, Slot
from flexgen.weights.unit import Form, UnitLayout

T = TypeVar("T")


def read_unit(layout: UnitLayout, into: torch.Tensor, io: IOPool, files: FileSet, on_done: Callable[[], None] | None = None) -> Ticket:
    """Start reading a unit's stored bytes into host memory."""
    view = into.numpy().data
    return io.read([(files[each.path], each.offset, view[each.position : each.position + each.size]) for each in layout.extents], on_done)


@dataclass(slots=True, eq=False, kw_only=True)
class Arrival:
    """A unit that a link has brought, or is bringing.

    Attributes:
        layout: the unit.
        data: its bytes, where the link ends.
        form: what these bytes are.
        slot: the place of `data` in the link's ring; None for a unit that stays there.
        ticket: the reading that fills `data`; None once that is over.
        events: copies that computing has to wait for.
    """

    layout: UnitLayout
    data: torch.Tensor
    form: Form
    slot: Slot | None = None
    ticket: Ticket | None = None
    events: Sequence[Event] = field(default_factory=list[Event])


class Waiting:
    """What links and sweep share: the lock under which they wait, whether all is closing, and what failed.

    Args:
        on_arrival: called by any thread, without the lock, when a unit may have become ready and when a link has failed.
    """

    def __init__(self, on_arrival: Callable[[], None]) -> None:
        self.condition = threading.Condition(threading.RLock())
        self.closing = False
        self._failure: BaseException | None = None
        self._on_arrival = on_arrival

    def changed(self) -> None:
        """Let all who wait look again."""
        with self.condition:
            self.condition.notify_all()

    def arrived(self) -> None:
        """The same, for those outside too."""
        self.changed()
        self._on_arrival()

    def fail(self, error: BaseException) -> None:
        """The sweep raises this."""
        self._failure = error
        self.arrived()

    def check(self) -> None:
        """Raise what a link failed of."""
        if self._failure is not None:
            raise self._failure

    def until(self, found: Callable[[], T | None]) -> T | None:
        """What `found` returns as soon as it is something; None when all is closing."""
        with self.condition:
            while not self.closing:
                if value := found():
                    return value
                self.condition.wait()
        return None


class Link:
    """What all kinds of links have in common.

    Args:
        name: of its thread.
        layouts: what it brings in every pass, in order.
        buffer: the ring's memory, uint8.
        waiting: shared by all links.
        poison: overwrite slots that are given back, so that a late use shows (tests).
    """

    def __init__(self, name: str, layouts: Sequence[UnitLayout], buffer: torch.Tensor, waiting: Waiting, *, poison: bool) -> None:
        self.ring = ByteRing(len(buffer))
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.layouts, self._buffer, self._waiting, self._poison = layouts, buffer, waiting, poison
        self._arrivals: deque[Arrival] = deque()

    def _run(self) -> None:
        try:
            while all(self._bring(layout) for layout in self.layouts):
                pass
        except BaseException as error:  # noqa: BLE001 - reported to the sweep, which waits for this thread's work
            self._waiting.fail(error)

    def _bring(self, layout: UnitLayout) -> bool:
        """Bring one unit, as far as to its place in the row of arrivals; False when all is closing."""
        raise NotImplementedError

    def _claim(self, size_bytes: int) -> tuple[Slot, torch.Tensor] | None:
        """A slot and its memory, as soon as there is room; None when all is closing."""
        slot = self._waiting.until(lambda: self.ring.take(size_bytes))
        return None if slot is None else (slot, self._buffer[slot.offset : slot.offset + slot.size])

    def _append(self, arrival: Arrival) -> None:
        with self._waiting.condition:
            self._arrivals.append(arrival)
        self._waiting.arrived()

    def is_ready(self, unit: int) -> bool:
        """Whether `unit`, which must be the next one, has arrived.

        Raises:
            StorageError: when it could not be read.
        """
        with self._waiting.condition:
            first = self._arrivals[0] if self._arrivals else None
        if first is None:
            return False
        if first.layout.index != unit:
            raise EngineError(f"unit {unit} is wanted, unit {first.layout.index} is next in the ring")
        return first.ticket is None or first.ticket.wait(0)

    def take(self, unit: int) -> Arrival:
        """The next unit, which is ready."""
        with self._waiting.condition:
            return self._arrivals.popleft()

    def give_back(self, arrival: Arrival) -> None:
        """Free an arrival's slot, if it has one; nothing may refer to it any more."""
        slot = arrival.slot
        if slot is None or slot.released:
            return
        if self._poison:
            arrival.data.fill_(POISON)
        with self._waiting.condition:
            self._released()
            self.ring.give_back(slot)
            self._waiting.condition.notify_all()

    def _released(self) -> None:
        """A slot is about to be given back."""

    def settle(self) -> None:
        """Return once all reads under way have ended."""
        for arrival in self._arrivals:
            if arrival.ticket is not None:
                arrival.ticket.settle()


class DiskLink(Link):
    """From files into host memory.  Several units are read at a time."""

    def __init__(
        self, layouts: Sequence[UnitLayout], buffer: torch.Tensor, io: IOPool, files: FileSet, waiting: Waiting, *, poison: bool
    ) -> None:
        super().__init__("flexgen-disk-link", layouts, buffer, waiting, poison=poison)
        self._io, self._files = io, files

    def _bring(self, layout: UnitLayout) -> bool:
        if (claimed := self._claim(layout.stored_bytes)) is None:
            return False
        slot, data = claimed
        ticket = read_unit(layout, data, self._io, self._files, self._waiting.arrived)
        self._append(Arrival(layout=layout, data=data, form=Form.STORED, slot=slot, ticket=ticket))
        return True


class DeviceLink(Link):
    """From host memory onto a device, one unit at a time.

    Args:
        host_homes: units that stay in host memory, by index.
        disk: brings the others.
    """

    def __init__(
        self, layouts: Sequence[UnitLayout], buffer: torch.Tensor, backend: Device, host_homes: Mapping[int, Arrival],
        disk: DiskLink | None, waiting: Waiting, *, poison: bool,
    ) -> None:  # fmt: skip
        super().__init__("flexgen-device-link", layouts, buffer, waiting, poison=poison)
        self._backend, self._host_homes, self._disk = backend, host_homes, disk
        self._marker: Any = None  # what the device had computed when a slot was last given back
        decoding = [layout.carried_bytes for layout in disk.layouts if not layout.plain] if disk is not None else []
        self._decoded = backend.allocate_host(max(decoding, default=1))

    def _bring(self, layout: UnitLayout) -> bool:
        claimed = self._claim(layout.carried_bytes)
        unit = self._host_homes.get(layout.index) or self._from_disk(layout.index)
        if claimed is None or unit is None:
            return False
        slot, data = claimed
        events = copy_in(unit, data, self._decoded, self._backend, self._marker)
        if self._disk is not None:
            self._disk.give_back(unit)
        self._append(Arrival(layout=layout, data=data, form=Form.CARRIED, slot=slot, events=events))
        return True

    def _from_disk(self, unit: int) -> Arrival | None:
        """A unit, as soon as it has been read; None when all is closing."""
        disk = self._disk
        assert disk is not None
        return disk.take(unit) if self._waiting.until(lambda: disk.is_ready(unit)) else None

    def _released(self) -> None:
        self._marker = self._backend.marker()


def copy_in(unit: Arrival, destination: torch.Tensor, decoded: torch.Tensor, backend: Device, after: Any = None) -> list[Event]:
    """Bring a unit from host memory onto the device, and wait until it is there.

    Args:
        destination: its memory on the device.
        decoded: host memory for what the host has to decode before.
        after: a marker of the device that has to pass first.
    """
    portions = [(0, unit.data)] if unit.form is Form.CARRIED else unit.layout.carried(unit.data, decoded)
    events = [backend.copy_in(destination[at : at + len(portion)], portion, after) for at, portion in portions]
    for event in events:
        event.wait()
    return events
