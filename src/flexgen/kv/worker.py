"""A thread that computes attention in parallel with the rest of a pass, and the copies that it needs."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from flexgen.base.quantities import align_up
from flexgen.devices.base import Device, Event

MAX_JOBS = 8  # each job holds the q, k and v of a micro-batch
TENSOR_ALIGNMENT = 256


class Worker:
    """A thread that runs jobs in order; the first error is kept and raised by `drain`."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=MAX_JOBS)
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        """Queue a job after the earlier ones; wait while too many are queued."""
        self._jobs.put(job)

    def _work(self) -> None:
        with torch.no_grad():
            while (job := self._jobs.get()) is not None:
                try:
                    job()
                except BaseException as error:  # noqa: BLE001 - raised by drain()
                    self.error = self.error or error
                finally:
                    self._jobs.task_done()
        self._jobs.task_done()

    def drain(self) -> None:
        """Return once all jobs have run, and raise the first error among them."""
        self._jobs.join()
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """Return once all jobs have run and the thread has ended."""
        self._jobs.put(None)
        self._thread.join()


class BounceBuffers:
    """Host memory through which copies to and from a device pass.  Thread-safe.

    Buffers are reused, since memory that a link reaches fast is slow to allocate: there are as many as were ever in use
    at once.

    Args:
        allocate: A function that makes a uint8 tensor of a given number of bytes.
    """

    def __init__(self, allocate: Callable[[int], torch.Tensor]) -> None:
        self._allocate = allocate
        self._spare: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()

    def take(self, size_bytes: int) -> torch.Tensor:
        """Return a buffer of at least this size; a spare one that is too small is replaced by one of the next power of two."""
        with contextlib.suppress(queue.Empty):
            if (spare := self._spare.get_nowait()).nbytes >= size_bytes:
                return spare
        return self._allocate(1 << max(size_bytes - 1, 0).bit_length())

    def give_back(self, buffer: torch.Tensor) -> None:
        self._spare.put(buffer)


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


class Link:
    """Copies of whole tensors between the computing device and the host; without a device nothing is copied."""

    def __init__(self, backend: Device | None) -> None:
        self._backend = backend
        self._buffers = BounceBuffers(backend.allocate_host) if backend is not None else None

    def to_host(self, *tensors: torch.Tensor) -> HostCopies:
        """Start to copy device tensors to the host."""
        if self._backend is None or self._buffers is None or not tensors:
            return HostCopies(tensors)
        backend, buffers = self._backend, self._buffers
        sources = [tensor.contiguous() for tensor in tensors]
        buffer = buffers.take(sum(align_up(source.nbytes, TENSOR_ALIGNMENT) for source in sources))
        copies, offset = [], 0
        for source in sources:
            copies.append(_part(buffer, offset, source))
            offset += align_up(source.nbytes, TENSOR_ALIGNMENT)
        events = [backend.copy_out(copy, source) for copy, source in zip(copies, sources, strict=True)]
        return HostCopies(copies, events, lambda: buffers.give_back(buffer))

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of a host tensor on the device, complete on return."""
        if self._backend is None or self._buffers is None:
            return tensor
        buffer = self._buffers.take(tensor.nbytes)
        source = _part(buffer, 0, tensor).copy_(tensor)
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._backend.device)
        self._backend.copy_in(copy, source, self._backend.marker()).wait()
        self._buffers.give_back(buffer)
        return copy


def _part(buffer: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a buffer from `offset` on, as a tensor of the shape and dtype of another."""
    return buffer[offset : offset + like.nbytes].view(like.dtype).view(like.shape)
