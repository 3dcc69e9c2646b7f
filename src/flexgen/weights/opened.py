"""The units that are open: decoded where that is needed, and bound."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial

import torch

from flexgen.base.parallel import Parallel
from flexgen.base.quantities import align_up
from flexgen.base.recorder import COMPUTE, Recorder, recorded
from flexgen.devices.base import Device
from flexgen.io.aligned import allocate_memory
from flexgen.kernels.experts import grouped_kernels
from flexgen.plan.policy import DEVICE_SCRATCH_UNITS, SCRATCH_UNITS
from flexgen.weights.arrival import Arrival
from flexgen.weights.binder import Binder, encoded_places
from flexgen.weights.encoded import EncodedNumbers
from flexgen.weights.scratch import ScratchPool
from flexgen.weights.unit import DEVICE_ALIGNMENT, Take, UnitForm, UnitLayout, UnitTensor


class OpenUnits:
    """The streamed units that micro-batches compute with.

    On a CPU a unit is decoded once, and has memory for that until it is closed.

    A device decodes a unit again where others have taken the place of its numbers: micro-batches that wait for the host's attention get
    behind, or ahead, by more units than there is room for, and decoding is fast.  It computes in the order of submission, so that nobody
    uses numbers that have made room.  All other micro-batches stay together, within the units that have room, and use what was decoded
    for the first of them.

    Args:
        layouts: The units that stream, by index.
        binder: The binder of the tensors.
        backend: The device, or None when computing happens in host memory.
        parallel: Runs the loops of the host's decoding.
        poison: Whether to overwrite memory for decoding that is given back, so that a late use is noticed (for tests).
        recorder: The recorder of the trace; None without one.
    """

    def __init__(
        self, layouts: Mapping[int, UnitLayout], binder: Binder, backend: Device | None, parallel: Parallel, *, poison: bool,
        recorder: Recorder | None,
    ) -> None:  # fmt: skip
        self._binder, self._parallel, self._recorder = binder, parallel, recorder
        self._on_device = backend is not None
        form = UnitForm.STORED if backend is None else UnitForm.CARRIED
        decoding = {index: size for index, layout in layouts.items() if (size := layout.to_decode_bytes(form))}
        self._decoded = frozenset(decoding)
        pieces, allocate = (SCRATCH_UNITS, allocate_memory) if backend is None else (DEVICE_SCRATCH_UNITS, backend.allocate)
        self._scratch = ScratchPool(max(decoding.values(), default=0), pieces, allocate, poison=poison)
        kernels = None if backend is None else grouped_kernels(backend.device)
        self._encoded = {index: found for index in decoding if (found := encoded_places(layouts[index], binder, kernels))}
        self._arrivals: dict[int, Arrival] = {}
        self._in_use: Collection[int] = ()
        self._undone = set[int]()  # those whose numbers have made room for those of another

    def __contains__(self, unit: int) -> bool:
        return unit in self._arrivals

    def in_use(self, units: Collection[int]) -> None:
        """Tell at which units there are micro-batches that do not wait for the host's attention."""
        self._in_use = units

    def has_room(self, unit: int) -> bool:
        """Return whether a unit has memory to be decoded into, or can be given some.  The lowest one in use always can, on a device."""
        if unit not in self._decoded or unit in self._scratch.units or self._scratch.has_room:
            return True
        return self._on_device and self._makes_room(unit) is not None

    def _makes_room(self, unit: int) -> int | None:
        """Return the decoded unit that makes room for another: one that nobody uses before that, or any if that is the lowest in use."""
        lowest = min(self._in_use, default=unit)
        idle = [other for other in self._scratch.units if other not in self._in_use and not lowest <= other < unit]
        if not idle and unit <= lowest:
            idle = [*self._scratch.units]
        return max(idle, key=lambda other: (other < lowest, other), default=None)

    def use(self, unit: int) -> None:
        """Prepare to compute with a unit that is open."""
        if unit in self._undone:
            self._bind(unit)

    def open(self, arrival: Arrival) -> bool:
        """Decode and bind a unit, and return whether its stored bytes are needed no more, because nothing that is computed refers to them.

        Matrices of experts by which the device multiplies as they are stored are decoded when somebody asks for their numbers.
        """
        self._arrivals[arrival.layout.index] = arrival
        self._bind(arrival.layout.index)
        return not self._on_device and not any(tensor.is_view(arrival.form) for tensor in arrival.layout.tensors)

    def close(self, unit: int) -> Arrival | None:
        """Unbind a unit, and return what had arrived; None if it is not open."""
        arrival = self._arrivals.pop(unit, None)
        if arrival is not None:
            for tensor in arrival.layout.tensors:
                self._binder.unbind(unit, tensor.module, tensor.parameter)
            self._undone.discard(unit)
            self._scratch.give_back(unit)
        return arrival

    def _bind(self, unit: int) -> None:
        arrival, filled = self._arrivals[unit], 0
        self._undone.discard(unit)

        def take(tensor: UnitTensor) -> torch.Tensor:
            nonlocal filled
            position, filled = filled, filled + align_up(tensor.nbytes, DEVICE_ALIGNMENT)
            return tensor.view(self._piece(unit), position)

        encoded = self._encoded.get(unit, {})
        recorder = self._recorder if unit in self._decoded else None
        with recorded(recorder, COMPUTE, f"decode unit {unit}", modules=arrival.layout.name) as told:
            for tensor in arrival.layout.tensors:
                if (places := encoded.get((tensor.module, tensor.parameter))) is None:
                    numbers = tensor.numbers(arrival.data, arrival.form, take, self._parallel)
                    self._binder.bind(unit, tensor.module, tensor.parameter, numbers)
                else:
                    matrices, decode = places.within(arrival.data, tensor.dtype), partial(self._decode_later, arrival, tensor, take)
                    self._binder.bind_encoded(unit, tensor.module, tensor.parameter, EncodedNumbers(matrices, decode))
            told["bytes"] = filled

    def _piece(self, unit: int) -> torch.Tensor:
        """Return the memory into which a unit is decoded, for which another one may have to make room."""
        if unit not in self._scratch.units and not self._scratch.has_room:
            undone = self._makes_room(unit)
            assert undone is not None, "a unit is opened that is not ready"
            self._scratch.give_back(undone)
            self._undone.add(undone)
        return self._scratch.of(unit)

    def _decode_later(self, arrival: Arrival, tensor: UnitTensor, take: Take) -> torch.Tensor:
        """Return the decoded tensor of a unit that is open."""
        with recorded(self._recorder, COMPUTE, f"decode unit {arrival.layout.index}", bytes=tensor.nbytes, modules=tensor.module):
            return tensor.numbers(arrival.data, arrival.form, take, self._parallel)
