"""A device that is another one, but for what a subclass does in another way."""

from __future__ import annotations

import torch

from flexgen.base.recorder import Moment
from flexgen.devices.base import Device, Event


class WrappedDevice:
    """A device that leaves everything to another; see `Device`.

    Args:
        device: The other device.
    """

    def __init__(self, device: Device) -> None:
        self._of = device
        self.device, self.host_device, self.budget_bytes = device.device, device.host_device, device.budget_bytes

    @property
    def bytes_in(self) -> int:
        return self._of.bytes_in

    @property
    def bytes_out(self) -> int:
        return self._of.bytes_out

    @property
    def used_bytes(self) -> int:
        return self._of.used_bytes

    def now(self) -> float:
        return self._of.now()

    def limit(self, process_bytes: int) -> None:
        self._of.limit(process_bytes)

    def peak_bytes(self) -> int:
        return self._of.peak_bytes()

    def allocate(self, size_bytes: int) -> torch.Tensor:
        return self._of.allocate(size_bytes)

    def allocate_host(self, size_bytes: int) -> torch.Tensor:
        return self._of.allocate_host(size_bytes)

    def allocate_pages(self, size_bytes: int) -> torch.Tensor:
        return self._of.allocate_pages(size_bytes)

    def copy_in(self, destination: torch.Tensor, source: torch.Tensor, after: Event | None = None) -> Event:
        return self._of.copy_in(destination, source, after)

    def copy_in_urgently(self, destination: torch.Tensor, source: torch.Tensor) -> Event:
        return self._of.copy_in_urgently(destination, source)

    def copy_out(self, destination: torch.Tensor, source: torch.Tensor) -> Event:
        return self._of.copy_out(destination, source)

    def marker(self) -> Event:
        return self._of.marker()

    def moment(self) -> Moment:
        return self._of.moment()

    def await_in(self, event: Event) -> None:
        self._of.await_in(event)

    def close(self) -> None:
        self._of.close()
