"""A unit on its way: read from its files into host memory, and copied from there onto a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from flexgen.base.parallel import Parallel, serially
from flexgen.base.recorder import WEIGHTS_TO_DEVICE, Recorder
from flexgen.base.ring import Slot
from flexgen.devices.base import Device, Event
from flexgen.io.direct_io import FileSet
from flexgen.io.pool import Contents, IOPool, Ticket
from flexgen.weights.unit import UnitForm, UnitLayout


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


def read_unit(layout: UnitLayout, into: torch.Tensor, io: IOPool, files: FileSet, on_done: Callable[[], None] | None = None) -> Ticket:
    """Start reading a unit's stored bytes into host memory."""
    view = into.numpy().data
    parts = [(files[each.path], each.offset, view[each.position : each.position + each.size]) for each in layout.extents]
    return io.read(parts, on_done, Contents("weights", f"unit {layout.index}" if layout.index >= 0 else layout.name))


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
