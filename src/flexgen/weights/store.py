"""Where the units' bytes live, and how they arrive in time: homes, rings, prefetch, decode.

One thread per link runs ahead on its own through the endless sequence of passes; the sweep opens a unit when its
bytes have arrived and releases it when the last micro-batch has left.  Knows no model code: a `Binder` binds.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from flexgen.base.quantities import format_size
from flexgen.devices.base import POISON, Backend, Event
from flexgen.errors import EngineError
from flexgen.io.aligned import AlignedBuffer
from flexgen.io.direct_io import FileSet
from flexgen.io.pool import IOPool, Ticket
from flexgen.weights.ring import ByteRing, Slot
from flexgen.weights.unit import UnitLayout, UnitTensor


class Binder(Protocol):
    """Who makes a unit's tensors usable: the skeleton."""

    def bind(self, unit: int, module: str, parameter: str, tensor: torch.Tensor) -> None: ...
    def unbind(self, unit: int, module: str, parameter: str) -> None: ...


class ScratchPool:
    """Reused tensors for decoding: fresh pages would be faulted in on every pass."""

    def __init__(self) -> None:
        self._free: dict[tuple[tuple[int, ...], torch.dtype], list[torch.Tensor]] = {}

    def take(self, tensor: UnitTensor) -> torch.Tensor:
        free = self._free.get((tensor.shape, tensor.dtype))
        return free.pop() if free else torch.empty(tensor.shape, dtype=tensor.dtype)

    def give_back(self, scratch: torch.Tensor) -> None:
        self._free.setdefault((tuple(scratch.shape), scratch.dtype), []).append(scratch)


class _Visit:
    """One arrival of a streamed unit: its staging slot, then (with a device) its device slot."""

    def __init__(self, layout: UnitLayout) -> None:
        self.layout = layout
        self.ticket: Ticket | None = None
        self.host_slot: Slot | None = None
        self.device_slot: Slot | None = None
        self.events: list[Event] = []
        self.temporaries: list[torch.Tensor] = []
        self.arrived = False


class WeightStore:
    """Units at home in memory stay bound; the others stream through rings, pass after pass.

    Args:
        layouts: all units, in the order in which a pass needs them.
        homes: "device", "host" or "disk" of each; on a CPU device (no backend) never "device".
        host_ring_bytes: staging of units from disk. device_ring_bytes: staging on the device.
        on_arrival: called, on any thread, whenever a unit may have become ready, and when a link has failed.
        poison: overwrite released slots, so that a late use shows (tests).
    """

    def __init__(
        self,
        layouts: Sequence[UnitLayout],
        homes: Sequence[str],
        binder: Binder,
        io: IOPool,
        files: FileSet,
        *,
        backend: Backend | None,
        host_ring_bytes: int,
        device_ring_bytes: int,
        on_arrival: Callable[[], None] = lambda: None,
        poison: bool = False,
    ) -> None:
        self._layouts, self._homes, self._binder = layouts, homes, binder
        self._io, self._files, self._backend = io, files, backend
        self._on_arrival, self._poison = on_arrival, poison
        self._lock = threading.Condition(threading.RLock())
        self._failure: BaseException | None = None
        self._closing = False
        self._scratch = ScratchPool()
        self._packed: dict[int, torch.Tensor] = {}  # homes in host memory, for a device
        self._open: dict[int, tuple[_Visit | None, list[torch.Tensor]]] = {}
        streamed = [each for each, home in zip(layouts, homes, strict=True) if home == "disk" or (backend and home == "host")]
        self._streamed = {layout.index for layout in streamed}
        self._from_disk = [layout for layout in streamed if homes[layout.index] == "disk"]
        self._order = streamed
        self._host_ring = ByteRing(host_ring_bytes)
        self._device_ring = ByteRing(device_ring_bytes)
        self._host_buffer = AlignedBuffer(host_ring_bytes) if self._from_disk else None
        self._device_buffer = backend.allocate(device_ring_bytes) if backend and streamed else None
        self._reading: deque[_Visit] = deque()  # from disk, in order, for the link thread
        self._ready: deque[_Visit] = deque()  # in order of use, for the sweep
        self._threads: list[threading.Thread] = []
        self._released_marker: Any = None  # what the device had computed when a slot was last given back
        self.resident_bytes = {"device": 0, "host": 0}

    # ------------------------------------------------------------------ loading

    def load_residents(self) -> None:
        """Read the units that stay in memory and bind those that live where computing happens."""
        for layout, home in zip(self._layouts, self._homes, strict=True):
            if home == "disk":
                continue
            if self._backend is None:
                self._load_on_host(layout)
            else:
                self._load_for_device(layout, home)

    def _read_staging(self, layout: UnitLayout) -> torch.Tensor:
        buffer = AlignedBuffer(layout.staging_bytes)
        self._read(layout, buffer.view).wait()
        return buffer.tensor

    def _read(self, layout: UnitLayout, view: memoryview, on_done: Callable[[], None] | None = None) -> Ticket:
        parts = [(self._files[e.path], e.offset, view[e.position : e.position + e.size]) for e in layout.extents]
        return self._io.read(parts, on_done)

    def _load_on_host(self, layout: UnitLayout) -> None:
        staging = self._read_staging(layout)
        for tensor in layout.tensors:
            bound = tensor.view(staging) if tensor.plain else torch.empty(tensor.shape, dtype=tensor.dtype)
            if not tensor.plain:
                tensor.decode(staging, bound)
            self._binder.bind(layout.index, tensor.module, tensor.parameter, bound)
        self.resident_bytes["host"] += layout.packed_bytes

    def _load_for_device(self, layout: UnitLayout, home: str) -> None:
        assert self._backend is not None
        staging = self._read_staging(layout)
        packed = self._backend.allocate_host(layout.packed_bytes) if home == "host" else torch.empty(layout.packed_bytes, dtype=torch.uint8)
        for tensor in layout.tensors:
            tensor.decode(staging, tensor.packed_view(packed))
        self.resident_bytes[home] += layout.packed_bytes
        if home == "host":
            self._packed[layout.index] = packed
            return
        arena = self._backend.allocate(layout.packed_bytes)
        event = self._backend.copy_in(arena, packed)
        event.wait()
        for tensor in layout.tensors:
            self._binder.bind(layout.index, tensor.module, tensor.parameter, tensor.packed_view(arena))

    # ------------------------------------------------------------------ links, each on its own thread

    def start(self) -> None:
        """Let the links run ahead."""
        if self._from_disk:
            self._spawn(self._run_disk, "flexgen-disk-link")
        if self._backend is not None and self._order:
            self._spawn(self._run_device, "flexgen-device-link")

    def _spawn(self, target: Callable[[], None], name: str) -> None:
        def guarded() -> None:
            try:
                target()
            except BaseException as error:  # noqa: BLE001 - reported to the sweep, which waits for this thread's work
                with self._lock:
                    self._failure = error
                    self._lock.notify_all()
                self._on_arrival()

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _take_slot(self, ring: ByteRing, size_bytes: int) -> Slot | None:
        """Wait for room in a ring; None when closing."""
        with self._lock:
            while not self._closing:
                if (slot := ring.take(size_bytes)) is not None:
                    return slot
                self._lock.wait()
        return None

    def _run_disk(self) -> None:
        assert self._host_buffer is not None
        while True:
            for layout in self._from_disk:
                slot = self._take_slot(self._host_ring, layout.staging_bytes)
                if slot is None:
                    return
                visit = _Visit(layout)
                visit.host_slot = slot
                with self._lock:
                    (self._reading if self._backend else self._ready).append(visit)
                    self._lock.notify_all()
                view = self._host_buffer.view[slot.offset : slot.offset + slot.size]
                ticket = self._read(layout, view, lambda visit=visit: self._disk_done(visit))
                with self._lock:
                    visit.ticket = ticket  # after small reads that are done already: who waits looks again
                    self._lock.notify_all()
                self._on_arrival()

    def _disk_done(self, visit: _Visit) -> None:
        with self._lock:
            visit.arrived = self._backend is None
            self._lock.notify_all()
        self._on_arrival()

    def _run_device(self) -> None:
        assert self._backend is not None
        assert self._device_buffer is not None
        while True:
            for layout in self._order:
                slot = self._take_slot(self._device_ring, layout.packed_bytes)
                if slot is None:
                    return
                visit = self._next_read() if self._homes[layout.index] == "disk" else _Visit(layout)
                if visit is None:
                    return
                visit.device_slot = slot
                with self._lock:
                    self._ready.append(visit)
                self._copy_in(visit, self._device_buffer[slot.offset : slot.offset + slot.size])
                with self._lock:
                    if visit.host_slot is not None:
                        self._host_ring.give_back(visit.host_slot)
                    visit.arrived = True
                    self._lock.notify_all()
                self._on_arrival()

    def _next_read(self) -> _Visit | None:
        """The next unit from disk, once read; None when closing."""
        with self._lock:
            while not self._reading and not self._closing:
                self._lock.wait()
            if self._closing:
                return None
            visit = self._reading.popleft()
            while visit.ticket is None and not self._closing:
                self._lock.wait()
        if visit.ticket is None:
            return None
        while not visit.ticket.wait(0.2):
            if self._closing:
                return None
        return visit

    def _copy_in(self, visit: _Visit, destination: torch.Tensor) -> None:
        """Bring a unit onto the device and wait until it is there (the source's slot is free afterwards)."""
        assert self._backend is not None
        layout, events = visit.layout, []
        after = self._released_marker
        if (packed := self._packed.get(layout.index)) is not None:
            events.append(self._backend.copy_in(destination[: packed.numel()], packed, after))
        else:
            assert self._host_buffer is not None
            assert visit.host_slot is not None
            slot = visit.host_slot
            staging = self._host_buffer.tensor[slot.offset : slot.offset + slot.size]
            for tensor in layout.tensors:
                source = tensor.view(staging) if tensor.plain else self._decoded(tensor, staging, visit)
                events.append(self._backend.copy_in(tensor.packed_view(destination), source, after))
        for event in events:
            event.wait()
        visit.events = events
        visit.temporaries.clear()

    def _decoded(self, tensor: UnitTensor, staging: torch.Tensor, visit: _Visit) -> torch.Tensor:
        out = torch.empty(tensor.shape, dtype=tensor.dtype)
        tensor.decode(staging, out)
        visit.temporaries.append(out)
        return out

    # ------------------------------------------------------------------ the sweep's side

    def is_ready(self, unit: int) -> bool:
        """Whether `unit` can be opened now without waiting (or is open)."""
        if unit not in self._streamed or unit in self._open:
            return True
        with self._lock:
            self._raise_failure()
            visit = self._ready[0] if self._ready else None
            if visit is None:
                return False
            if visit.layout.index != unit:
                raise EngineError(f"unit {unit} is wanted, unit {visit.layout.index} is next in the ring")
            if not visit.arrived or (visit.host_slot is not None and visit.ticket is None):
                return False
            if visit.ticket is not None:
                visit.ticket.wait()  # done already: raises what the read failed of
            return True

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def open(self, unit: int) -> None:
        """Decode and bind a unit that is ready; idempotent while it is open."""
        if unit not in self._streamed or unit in self._open:
            return
        with self._lock:
            visit = self._ready.popleft()
        layout = self._layouts[unit]
        scratch: list[torch.Tensor] = []
        if self._backend is not None:
            assert self._device_buffer is not None
            assert visit.device_slot is not None
            for event in visit.events:
                self._backend.await_in(event)
            packed = self._device_buffer[visit.device_slot.offset : visit.device_slot.offset + visit.device_slot.size]
            for tensor in layout.tensors:
                self._binder.bind(unit, tensor.module, tensor.parameter, tensor.packed_view(packed))
        else:
            self._bind_from_host(visit, scratch)
        self._open[unit] = (visit, scratch)

    def _bind_from_host(self, visit: _Visit, scratch: list[torch.Tensor]) -> None:
        assert self._host_buffer is not None
        assert visit.host_slot is not None
        slot, layout = visit.host_slot, visit.layout
        staging = self._host_buffer.tensor[slot.offset : slot.offset + slot.size]
        for tensor in layout.tensors:
            if tensor.plain:
                bound = tensor.view(staging)
            else:
                bound = self._scratch.take(tensor)
                tensor.decode(staging, bound)
                scratch.append(bound)
            self._binder.bind(layout.index, tensor.module, tensor.parameter, bound)
        if not any(tensor.plain for tensor in layout.tensors):  # nothing refers to the slot any more
            self._give_back(visit)

    def release(self, unit: int) -> None:
        """Unbind a streamed unit and give its slot back."""
        opened = self._open.pop(unit, None)
        if opened is None:
            return
        visit, scratch = opened
        for tensor in self._layouts[unit].tensors:
            self._binder.unbind(unit, tensor.module, tensor.parameter)
        for tensor in scratch:
            if self._poison:
                tensor.view(torch.uint8).fill_(POISON)
            self._scratch.give_back(tensor)
        assert visit is not None
        self._give_back(visit)

    def _give_back(self, visit: _Visit) -> None:
        slot = visit.device_slot if self._backend is not None else visit.host_slot
        if slot is None or slot.released:
            return
        if self._poison:
            buffer = self._device_buffer if self._backend is not None else self._host_buffer.tensor  # type: ignore[union-attr]
            assert buffer is not None
            buffer[slot.offset : slot.offset + slot.size].fill_(POISON)
        with self._lock:
            if self._backend is not None:
                self._released_marker = self._backend.marker()
                self._device_ring.give_back(slot)
            else:
                self._host_ring.give_back(slot)
            self._lock.notify_all()

    def describe(self) -> str:
        """For people: bytes by home and ring sizes."""
        parts = [f"{tier} {format_size(size)}" for tier, size in self.resident_bytes.items() if size]
        streamed = sum(layout.staging_bytes for layout in self._from_disk)
        return ", ".join([*parts, f"from disk {format_size(streamed)} per pass"])

    def close(self) -> None:
        """Stop the links; reads under way finish first."""
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        for thread in self._threads:
            if thread.is_alive():  # a signal may have come before it was
                thread.join()
        for visit in [*self._reading, *self._ready]:
            if visit.ticket is not None:
                visit.ticket.settle()
        self._threads.clear()
