"""Copies of tensors that a pass makes between a device and the host, by way of host memory that the link reaches fast."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from flexgen.base.quantities import align_up, power_of_two
from flexgen.devices.base import Device, Event

TENSOR_ALIGNMENT = 256


class StagingBuffers:
    """Host memory through which copies to and from a device pass.  Thread-safe.

    Buffers are reused, since memory that a link reaches fast is slow to allocate: there are as many as were ever in use
    at once.

    Args:
        allocate: A function that makes a uint8 tensor of a given number of bytes.
    """

    def __init__(self, allocate: Callable[[int], torch.Tensor]) -> None:
        self._allocate = allocate
        self._spare: queue.SimpleQueue[tuple[torch.Tensor, Sequence[Event]]] = queue.SimpleQueue()

    def take(self, size_bytes: int) -> torch.Tensor:
        """Return a buffer of at least this size; a spare one that is too small is replaced by one of the next power of two."""
        with contextlib.suppress(queue.Empty):
            spare, events = self._spare.get_nowait()
            for event in events:
                event.wait()
            if spare.nbytes >= size_bytes:
                return spare
        return self._allocate(power_of_two(size_bytes))

    def give_back(self, buffer: torch.Tensor, after: Sequence[Event] = ()) -> None:
        """Allow a buffer to be used again, once the copies `after` are complete."""
        self._spare.put((buffer, after))


@dataclass(frozen=True, slots=True)
class HostCopies:
    """Tensors that are being copied to the host.

    Attributes:
        tensors: The copies.
        events: The completion of each copy.
        release: A function that gives back the memory of the copies.
    """

    tensors: Sequence[torch.Tensor]
    events: Sequence[Event] = ()
    release: Callable[[], None] = lambda: None

    @contextlib.contextmanager
    def arrived(self) -> Iterator[Sequence[torch.Tensor]]:
        """Wait for the copies and lend them; their memory is freed when the block ends."""
        for event in self.events:
            event.wait()
        yield self.tensors
        self.release()


class Staging:
    """Copies of whole tensors between the computing device and the host; without a device nothing is copied."""

    def __init__(self, backend: Device | None) -> None:
        self._backend = backend
        self._buffers = StagingBuffers(backend.allocate_host) if backend is not None else None

    def to_host(self, *tensors: torch.Tensor) -> HostCopies:
        """Start to copy device tensors to the host."""
        if self._backend is None or self._buffers is None or not tensors:
            return HostCopies(tensors)
        backend, buffers = self._backend, self._buffers
        sources = [tensor.contiguous() for tensor in tensors]
        buffer, copies = _room_for(sources, buffers)
        events = [backend.copy_out(copy, source) for copy, source in zip(copies, sources, strict=True)]
        return HostCopies(copies, events, lambda: buffers.give_back(buffer))

    def to_device(self, *tensors: torch.Tensor, non_blocking: bool = False) -> Sequence[torch.Tensor]:
        """Return copies of host tensors on the device.

        Args:
            tensors: The host tensors.
            non_blocking: Whether only later computing waits for the copies; otherwise they are complete on return.
        """
        if self._backend is None or self._buffers is None:
            return tensors
        backend = self._backend
        buffer, sources = _room_for(tensors, self._buffers)
        copies = [torch.empty(tensor.shape, dtype=tensor.dtype, device=backend.device) for tensor in tensors]
        marker = backend.marker()
        events = [
            backend.copy_in(copy, source.copy_(tensor), marker) for copy, source, tensor in zip(copies, sources, tensors, strict=True)
        ]
        for event in events:
            backend.await_in(event) if non_blocking else event.wait()
        self._buffers.give_back(buffer, events)
        return copies


def _room_for(tensors: Sequence[torch.Tensor], buffers: StagingBuffers) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return a buffer, and for each tensor a part of it of the same shape and dtype."""
    buffer = buffers.take(sum(align_up(each.nbytes, TENSOR_ALIGNMENT) for each in tensors))
    parts, offset = [], 0
    for each in tensors:
        parts.append(buffer[offset : offset + each.nbytes].view(each.dtype).view(each.shape))
        offset += align_up(each.nbytes, TENSOR_ALIGNMENT)
    return buffer, parts
