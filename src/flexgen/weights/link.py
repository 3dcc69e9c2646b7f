"""The links on a unit's way to where computing happens, each with its own ring and thread.

A link brings the same units pass after pass, in the order of use, and runs ahead as far as its ring allows, or brings each of them when
it is asked to.  The next link, or the sweep, takes each unit as it arrives and gives its slot back.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from flexgen.base.parallel import Parallel
from flexgen.base.recorder import WEIGHTS_TO_DEVICE, Recorder, recorded
from flexgen.base.ring import ByteRing, Slot
from flexgen.devices.base import POISON, Device, Event
from flexgen.errors import EngineError
from flexgen.io.direct_io import FileSet
from flexgen.io.pool import IOPool
from flexgen.weights.arrival import Arrival, copy_in, read_unit
from flexgen.weights.unit import UnitForm, UnitLayout

T = TypeVar("T")


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

    def now(self, found: Callable[[], T | None]) -> T | None:
        """Return what `found` returns; None when the store is closing."""
        with self.condition:
            return None if self.closing else found()

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
        runs_ahead: Whether units are brought as far ahead as the ring allows, or only those that were asked for.
        poison: Whether to overwrite slots that are given back, so that a late use is noticed (for tests).
        recorder: The recorder of the trace; None without one.
    """

    def __init__(
        self, name: str, layouts: Sequence[UnitLayout], buffer: torch.Tensor, state: LinkState, *, runs_ahead: bool, poison: bool,
        recorder: Recorder | None,
    ) -> None:  # fmt: skip
        self.ring, self._recorder = ByteRing(len(buffer)), recorder
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.layouts, self._buffer, self._state, self._poison = layouts, buffer, state, poison
        self._arrivals: deque[Arrival] = deque()
        self._units = frozenset(layout.index for layout in layouts)
        self._num_asked = None if runs_ahead else 0  # units that may be brought; None for any number

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
        slot = self._state.now(lambda: self._take_slot(size_bytes))
        if slot is None:
            self._let_leave()
            slot = self._state.until(lambda: self._take_slot(size_bytes))
        return None if slot is None else (slot, self._buffer[slot.offset : slot.offset + slot.size])

    def _let_leave(self) -> None:
        """Free what can be freed, before waiting for others to free something."""

    def ask(self, unit: int) -> None:
        """Allow a link that does not run ahead to bring `unit`, which is the next one, if it is one of its units."""
        with self._state.condition:
            if self._num_asked is not None and unit in self._units:
                self._num_asked += 1
                self._state.condition.notify_all()

    def _take_slot(self, size_bytes: int) -> Slot | None:
        slot = None if self._num_asked == 0 else self.ring.take(size_bytes)
        if slot is not None:
            self._num_asked = None if self._num_asked is None else self._num_asked - 1
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
        self, layouts: Sequence[UnitLayout], buffer: torch.Tensor, io: IOPool, files: FileSet, state: LinkState, *, runs_ahead: bool,
        poison: bool, recorder: Recorder | None = None,
    ) -> None:  # fmt: skip
        super().__init__("flexgen-disk-link", layouts, buffer, state, runs_ahead=runs_ahead, poison=poison, recorder=recorder)
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
    than few chunks (devices/chunks.py), so no unit arrives long before its bytes.  Its memory in the disk's ring is free when the last
    chunk has left it; the next unit follows at once, unless there is none yet.

    Args:
        host_homes: The units that stay in host memory, by index, as they cross the link or as stored.
        disk: The link that brings the other units; None if there are none.
        decoding: The units that come to the link as stored, and are decoded for it.
        parallel: Runs the loops of the decoding of units that the host decodes before the copy.
    """

    def __init__(
        self, layouts: Sequence[UnitLayout], buffer: torch.Tensor, backend: Device, host_homes: Mapping[int, Arrival],
        disk: DiskLink | None, state: LinkState, *, decoding: Sequence[UnitLayout], parallel: Parallel, runs_ahead: bool, poison: bool,
        recorder: Recorder | None = None,
    ) -> None:  # fmt: skip
        super().__init__("flexgen-device-link", layouts, buffer, state, runs_ahead=runs_ahead, poison=poison, recorder=recorder)
        self._backend, self._host_homes, self._disk, self._parallel = backend, host_homes, disk, parallel
        self._marker: Event | None = None  # a marker of the computing submitted before a slot was last given back
        largest = max((layout.carried_bytes for layout in decoding), default=0)
        self._decoded = backend.allocate_host(largest) if largest else torch.empty(0, dtype=torch.uint8)
        self._decoding = frozenset(layout.index for layout in decoding)
        self._leaving: tuple[Arrival, Sequence[Event]] | None = None  # what is copied from the disk's ring, or was decoded for the copy

    def _bring(self, layout: UnitLayout) -> bool:
        claimed = self._claim(layout.carried_bytes)
        unit = self._host_homes.get(layout.index) or self._from_disk(layout.index)
        if claimed is None or unit is None:
            return False
        slot, data = claimed
        size, name = layout.carried_bytes, f"unit {layout.index}"
        if layout.index in self._decoding:
            self._let_leave()
        with recorded(self._recorder, WEIGHTS_TO_DEVICE, name, bytes=size, modules=layout.name):
            events = copy_in(unit, data, self._decoded, self._backend, self._marker, self._parallel, self._recorder)
        self._append(Arrival(layout=layout, data=data, form=UnitForm.CARRIED, slot=slot, events=events))
        self._let_leave()
        if unit.form is UnitForm.STORED:  # other units use the memory that it comes from, or was decoded into
            self._leaving = unit, events
        return True

    def _let_leave(self) -> None:
        """Wait until a unit has left the memory that others use, which is long over where another one has been submitted since."""
        if self._leaving is None:
            return
        unit, events = self._leaving
        self._leaving = None
        for event in events:
            event.wait()
        if self._disk is not None:
            self._disk.give_back(unit)

    def _from_disk(self, unit: int) -> Arrival | None:
        """Wait until a unit has been read and return it; return None when the store is closing."""
        disk = self._disk
        assert disk is not None
        if not disk.is_ready(unit):
            self._let_leave()
        return disk.take(unit) if self._state.until(lambda: disk.is_ready(unit)) else None

    def _released(self) -> None:
        self._marker = self._backend.marker()
