"""The homes of the units' bytes, and the links that bring them in time.

Units whose home is where computing happens stay bound.  The others come through a chain of links: from disk into host memory and,
if there is a device, from host memory onto it.  The sweep opens a unit when it has arrived and releases it when the last
micro-batch has left.  The store knows no model code: a `Binder` binds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch

from flexgen.base.quantities import format_size
from flexgen.devices.base import POISON, Device
from flexgen.formats.base import Parallel, serially
from flexgen.io.aligned import AlignedBuffer
from flexgen.io.direct_io import FileSet
from flexgen.io.pool import IOPool
from flexgen.weights.link import Arrival, DeviceLink, DiskLink, Link, LinkState, copy_in, read_unit
from flexgen.weights.unit import UnitForm, UnitLayout, UnitTensor

Bind = Callable[[str, str, torch.Tensor], None]  # (module, parameter, tensor)


class Binder(Protocol):
    """Binds the tensors of a unit so that they can be used, as the skeleton does."""

    def bind(self, unit: int, module: str, parameter: str, tensor: torch.Tensor) -> None: ...
    def unbind(self, unit: int, module: str, parameter: str) -> None: ...


class ScratchPool:
    """Reused memory for decoding; newly allocated pages would cause page faults in every pass.

    Args:
        allocate: A function that returns uint8 memory of a given size where computing happens.
    """

    def __init__(self, allocate: Callable[[int], torch.Tensor]) -> None:
        self._allocate = allocate
        self._free: dict[int, list[torch.Tensor]] = {}

    def take(self, size_bytes: int) -> torch.Tensor:
        free = self._free.get(size_bytes)
        return free.pop() if free else self._allocate(size_bytes)

    def give_back(self, scratch: torch.Tensor) -> None:
        self._free.setdefault(len(scratch), []).append(scratch)


class WeightStore:
    """A store of units: those whose home is where computing happens stay bound, the others stream through links pass after pass.

    Args:
        layouts: All units, in the order in which a pass needs them.
        homes: The home of each unit: "device", "host" or "disk"; never "device" on a CPU (no backend).
        binder: The binder of the tensors.
        io: The threads that read.
        files: The files that are read.
        backend: The device, or None when computing happens in host memory.
        host_ring_bytes: The size of the ring for units from disk.
        device_ring_bytes: The size of the ring on the device.
        on_arrival: A function that any thread calls when a unit may have become ready; it must not block.
        parallel: Runs the loops of the host's decoding.
        poison: Whether to overwrite released memory, so that a late use is noticed (for tests).
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
        poison: bool = False,
    ) -> None:
        self._layouts, self._homes, self._binder = layouts, homes, binder
        self._io, self._files, self._backend, self._poison, self._parallel = io, files, backend, poison, parallel
        self._state = LinkState(on_arrival)
        self._allocate = backend.allocate if backend is not None else partial(torch.empty, dtype=torch.uint8)
        self._scratch = ScratchPool(self._allocate)
        self._open: dict[int, tuple[Arrival, list[torch.Tensor]]] = {}
        self._host_homes: dict[int, Arrival] = {}  # used only with a device
        self._links = self._chain(host_ring_bytes, device_ring_bytes)
        self._streamed = frozenset(layout.index for layout in self._at_home("disk", "host" if backend is not None else "disk"))

    def _at_home(self, *homes: str) -> list[UnitLayout]:
        return [layout for layout, home in zip(self._layouts, self._homes, strict=True) if home in homes]

    def _chain(self, host_ring_bytes: int, device_ring_bytes: int) -> list[Link]:
        """Return the links that units need, starting at the disk; the sweep takes units from the last one."""
        state, poison, backend, links = self._state, self._poison, self._backend, list[Link]()
        disk = None
        if from_disk := self._at_home("disk"):
            buffer = backend.allocate_host(host_ring_bytes) if backend is not None else AlignedBuffer(host_ring_bytes).tensor
            disk = DiskLink(from_disk, buffer[:host_ring_bytes], self._io, self._files, state, poison=poison)
            links.append(disk)
        if backend is not None and (crossing := self._at_home("disk", "host")):
            buffer = backend.allocate(device_ring_bytes)
            links.append(DeviceLink(crossing, buffer, backend, self._host_homes, disk, state, parallel=self._parallel, poison=poison))
        return links

    # ------------------------------------------------------------------ units that stay in memory

    def load(self) -> None:
        """Read the units that stay in memory, and bind those whose home is where computing happens."""
        for layout, home in zip(self._layouts, self._homes, strict=True):
            if home == "host" and self._backend is not None:
                self._host_homes[layout.index] = self._in_host_memory(layout, self._backend)
            elif home != "disk":
                self.keep(layout, partial(self._binder.bind, layout.index))

    def keep(self, layout: UnitLayout, bind: Bind) -> None:
        """Read tensors and bind them permanently where computing happens."""
        data, form = self._read(layout), UnitForm.STORED
        if self._backend is not None:
            stored, data, form = data, self._backend.allocate(layout.carried_bytes), UnitForm.CARRIED
            unit = Arrival(layout=layout, data=stored, form=UnitForm.STORED)
            copy_in(unit, data, torch.empty(layout.carried_bytes, dtype=torch.uint8), self._backend, None, self._parallel)
        for tensor in layout.tensors:
            bind(tensor.module, tensor.parameter, tensor.numbers(data, form, self._fresh, self._parallel))

    def _read(self, layout: UnitLayout) -> torch.Tensor:
        """Return the stored bytes of a unit, in newly allocated memory."""
        stored = AlignedBuffer(layout.stored_bytes).tensor
        read_unit(layout, stored, self._io, self._files).wait()
        return stored

    def _in_host_memory(self, layout: UnitLayout, backend: Device) -> Arrival:
        """Return a unit as it will cross the link, in host memory that the link reaches fast."""
        data = backend.allocate_host(layout.carried_bytes)
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
        """Return whether `unit` can be opened now without waiting (or is open)."""
        if unit not in self._streamed or unit in self._open:
            return True
        self._state.check()
        return self._links[-1].is_ready(unit)

    def open(self, unit: int) -> None:
        """Decode and bind a unit that is ready; idempotent while it is open."""
        if unit not in self._streamed or unit in self._open:
            return
        arrival = self._links[-1].take(unit)
        for event in arrival.events:
            assert self._backend is not None
            self._backend.await_in(event)
        scratch: list[torch.Tensor] = []

        def take(tensor: UnitTensor) -> torch.Tensor:
            scratch.append(self._scratch.take(tensor.nbytes))
            return tensor.view(scratch[-1], 0)

        tensors = arrival.layout.tensors
        for tensor in tensors:
            numbers = tensor.numbers(arrival.data, arrival.form, take, self._parallel)
            self._binder.bind(unit, tensor.module, tensor.parameter, numbers)
        if self._backend is None and len(scratch) == len(tensors):  # nothing refers to the slot any more
            self._links[-1].give_back(arrival)
        self._open[unit] = arrival, scratch

    def release(self, unit: int) -> None:
        """Unbind a streamed unit and give its memory back."""
        opened = self._open.pop(unit, None)
        if opened is None:
            return
        arrival, scratch = opened
        for tensor in arrival.layout.tensors:
            self._binder.unbind(unit, tensor.module, tensor.parameter)
        for each in scratch:
            if self._poison:
                each.fill_(POISON)
            self._scratch.give_back(each)
        self._links[-1].give_back(arrival)

    def describe(self) -> str:
        """Return the bytes by home and per pass, as text for people."""
        held = {home: sum(layout.decoded_bytes for layout in self._at_home(home)) for home in ("device", "host")}
        streamed = sum(layout.stored_bytes for layout in self._at_home("disk"))
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
