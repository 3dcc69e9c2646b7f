"""A simulated device that counts copies, for tests of what crosses the link."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flexgen.devices.sim import SimulatedDevice


class CountingDevice(SimulatedDevice):
    """Counts copies, and how often the host waits for one that comes from the device: all of its threads, and the main one."""

    def __init__(self, budget_bytes: int = 1 << 20) -> None:
        super().__init__(budget_bytes, max_delay_seconds=0.0001)
        self.num_in = self.num_out = self.num_waits = self.num_main_waits = 0

    def copy_in(self, *args: Any, **how: Any) -> Any:
        self.num_in += 1
        return super().copy_in(*args, **how)

    def copy_in_urgently(self, *args: Any, **how: Any) -> Any:
        self.num_in += 1
        return super().copy_in_urgently(*args, **how)

    def copy_out(self, *args: Any, **how: Any) -> Any:
        self.num_out += 1
        return super().copy_out(*args, **how)

    def finish(self, event: Any) -> None:
        self.num_waits += event.stream is self._out
        self.num_main_waits += event.stream is self._out and threading.current_thread() is threading.main_thread()
        super().finish(event)


@pytest.fixture
def device() -> Iterator[CountingDevice]:
    device = CountingDevice()
    with torch.no_grad():
        yield device
    device.close()
