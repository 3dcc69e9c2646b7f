"""What every device offers: memory of its own, host memory that its links reach fast, and copies between the two.

On a CPU there is no such device: host memory is where computing happens.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from flexgen.base.quantities import format_size
from flexgen.errors import CapacityError

POISON = 0xFF  # as floating point: NaN in every format


class Event(Protocol):
    """The completion of one copy."""

    def done(self) -> bool: ...

    def wait(self) -> None:
        """Return once the copy is complete: its source may be overwritten, its destination read."""
        ...


class Device(Protocol):
    """A device with memory of its own.

    Copies in, copies out and computing are three streams: each runs in its order, none waits for another unless a
    marker, an event or the host makes it.

    Attributes:
        device: where tensors to compute with live.
        bytes_in: copied to the device so far.
        bytes_out: copied from the device so far.
        budget_bytes: what `allocate` may give in all.
        used_bytes: what `allocate` has given.
    """

    device: torch.device
    bytes_in: int
    bytes_out: int
    budget_bytes: int
    used_bytes: int

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """A uint8 arena on the device, which lives until the device is closed.

        Raises:
            CapacityError: it is more than what is left of the budget.
        """
        ...

    def allocate_host(self, size_bytes: int) -> torch.Tensor:
        """A uint8 arena in host memory for copies to start from and end in: page-aligned, and pinned where that exists.

        It must not be used after `close`.
        """
        ...

    def copy_in(self, destination: torch.Tensor, source: torch.Tensor, after: Any = None) -> Event:
        """Start a copy from the host to the device, of equally many bytes.

        Args:
            destination: on the device; it holds anything until the event, for which computing waits by `await_in`.
            source: on the host; it must not change until the host has seen the event.
            after: a marker; the copy starts when it has passed. Needed where earlier computing used the destination.
        """
        ...

    def copy_out(self, destination: torch.Tensor, source: torch.Tensor) -> Event:
        """Start a copy from the device to the host, of what has been computed so far."""
        ...

    def marker(self) -> Any:
        """A point in the device's computing, which passes when everything submitted before it is done."""
        ...

    def await_in(self, event: Event) -> None:
        """Make all later computing wait for a copy; the host goes on."""
        ...

    def close(self) -> None:
        """Return once all copies are complete, and give host memory back."""
        ...


class Arenas:
    """The budget of a device's arenas, and what has been copied."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.bytes_in = 0
        self.bytes_out = 0

    def _charge(self, size_bytes: int) -> None:
        if self.used_bytes + size_bytes > self.budget_bytes:
            raise CapacityError(
                f"the device needs {format_size(self.used_bytes + size_bytes)}, its budget is {format_size(self.budget_bytes)}: "
                "raise --device-mem or move a share of --weights or --kv to the host"
            )
        self.used_bytes += size_bytes
