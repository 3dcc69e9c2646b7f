"""The link onto a device: units arrive when their copies are submitted, and memory on the host is used again when they have ended."""

from __future__ import annotations

import threading

import pytest
import torch

from flexgen.devices import sim
from flexgen.devices.sim import SimEvent, SimulatedDevice
from flexgen.weights.link import DiskLink
from tests.weights.test_store import NUM_UNITS, Opened, Written, written

__all__ = ["written"]  # the fixture


@pytest.fixture(autouse=True)
def _as_late_as_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sim, "EARLY", 0.0)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even the smallest unit has more chunks than may be outstanding."""
    monkeypatch.setattr(sim, "CHUNK_BYTES", 256)
    monkeypatch.setattr(sim, "OUTSTANDING_BYTES", 512)


class Gate:
    """Holds the link where it waits for a copy until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened, really = threading.Event(), threading.Event(), SimEvent.wait

        def wait(event: SimEvent) -> None:
            if threading.current_thread().name == "flexgen-device-link":
                self.reached.set()
                assert self.opened.wait(20)
            really(event)

        monkeypatch.setattr(SimEvent, "wait", wait)


def test_a_unit_is_ready_before_its_copy_has_ended(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)  # the link cannot wait for the first copy, which would make it
    with Opened(written, ["host"] * NUM_UNITS, True) as opened:
        for unit in range(NUM_UNITS):
            opened.wait(unit)
            (event,) = opened.store._links[-1]._arrivals[0].events
            assert isinstance(event, SimEvent)
            if not gate.opened.is_set():
                assert event.copied is None, "it has not even begun"
                gate.opened.set()
            opened.store.open(unit)
            opened.check(unit)
            opened.store.release(unit)


def test_a_unit_of_many_chunks_has_one_event(written: Written, small_chunks: None) -> None:
    with Opened(written, ["host", "encoded", "disk"] * 3, True) as opened:
        for _ in range(3):
            for unit in range(NUM_UNITS):
                opened.wait(unit)
                assert len(opened.store._links[-1]._arrivals[0].events) == 1
                opened.store.open(unit)
                opened.check(unit)
                opened.store.release(unit)


def test_the_ring_of_the_disk_is_used_again_when_a_copy_has_ended(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with Opened(written, ["disk"] * NUM_UNITS, True) as opened:
        assert gate.reached.wait(20)
        opened.wait(0)
        disk = opened.store._links[0]
        assert isinstance(disk, DiskLink)
        first = disk.ring._slots[0]
        assert not first.released, "it is ready, and its source is kept"
        gate.opened.set()
        for unit in range(NUM_UNITS):
            opened.wait(unit)
            opened.store.open(unit)
            opened.check(unit)
            opened.store.release(unit)
        assert first.released


def test_a_unit_follows_one_from_disk_before_that_has_arrived(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with Opened(written, ["disk"] + ["host"] * (NUM_UNITS - 1), True) as opened:
        assert gate.reached.wait(20)
        disk, link = opened.store._links
        assert not disk.ring._slots[0].released
        assert [each.layout.index for each in link._arrivals] == [0, 1]
        gate.opened.set()


@pytest.mark.parametrize("home", ["host", "disk"])
def test_closing_while_the_link_waits_for_a_chunk(written: Written, monkeypatch: pytest.MonkeyPatch, small_chunks: None, home: str) -> None:
    gate = Gate(monkeypatch)
    with Opened(written, [home] * NUM_UNITS, True) as opened:
        assert gate.reached.wait(20)
        threads = [link.thread for link in opened.store._links]
        threading.Timer(0.05, gate.opened.set).start()
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("home", ["host", "disk"])
def test_a_copy_that_fails_half_way_is_raised_in_the_sweep(
    written: Written, monkeypatch: pytest.MonkeyPatch, small_chunks: None, home: str
) -> None:
    really, num_chunks = SimulatedDevice._submit, [0]

    def submit(device: SimulatedDevice, stream: object, destination: torch.Tensor, source: torch.Tensor) -> SimEvent:
        num_chunks[0] += 1
        if num_chunks[0] == 40:
            raise RuntimeError("the device is gone")
        return really(device, stream, destination, source)  # type: ignore[arg-type]

    monkeypatch.setattr(SimulatedDevice, "_submit", submit)

    def sweep(opened: Opened) -> None:
        for unit in range(NUM_UNITS):
            opened.wait(unit)
            opened.store.open(unit)
            opened.check(unit)
            opened.store.release(unit)

    with Opened(written, [home] * NUM_UNITS, True) as opened:
        with pytest.raises(RuntimeError, match="the device is gone"):
            sweep(opened)
        threads = [link.thread for link in opened.store._links]
    assert not any(thread.is_alive() for thread in threads)
