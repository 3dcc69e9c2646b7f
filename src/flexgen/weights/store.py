"""The homes of the units' bytes, and the links that bring them in time.

Units whose home is where computing happens stay bound.  Those that are kept encoded in host memory are decoded from there whenever they
are opened.  The others come through a chain of links: from disk into host memory and, if there is a device, from host memory onto it.
The sweep opens a unit when it has arrived and releases it when the last micro-batch has left.  The store knows no model code: a `Binder`
binds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch

from flexgen.base.parallel import Parallel, serially
from flexgen.base.quantities import align_up, format_size
from flexgen.base.recorder import Recorder
from flexgen.devices.base import Device
from flexgen.io.aligned import AlignedBuffer, allocate_memory
from flexgen.io.direct_io import FileSet
from flexgen.io.pool import IOPool
from flexgen.plan.policy import HOME_ALIGNMENT
from flexgen.weights.arrival import Arrival, copy_in, read_unit
from flexgen.weights.binder import Binder
from flexgen.weights.homes import allocate_homes
from flexgen.weights.link import DeviceLink, DiskLink, Link, LinkState
from flexgen.weights.opened import OpenUnits
from flexgen.weights.unit import UnitForm, UnitLayout, UnitTensor

Bind = Callable[[str, str, torch.Tensor], None]  # (module, parameter, tensor)


class WeightStore:
    """A store of units: those whose home is where computing happens stay bound, the others stream through links pass after pass.

    Args:
        layouts: All units, in the order in which a pass needs them.
        homes: The home of each unit: "device", "host", "encoded" or "disk"; never "device" on a CPU (no backend).
        binder: The binder of the tensors.
        io: The threads that read.
        files: The files that are read.
        backend: The device, or None when computing happens in host memory.
        host_ring_bytes: The size of the ring for units from disk.
        device_ring_bytes: The size of the ring on the device.
        on_arrival: A function that any thread calls when a unit may have become ready; it must not block.
        parallel: Runs the loops of the host's decoding.
        runs_ahead: Whether links run ahead; otherwise they bring a unit when the sweep needs it and computes nothing else.
        poison: Whether to overwrite released memory, so that a late use is noticed (for tests).
        recorder: The recorder of the trace; None without one.
    """

    def __init__(
        self,
        layouts: Sequence[UnitLayout],
        homes: Sequence[str],
        binder: Binder,
        io: IOPool,
        files: FileSet,
        *,
        backend: Device | None,
        host_ring_bytes: int,
        device_ring_bytes: int,
        on_arrival: Callable[[], None] = lambda: None,
        parallel: Parallel = serially,
        runs_ahead: bool = True,
        poison: bool = False,
        recorder: Recorder | None = None,
    ) -> None:
        self._recorder = recorder
        self._layouts, self._homes, self._binder = layouts, homes, binder
        self._io, self._files, self._backend, self._parallel = io, files, backend, parallel
        self._state, self._runs_ahead = LinkState(on_arrival), runs_ahead
        self._asked: int | None = None  # the unit that links which do not run ahead bring
        self._allocate = backend.allocate if backend is not None else allocate_memory
        self._host_homes: dict[int, Arrival] = {}  # units in host memory that are not bound there
        self._links = self._chain(host_ring_bytes, device_ring_bytes, poison=poison)
        streamed = {layout.index: layout for layout in self._at_home("disk", *(("host", "encoded") if backend is not None else ()))}
        if backend is None:
            streamed |= {layout.index: layout for layout in self._at_home("encoded") if not layout.plain}
        self._streamed = frozenset(streamed)
        self._open = OpenUnits(streamed, binder, backend, parallel, poison=poison, recorder=recorder)
        self._landing: torch.Tensor | None = None  # where units arrive that the device decodes once

    def _at_home(self, *homes: str) -> list[UnitLayout]:
        return [layout for layout, home in zip(self._layouts, self._homes, strict=True) if home in homes]

    def _chain(self, host_ring_bytes: int, device_ring_bytes: int, *, poison: bool) -> list[Link]:
        """Return the links that units need, starting at the disk; the sweep takes units from the last one."""
        state, backend, links, disk = self._state, self._backend, list[Link](), None
        how: dict[str, Any] = {"runs_ahead": self._runs_ahead, "poison": poison, "recorder": self._recorder}
        if from_disk := self._at_home("disk"):
            buffer = backend.allocate_host(host_ring_bytes) if backend is not None else AlignedBuffer(host_ring_bytes).tensor
            disk = DiskLink(from_disk, buffer[:host_ring_bytes], self._io, self._files, state, **how)
            links.append(disk)
        if backend is not None and (crossing := self._at_home("disk", "host", "encoded")):
            decoding = [layout for layout in self._at_home("disk", "encoded") if not layout.plain]
            links.append(DeviceLink(
                crossing, backend.allocate(device_ring_bytes), backend, self._host_homes, disk, state, decoding=decoding,
                parallel=self._parallel, **how,
            ))  # fmt: skip
        return links

    # ------------------------------------------------------------------ units that stay in memory

    def load(self) -> None:
        """Read the units that stay in memory, and bind those whose home is where computing happens."""
        memory = self._host_memory()
        for layout, home in zip(self._layouts, self._homes, strict=True):
            if home == "encoded" and not layout.plain:
                data = self._read(layout, memory.get(layout.index))
                self._host_homes[layout.index] = Arrival(layout=layout, data=data, form=UnitForm.STORED)
            elif layout.index in memory:
                self._host_homes[layout.index] = self._carried(layout, memory[layout.index])
            elif home != "disk":
                self.keep(layout, partial(self._binder.bind, layout.index))

    def _host_memory(self) -> dict[int, torch.Tensor]:
        """Return memory that the link reaches fast for each unit whose home is host memory beside a device, by index."""
        units = zip(self._layouts, self._homes, strict=True)
        sizes = {layout.index: self._held_bytes(layout, home) for layout, home in units if home in ("host", "encoded")}
        return {} if self._backend is None else allocate_homes(sizes, self._backend.allocate_host)

    def keep(self, layout: UnitLayout, bind: Bind) -> None:
        """Read tensors and bind them permanently where computing happens."""
        data, form = self._read(layout), UnitForm.STORED
        if self._backend is not None:
            stored, form = data, UnitForm.CARRIED
            decodes = layout.to_decode_bytes(form) > 0
            data = self._landed(layout, self._backend) if decodes else self._backend.allocate(layout.carried_bytes)
            unit = Arrival(layout=layout, data=stored, form=UnitForm.STORED)
            after = self._backend.marker() if decodes else None
            decoded = torch.empty(layout.carried_bytes, dtype=torch.uint8)
            for event in copy_in(unit, data, decoded, self._backend, after, self._parallel):
                event.wait()
        only_views = not layout.to_decode_bytes(form)
        for tensor in layout.tensors:
            numbers = tensor.numbers(data, form, self._fresh, self._parallel)
            if tensor.is_view(form) and not only_views:  # a view would keep the encoded bytes beside it in memory
                numbers = self._fresh(tensor).copy_(numbers)
            bind(tensor.module, tensor.parameter, numbers)

    def _landed(self, layout: UnitLayout, backend: Device) -> torch.Tensor:
        """Return the memory of the device in which units arrive that it decodes once."""
        if self._landing is None or len(self._landing) < layout.carried_bytes:
            staying = [each.carried_bytes for each in self._at_home("device") if each.to_decode_bytes(UnitForm.CARRIED)]
            self._landing = backend.allocate(max(layout.carried_bytes, *staying, 0))
        return self._landing

    def _read(self, layout: UnitLayout, into: torch.Tensor | None = None) -> torch.Tensor:
        """Return the stored bytes of a unit, in the given memory or in new memory."""
        stored = AlignedBuffer(layout.stored_bytes).tensor if into is None else into
        read_unit(layout, stored, self._io, self._files).wait()
        return stored

    def _carried(self, layout: UnitLayout, into: torch.Tensor) -> Arrival:
        """Return a unit as it will cross the link, in the given memory."""
        data = into[: layout.carried_bytes]
        for at, portion in layout.carried(self._read(layout), data, self._parallel):
            data[at : at + len(portion)] = portion
        return Arrival(layout=layout, data=data, form=UnitForm.CARRIED)

    def _fresh(self, tensor: UnitTensor) -> torch.Tensor:
        return tensor.view(self._allocate(tensor.nbytes), 0)

    # ------------------------------------------------------------------ the sweep's side

    def start(self) -> None:
        """Start the links, which run ahead."""
        for link in self._links:
            link.thread.start()

    def is_ready(self, unit: int) -> bool:
        """Return whether `unit` can be opened now without waiting (or is open); where links do not run ahead, they begin to bring it.

        No more than SCRATCH_UNITS (or DEVICE_SCRATCH_UNITS) are decoded at a time.  The micro-batch at the lowest unit never waits for
        another: on a CPU because all lower units are released, and on a device because others make room.
        """
        if unit not in self._streamed:
            return True
        if unit in self._open:
            return self._open.has_room(unit)
        self._state.check()
        if not self._runs_ahead and unit != self._asked:
            self._asked = unit
            for link in self._links:
                link.ask(unit)
        arrived = self._stays_encoded(unit) or self._links[-1].is_ready(unit)
        return arrived and self._open.has_room(unit)

    def in_use(self, units: Collection[int]) -> None:
        """Tell at which units there are micro-batches that do not wait for the host's attention; see `OpenUnits`."""
        self._open.in_use(units)

    def _stays_encoded(self, unit: int) -> bool:
        """Return whether a unit is opened from host memory, not from a link."""
        return self._backend is None and unit in self._host_homes

    def open(self, unit: int) -> None:
        """Decode and bind a unit that is ready or open: before each time that a micro-batch computes with it."""
        if unit in self._open:
            self._open.use(unit)
        elif unit in self._streamed:
            arrival, self._asked = self._arrived(unit), None
            if self._open.open(arrival):
                self._give_back(arrival)

    def _arrived(self, unit: int) -> Arrival:
        """Return a unit that is ready, for which computing waits."""
        if self._stays_encoded(unit):
            return self._host_homes[unit]
        arrival = self._links[-1].take(unit)
        for event in arrival.events:
            assert self._backend is not None
            self._backend.await_in(event)
        return arrival

    def release(self, unit: int) -> None:
        """Unbind a streamed unit and give its memory back."""
        if (arrival := self._open.close(unit)) is not None:
            self._give_back(arrival)

    def _give_back(self, arrival: Arrival) -> None:
        if arrival.slot is not None:
            self._links[-1].give_back(arrival)

    # ------------------------------------------------------------------ figures and the end

    def held_bytes(self) -> dict[str, int]:
        """Return the bytes of the units at each home."""
        held: dict[str, int] = {}
        for layout, home in zip(self._layouts, self._homes, strict=True):
            held[home] = held.get(home, 0) + self._held_bytes(layout, home)
        return held

    def _held_bytes(self, layout: UnitLayout, home: str) -> int:
        if home == "disk" or (home == "encoded" and not layout.plain):
            return layout.stored_bytes
        if home != "device" and self._backend is not None:
            return align_up(layout.carried_bytes, HOME_ALIGNMENT)
        return max(layout.decoded_bytes, layout.stored_bytes) if layout.plain else layout.decoded_bytes

    def describe(self) -> str:
        """Return the bytes by home and per pass, as text for people."""
        held = self.held_bytes()
        streamed = held.pop("disk", 0)
        parts = [f"{home} {format_size(size)}" for home, size in held.items() if size]
        return ", ".join([*parts, f"from disk {format_size(streamed)} per pass"])

    def close(self) -> None:
        """Stop the links; reads that have started finish first."""
        with self._state.condition:
            self._state.closing = True
            self._state.condition.notify_all()
        for link in self._links:
            if link.thread.is_alive():  # a signal may have come before it was started
                link.thread.join()
        for link in self._links:
            link.settle()
