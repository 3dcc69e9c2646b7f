"""The interface of a device: memory of its own, host memory that its links reach fast, and copies between the two.

On a CPU there is no such device: computing happens in host memory.
"""

from __future__ import annotations

import time
from typing import Protocol

import torch

from flexgen.base.quantities import format_size
from flexgen.base.recorder import Moment
from flexgen.errors import CapacityError
from flexgen.io.aligned import allocate_memory

HOST = torch.device("cpu")
POISON = 0xFF  # as floating point: NaN in every format


class Event(Protocol):
    """The completion of one copy, or a marker of computing."""

    def done(self) -> bool: ...

    def wait(self) -> None:
        """Return once the copy is complete, so that its source may be overwritten and its destination read, or the marker has passed."""
        ...


class Device(Protocol):
    """A device with memory of its own.

    Computing, bulk copies in, urgent copies in and copies out are four streams: each runs in its order, and none waits for another
    unless a marker, an event or the host makes it.  Bulk copies are cut into chunks of which few are outstanding at a time
    (chunks.py), so that the other copies do not wait long where a link carries one copy at a time.

    Copies in end in arenas only.  Other memory of the device may have been used by computing a moment ago, for what is freed already.

    Attributes:
        device: The torch device of tensors to compute with.
        host_device: The torch device of host memory beside it, and so of tensors that the host attends with.
        bytes_in: The bytes copied to the device so far.
        bytes_out: The bytes copied from the device so far.
        budget_bytes: The most bytes that `allocate` may return in total.
        used_bytes: The bytes that `allocate` has returned.
    """

    device: torch.device
    host_device: torch.device
    budget_bytes: int

    @property
    def bytes_in(self) -> int: ...
    @property
    def bytes_out(self) -> int: ...
    @property
    def used_bytes(self) -> int: ...

    def now(self) -> float:
        """Return the time, in seconds, by which what happens on the device and beside it is measured."""
        ...

    def limit(self, process_bytes: int) -> None:
        """Let this process take no more than so many bytes of the device's memory, all together, until the device is closed.

        Where no driver counts what a process takes, nothing happens.
        """
        ...

    def peak_bytes(self) -> int:
        """Return the most bytes that this process has taken since `limit`, by the driver's count; where none counts, the arenas' bytes."""
        ...

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """Return a uint8 arena on the device, which lives until the device is closed.

        Raises:
            CapacityError: The arena exceeds the rest of the budget.
        """
        ...

    def allocate_host(self, size_bytes: int) -> torch.Tensor:
        """Return a uint8 arena in host memory for copies to start from and end in: page-aligned, and pinned if the device supports that.

        It takes whole pages, and must not be used after `close`.
        """
        ...

    def allocate_pages(self, size_bytes: int) -> torch.Tensor:
        """Return a uint8 arena in host memory that no copy starts from or ends in, such as the pages of KV that the host attends to."""
        ...

    def copy_in(self, destination: torch.Tensor, source: torch.Tensor, after: Event | None = None) -> Event:
        """Copy any number of bytes from the host to the device.

        The calling thread sleeps until all of the copy but the last few chunks has arrived, and so also until `after` has passed.

        Args:
            destination: A contiguous tensor in an arena.  Its contents are undefined until the event, for which computing waits by
                `await_in`.
            source: A contiguous tensor on the host with the same number of bytes, which must not change until the host has seen the event.
            after: A marker after which the copy starts; needed if computing used the destination since the host last waited for it.
        """
        ...

    def copy_in_urgently(self, destination: torch.Tensor, source: torch.Tensor) -> Event:
        """Start a copy from the host to the device that goes before all chunks which are not outstanding yet; it waits for nothing else.

        The arguments are those of `copy_in`.  The host must have seen the end of all computing that used the destination.
        """
        ...

    def copy_out(self, destination: torch.Tensor, source: torch.Tensor) -> Event:
        """Start a copy from the device to the host, of the results of all computing so far.

        The caller keeps a reference to `source` until the host has seen the event.
        """
        ...

    def marker(self) -> Event:
        """Return a marker in the device's computing, which passes when everything submitted before it is done."""
        ...

    def moment(self) -> Moment:
        """Return such a marker, of which the device notes when it passes."""
        ...

    def await_in(self, event: Event) -> None:
        """Make all later computing wait for a copy; the host does not wait."""
        ...

    def close(self) -> None:
        """Return once all copies are complete, and free host memory."""
        ...


class Arenas:
    """The budget of a device's arenas, and the bytes that were copied; the host beside it is this one."""

    host_device = HOST

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.bytes_in = 0
        self.bytes_out = 0

    def now(self) -> float:
        return time.perf_counter()

    def allocate_pages(self, size_bytes: int) -> torch.Tensor:
        return allocate_memory(size_bytes)

    def limit(self, process_bytes: int) -> None:
        """Do nothing: no driver counts."""

    def peak_bytes(self) -> int:
        return self.used_bytes

    def _charge(self, size_bytes: int) -> None:
        if self.used_bytes + size_bytes > self.budget_bytes:
            raise CapacityError(
                f"the device needs {format_size(self.used_bytes + size_bytes)}, its budget is {format_size(self.budget_bytes)}: "
                "raise device_mem, or move a share of weights= or of kv= to the host"
            )
        self.used_bytes += size_bytes
