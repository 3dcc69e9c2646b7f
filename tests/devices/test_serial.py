"""The device without overlap, over one that notes what becomes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from traces import read_trace

from flexgen.base.recorder import COMPUTE, Recorder
from flexgen.devices.serial import SerialDevice
from flexgen.devices.sim import SimulatedDevice


class Noting:
    """Stands for a device, and notes its copies and what is waited for, in order."""

    device, budget_bytes = torch.device("cpu"), 0

    def __init__(self) -> None:
        self.noted: list[str] = []

    def marker(self) -> Noted:
        return Noted(self, "computing")

    def __getattr__(self, name: str) -> Any:
        return lambda *args: (self.noted.append(name), Noted(self, name))[1]


class Noted:
    def __init__(self, device: Noting, what: str) -> None:
        self.device, self.what = device, what

    def wait(self) -> None:
        self.device.noted.append(f"{self.what} is over")


COPIES = ("copy_in", "copy_in_urgently", "copy_out")


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_begins_when_computing_is_over_and_is_waited_for(copy: str) -> None:
    device: Any = Noting()
    event: Any = getattr(SerialDevice(device), copy)(torch.zeros(3), torch.zeros(3))
    assert device.noted == ["computing is over", copy, f"{copy} is over"]
    assert event.what == copy, "what the device itself returned, which computing may wait for"


def test_the_trace_shows_where_the_thread_that_computes_waits(tmp_path: Path) -> None:
    recorder, device = Recorder(tmp_path / "trace.json"), Noting()
    serial: Any = SerialDevice(device, recorder)  # pyright: ignore[reportArgumentType]
    for copy in COPIES:
        getattr(serial, copy)(torch.zeros(3), torch.zeros(3))
    recorder.close()
    waits = read_trace(tmp_path / "trace.json").slices[COMPUTE]
    assert [each["name"] for each in waits] == ["wait for a copy"] * 2, "another thread brings weights"
    assert json.loads((tmp_path / "trace.json").read_text())


def test_what_arrives_is_there_at_once() -> None:
    really = SimulatedDevice(1 << 20, max_delay_seconds=0.0001)
    device = SerialDevice(really)
    numbers, there, back = torch.arange(8.0), device.allocate(32).view(torch.float32), torch.zeros(8)
    for copy in (device.copy_in, device.copy_in_urgently):
        event = copy(there, numbers)
        assert event.done()
        device.await_in(event)
        device.copy_out(back, there + 1)
        assert torch.equal(back, numbers + 1)
        numbers = numbers * 2
    assert (device.bytes_in, device.bytes_out, device.used_bytes) == (64, 64, 32)
    device.close()
