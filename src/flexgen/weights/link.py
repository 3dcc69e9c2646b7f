"""The links on a unit's way to where computing happens, each with its own ring and thread.

A link brings the same units pass after pass, in the order of use, and runs ahead as far as its ring allows.  The next link, or the
sweep, takes each unit as it arrives and gives its slot back.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from flexgen.base.parallel import Parallel, serially
from flexgen.base.recorder import WEIGHTS_TO_DEVICE, Recorder
from flexgen.base.ring import ByteRing, Slot
from flexgen.devices.base import POISON, Device, Event
from flexgen.errors import EngineError
from flexgen.io.direct_io import FileSet
from flexgen.io.pool import Contents, IOPool, Ticket
from flexgen.weights.unit import UnitForm, UnitLayout

T = TypeVar("T")


def read_unit(layout: UnitLayout, into: torch.Tensor, io: IOPool, files: FileSet, on_done: Callable[[], None] | None = None) -> Ticket:
    """Start reading a unit's stored bytes into host memory."""
    view = into.numpy().data
    parts = [(files[each.path], each.offset, view[each.position : each.position + each.size]) for each in layout.extents]
    return io.read(parts, on_done, Contents("weights", f"unit {layout.index}" if layout.index >= 0 else layout.name))


@dataclass(slots=True, eq=False, kw_only=True)
class Arrival:
    """A unit that a link has brought, or is bringing.

    Attributes:
        layout: The layout of the unit.
        data: The bytes of the unit at the end of the link, which may still be on their way (`ticket`, `events`).
        form: The form of these bytes.
        slot: The slot of `data` in the link's ring; None for a unit that stays in memory.
        ticket: The read that fills `data`; None once it has finished.
        events: The copies for which computing has to wait.
    """

    layout: UnitLayout
    data: torch.Tensor
    form: UnitForm
    slot: Slot | None = None
    ticket: Ticket | None = None
    events: Sequence[Event] = field(default_factory=list[Event])


class LinkState:
    """The state that links and sweep share: the lock under which they wait, whether the store is closing, and the failure of a link.

    Args:
        on_arrival: A function that any thread calls, without the lock, when a unit may have become ready or a link has failed.
    """

    def __init__(self, on_arrival: Callable[[], None]) -> None:
        self.condition = threading.Condition(threading.RLock())
        self.closing = False
        self._failure: BaseException | None = None
        self._on_arrival = on_arrival

    def changed(self) -> None:
        """Wake all waiting threads, so that they check again."""
        with self.condition:
            self.condition.notify_all()

    def arrived(self) -> None:
        """Wake all waiting threads and call `on_arrival`."""
        self.changed()
        self._on_arrival()

    def fail(self, error: BaseException) -> None:
        """Record a failure, which the sweep raises."""
        self._failure = error
        self.arrived()

    def check(self) -> None:
        """Raise the failure of a link, if there is one."""
        if self._failure is not None:
            raise self._failure

    def until(self, found: Callable[[], T | None]) -> T | None:
        """Wait until `found` returns a true value, and return that; return None when the store is closing."""
        with self.condition:
            while not self.closing:
                if value := found():
                    return value
                self.condition.wait()
        return None


class Link:
    """The common part of all kinds of links.

    Args:
        name: The name of the thread.
        layouts: The units that the link brings in every pass, in order.
        buffer: The memory of the ring, uint8.
        state: The state shared by all links.
        poison: Whether to overwrite slots that are given back, so that a late use is noticed (for tests).
        recorder: The recorder of the trace; None without one.
    """

    def __init__(
        self, name: str, layouts: Sequence[UnitLayout], buffer: torch.Tensor, state: LinkState, *, poison: bool, recorder: Recorder | None
    ) -> None:
        self.ring, self._recorder = ByteRing(len(buffer)), recorder
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.layouts, self._buffer, self._state, self._poison = layouts, buffer, state, poison
        self._arrivals: deque[Arrival] = deque()

    def _run(self) -> None:
        try:
            while all(self._bring(layout) for layout in self.layouts):
                pass
        except BaseException as error:  # noqa: BLE001 - reported to the sweep, which waits for this thread's work
            self._state.fail(error)

    def _bring(self, layout: UnitLayout) -> bool:
        """Bring one unit, up to adding it to the arrivals; return False when the store is closing."""
        raise NotImplementedError

    def _claim(self, size_bytes: int) -> tuple[Slot, torch.Tensor] | None:
        """Wait for a slot and return it with its memory; return None when the store is closing."""
        slot = self._state.until(lambda: self._take_slot(size_bytes))
        return None if slot is None else (slot, self._buffer[slot.offset : slot.offset + slot.size])

    def _take_slot(self, size_bytes: int) -> Slot | None:
        slot = self.ring.take(size_bytes)
        if slot is not None:
            self._count()
        return slot

    def _count(self) -> None:
        """Record how much of the ring is in use."""
        if self._recorder is not None:
            self._recorder.counter(f"ring of {self.thread.name.removeprefix('flexgen-')}", self.ring.used_bytes)

    def _append(self, arrival: Arrival) -> None:
        with self._state.condition:
            self._arrivals.append(arrival)
        self._state.arrived()

    def is_ready(self, unit: int) -> bool:
        """Return whether `unit`, which must be the next one, has arrived.

        Raises:
            StorageError: The unit could not be read.
        """
        with self._state.condition:
            first = self._arrivals[0] if self._arrivals else None
        if first is None:
            return False
        if first.layout.index != unit:
            raise EngineError(f"unit {unit} is wanted, unit {first.layout.index} is next in the ring")
        return first.ticket is None or first.ticket.wait(0)

    def take(self, unit: int) -> Arrival:
        """Return the next unit, which must be ready."""
        with self._state.condition:
            return self._arrivals.popleft()

    def give_back(self, arrival: Arrival) -> None:
        """Free the slot of an arrival, if it has one; nothing may refer to its bytes any more."""
        slot = arrival.slot
        if slot is None or slot.released:
            return
        if self._poison:
            arrival.data.fill_(POISON)
        with self._state.condition:
            self._released()
            self.ring.give_back(slot)
            self._count()
            self._state.condition.notify_all()

    def _released(self) -> None:
        """Prepare for a slot being given back."""

    def settle(self) -> None:
        """Return once all started reads have ended."""
        for arrival in self._arrivals:
            if arrival.ticket is not None:
                arrival.ticket.settle()


class DiskLink(Link):
    """A link from files into host memory, which reads several units at a time."""

    def __init__(
        self, layouts: Sequence[UnitLayout], buffer: torch.Tensor, io: IOPool, files: FileSet, state: LinkState, *, poison: bool,
        recorder: Recorder | None = None,
    ) -> None:  # fmt: skip
        super().__init__("flexgen-disk-link", layouts, buffer, state, poison=poison, recorder=recorder)
        self._io, self._files = io, files

    def _bring(self, layout: UnitLayout) -> bool:
        if (claimed := self._claim(layout.stored_bytes)) is None:
            return False
        slot, data = claimed
        ticket = read_unit(layout, data, self._io, self._files, self._state.arrived)
        self._append(Arrival(layout=layout, data=data, form=UnitForm.STORED, slot=slot, ticket=ticket))
        return True


class DeviceLink(Link):
    """A link from host memory onto a device, one unit at a time.

    A unit has arrived when its copy is submitted, since computing waits for the copy's event.  The thread sleeps while that takes longer
    than few chunks (devices/chunks.py), so no unit arrives long before its bytes.

    Args:
        host_homes: The units that stay in host memory, by index, as they cross the link or as stored.
        disk: The link that brings the other units; None if there are none.
        decoding: The units that come to the link as stored, and are decoded for it.
        parallel: Runs the loops of the decoding of units that the host decodes before the copy.
    """

    def __init__(
        self, layouts: Sequence[UnitLayout], buffer: torch.Tensor, backend: Device, host_homes: Mapping[int, Arrival],
        disk: DiskLink | None, state: LinkState, *, decoding: Sequence[UnitLayout], parallel: Parallel, poison: bool,
        recorder: Recorder | None = None,
    ) -> None:  # fmt: skip
        super().__init__("flexgen-device-link", layouts, buffer, state, poison=poison, recorder=recorder)
        self._backend, self._host_homes, self._disk, self._parallel = backend, host_homes, disk, parallel
        self._marker: Event | None = None  # a marker of the computing submitted before a slot was last given back
        largest = max((layout.carried_bytes for layout in decoding), default=0)
        self._decoded = backend.allocate_host(largest) if largest else torch.empty(0, dtype=torch.uint8)

    def _bring(self, layout: UnitLayout) -> bool:
        claimed = self._claim(layout.carried_bytes)
        unit = self._host_homes.get(layout.index) or self._from_disk(layout.index)
        if claimed is None or unit is None:
            return False
        slot, data = claimed
        start = 0 if self._recorder is None else self._recorder.now()
        events = copy_in(unit, data, self._decoded, self._backend, self._marker, self._parallel, self._recorder)
        if self._recorder is not None:
            self._recorder.slice(WEIGHTS_TO_DEVICE, f"unit {layout.index}", start, bytes=layout.carried_bytes, modules=layout.name)
        self._append(Arrival(layout=layout, data=data, form=UnitForm.CARRIED, slot=slot, events=events))
        if unit.form is UnitForm.STORED:  # other units use the memory that it comes from, or was decoded into
            for event in events:
                event.wait()
        if self._disk is not None:
            self._disk.give_back(unit)
        return True

    def _from_disk(self, unit: int) -> Arrival | None:
        """Wait until a unit has been read and return it; return None when the store is closing."""
        disk = self._disk
        assert disk is not None
        return disk.take(unit) if self._state.until(lambda: disk.is_ready(unit)) else None

    def _released(self) -> None:
        self._marker = self._backend.marker()


def copy_in(
    unit: Arrival, destination: torch.Tensor, decoded: torch.Tensor, backend: Device, after: Event | None = None,
    parallel: Parallel = serially, recorder: Recorder | None = None,
) -> Sequence[Event]:  # fmt: skip
    """Copy a unit from host memory onto the device, and return once all of it is submitted.

    Args:
        destination: The memory on the device.
        decoded: Host memory for tensors that the host has to decode before the copy.
        after: A marker of the device; the copies start when it has passed.
        parallel: Runs the loops of the decoding.
        recorder: The recorder of the trace; None without one.

    Returns:
        The completion of the last copy, and so of all of them; nothing if there is nothing to copy.
    """
    portions = iter([(0, unit.data)]) if unit.form is UnitForm.CARRIED else unit.layout.carried(unit.data, decoded, parallel)
    if recorder is not None and unit.form is UnitForm.STORED and _is_decoded(unit.layout):
        portions = _recorded_decoding(portions, unit.layout.index, recorder)
    return [backend.copy_in(destination[at : at + len(portion)], portion, after) for at, portion in portions][-1:]


def _is_decoded(layout: UnitLayout) -> bool:
    """Return whether the host decodes a tensor of the unit before it crosses the link."""
    return not all(tensor.plain or tensor.source.carried_as_stored for tensor in layout.tensors)


def _recorded_decoding(portions: Iterator[tuple[int, torch.Tensor]], unit: int, recorder: Recorder) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the portions of a unit, and record how long each of them takes to decode."""
    while True:
        start = recorder.now()
        portion = next(portions, None)
        if portion is None:
            return
        recorder.slice(WEIGHTS_TO_DEVICE, f"decode unit {unit}", start, bytes=len(portion[1]))
        yield portion
