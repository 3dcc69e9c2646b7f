"""A clock of a simulated device that the test moves, and that goes on by itself only when a thread waits; and machines with round rates."""

from __future__ import annotations

from typing import Any

from machines import machine_of

from flexgen.base.quantities import MIB
from flexgen.devices.clock import Clock
from flexgen.devices.timed import CopyRules, TimedDevice


class ManualClock(Clock):
    def __init__(self) -> None:
        super().__init__(1.0)
        self.time, self.begun = 0.0, True

    @property
    def runs(self) -> bool:
        return self.begun

    def now(self) -> float:
        return self.time

    def wait_until(self, when: float) -> None:
        self.time = max(self.time, when)


class Seconds:
    """Prices that are told: the bytes or FLOPs of an operation are its seconds; all kinds of operations are remembered."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, float, float, float]] = []

    def seconds(self, kind: str, flops: float, nbytes: float, rows: float) -> float:
        self.asked.append((kind, flops, nbytes, rows))
        return flops or nbytes


def timed_device(rules: CopyRules | None = None, **slowdowns: float) -> tuple[TimedDevice, ManualClock, dict[str, Seconds]]:
    """A device whose links bring a chunk of 8 MiB in a second, in either direction, and whose disk reads one in a second."""
    rate = 8.0 * MIB
    rates: dict[str, Any] = {"host_to_device": rate, "device_to_host": rate, "disk_read": rate}
    clock, prices = ManualClock(), {"device": Seconds(), "host": Seconds()}
    machine = machine_of(device="cuda", **rates, **slowdowns)
    return TimedDevice(1 << 40, machine, prices, clock, rules), clock, prices
