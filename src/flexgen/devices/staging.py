"""Copies of tensors that a pass makes between a device and the host, through memory that is kept for them on both sides.

Several tensors cross as one copy.  What arrives on the device lands in a slot, which is free again when the host has seen that
computing has left it, so that no copy waits for queued computing, and no other stream writes to memory of computing's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from flexgen.base.quantities import align_up
from flexgen.devices.base import HOST, Device, Event
from flexgen.devices.slots import Slot, Slots

TENSOR_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class HostCopies:
    """Tensors that are being copied to the host.

    Attributes:
        tensors: The copies.
        event: Their completion; None if nothing has to be copied.
        source: What is copied, which is kept for that long.
        release: A function that gives back the memory of the copies.
    """

    tensors: Sequence[torch.Tensor]
    event: Event | None = None
    source: torch.Tensor | None = None
    release: Callable[[], None] = lambda: None

    def done(self) -> bool:
        """Return whether `arrived` need not wait."""
        return self.event is None or self.event.done()

    @contextlib.contextmanager
    def arrived(self) -> Iterator[Sequence[torch.Tensor]]:
        """Wait for the copies and lend them; their memory is used again when the block ends."""
        if self.event is not None:
            self.event.wait()
        yield self.tensors
        self.release()


class DeviceCopies:
    """Tensors that are being copied to the device.

    Args:
        tensors: The tensors themselves, where nothing has to be copied.
    """

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._tensors = tensors

    def take(self) -> Sequence[torch.Tensor]:
        """Return the tensors, in memory of computing's own; call it once, on the thread that computes, which does not wait."""
        return self._tensors


class _SlotCopies(DeviceCopies):
    """Tensors that are being copied to a slot on the device."""

    def __init__(self, tensors: Sequence[torch.Tensor], backend: Device, slots: Slots, slot: Slot, event: Event) -> None:
        super().__init__(*tensors)
        self._backend, self._slots, self._slot, self._event = backend, slots, slot, event

    def take(self) -> Sequence[torch.Tensor]:
        self._backend.await_in(self._event)
        taken = _parts(self._tensors, self._slot.memory.clone())
        self._slots.give_back(self._slot, self._backend.marker())
        return taken


class Staging:
    """Copies of whole tensors between the computing device and the host; without a device nothing is copied.  Thread-safe.

    Args:
        backend: The device; None where the host computes.
        in_bytes: The memory to begin with, on the device and on the host, for copies to the device.
        out_bytes: The memory to begin with, on the host, for copies to the host.

    Attributes:
        device: The device of tensors to compute with.
    """

    def __init__(self, backend: Device | None, in_bytes: int = 0, out_bytes: int = 0) -> None:
        self._backend = backend
        self.device = HOST if backend is None else backend.device
        if backend is not None:
            self._on_device = Slots(backend.allocate, in_bytes)
            self._on_host = Slots(backend.allocate_host, in_bytes + out_bytes)

    def to_host(self, *tensors: torch.Tensor) -> HostCopies:
        """Start to copy device tensors to the host; to be called on the thread that computes."""
        if self._backend is None or not tensors:
            return HostCopies(tensors)
        source = torch.empty(_total_bytes(tensors), dtype=torch.uint8, device=self._backend.device)
        for part, tensor in zip(_parts(tensors, source), tensors, strict=True):
            part.copy_(tensor)
        slots, slot = self._on_host, self._on_host.take(source.nbytes)
        event = self._backend.copy_out(slot.memory[: source.nbytes], source)
        return HostCopies(_parts(tensors, slot.memory), event, source, lambda: slots.give_back(slot))

    def to_device(self, *tensors: torch.Tensor) -> DeviceCopies:
        """Start to copy host tensors to the device; they may change as soon as this returns."""
        if self._backend is None or not tensors:
            return DeviceCopies(*tensors)
        size_bytes = _total_bytes(tensors)
        through, slot = self._on_host.take(size_bytes), self._on_device.take(size_bytes)
        for part, tensor in zip(_parts(tensors, through.memory), tensors, strict=True):
            part.copy_(tensor)
        event = self._backend.copy_in_urgently(slot.memory[:size_bytes], through.memory[:size_bytes])
        self._on_host.give_back(through, event)
        return _SlotCopies(_parts(tensors, slot.memory), self._backend, self._on_device, slot, event)


def _total_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Return the bytes of tensors that lie behind each other, each at a multiple of TENSOR_ALIGNMENT."""
    return sum(align_up(each.nbytes, TENSOR_ALIGNMENT) for each in tensors)


def _parts(tensors: Sequence[torch.Tensor], memory: torch.Tensor) -> list[torch.Tensor]:
    """Return for each of some tensors a part of the memory of the same shape and dtype."""
    parts, offset = [], 0
    for each in tensors:
        parts.append(memory[offset : offset + each.nbytes].view(each.dtype).view(each.shape))
        offset += align_up(each.nbytes, TENSOR_ALIGNMENT)
    return parts
