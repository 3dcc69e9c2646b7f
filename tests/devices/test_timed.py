"""The simulated device with a clock, by timelines that are computed by hand: one chunk of a bulk copy takes a second."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from devices.manual_clock import timed_device

from flexgen.base.quantities import MIB
from flexgen.devices.base import Event
from flexgen.devices.clock import Clock, Resource
from flexgen.devices.timed import CopyRules, TimedDevice
from flexgen.errors import CapacityError

CHUNK = 8 * MIB


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def brought(device: TimedDevice, chunks: float, after: Event | None = None) -> float:
    """When a bulk copy of so many chunks ends."""
    size = int(chunks * CHUNK)
    event = device.copy_in(device.allocate(size), device.allocate_host(size), after)
    return event.end


def urgent(device: TimedDevice, chunks: float) -> float:
    size = int(chunks * CHUNK)
    return device.copy_in_urgently(device.allocate(size), device.allocate_host(size)).end


def out(device: TimedDevice, chunks: float) -> float:
    size = int(chunks * CHUNK)
    return device.copy_out(device.allocate_host(size), device.allocate(size)).end


def compute(device: TimedDevice, seconds: float) -> None:
    device.allocate(1).spend("memory", nbytes=seconds)


def test_things_go_one_after_the_other() -> None:
    one = Resource()
    assert [one.give(0, 0, 2), one.give(0, 0, 3), one.give(1, 1, 1)] == [2, 5, 6]
    assert one.give(10, 0, 1) == 11, "what is past means now"
    assert one.busy_seconds == 7
    assert [one.busy_at(each) for each in (9.9, 10, 10.9, 11)] == [False, True, True, False]


def test_what_fits_goes_into_a_gap() -> None:
    one = Resource()
    assert one.give(0, 5, 2) == 7
    assert one.give(0, 0, 3) == 3
    assert one.give(0, 0, 3) == 10, "two seconds are left before the fifth"
    assert one.give(0, 0, 2) == 5


def test_a_bulk_copy_is_submitted_in_chunks() -> None:
    device, clock, _ = timed_device()
    assert brought(device, 5) == 5
    assert clock.time == 2, "the thread slept until three chunks were outstanding"
    assert brought(device, 2) == 7
    assert (clock.time, device.bytes_in) == (4, 7 * CHUNK)


def test_computing_happens_when_it_is_submitted_or_when_the_device_has_time() -> None:
    device, clock, _ = timed_device()
    moments = [device.moment()]
    for seconds in (3, 2):
        compute(device, seconds)
        moments.append(device.moment())
    assert [each.seconds() for each in moments] == [0, 3, 5]
    assert [each.done() for each in moments] == [True, False, False]
    clock.time = 9
    assert device.moment().seconds() == 9


def test_an_urgent_copy_waits_for_outstanding_chunks_only() -> None:
    device, clock, _ = timed_device()
    brought(device, 5)  # it is 2, and chunks end at 3, 4 and 5
    assert urgent(device, 0.5) == 5.5
    assert brought(device, 3) == 8.5, "those that follow go behind it"
    clock.time = 20
    assert urgent(device, 0.5) == 20.5


def test_in_one_piece_an_urgent_copy_waits_for_all_of_it() -> None:
    device, clock, _ = timed_device(CopyRules(chunk_bytes=None))
    assert brought(device, 5) == 5
    assert clock.time == 0, "it is submitted, and the thread goes on"
    assert urgent(device, 0.5) == 5.5
    assert brought(device, 5) == 10.5
    assert clock.time == 5, "one is outstanding"


def test_a_bulk_copy_waits_for_its_marker_and_an_urgent_one_does_not() -> None:
    device, _, _ = timed_device()
    compute(device, 10)
    assert brought(device, 2, after=device.marker()) == 12
    assert urgent(device, 4) == 4
    assert urgent(device, 7) == 19, "six seconds are left before the tenth"
    assert brought(device, 1) == 20, "streams keep their order"


def test_without_its_stream_an_urgent_copy_waits_for_the_marker_too() -> None:
    device, _, _ = timed_device(CopyRules(urgent=False))
    compute(device, 10)
    brought(device, 2, after=device.marker())
    assert urgent(device, 0.5) == 12.5
    assert brought(device, 1) == 13.5


def test_computing_waits_where_it_is_told_to() -> None:
    device, clock, prices = timed_device()
    event = device.copy_in(device.allocate(3 * CHUNK), device.allocate_host(3 * CHUNK))
    compute(device, 1)
    assert device.marker().end == 1, "computing does not wait for copies by itself"
    device.await_in(event)
    compute(device, 2)
    marker = device.marker()
    assert (marker.end, marker.done(), clock.time) == (5, False, 0)
    marker.wait()
    assert (marker.done(), clock.time) == (True, 5)
    assert [kind for kind, *_ in prices["device"].asked] == ["memory", "memory"]


def test_a_copy_out_waits_for_computing_and_for_its_stream() -> None:
    device, _, _ = timed_device()
    compute(device, 2)
    assert [out(device, 1), out(device, 1)] == [3, 4]
    assert brought(device, 1) == 1, "the other direction has an engine of its own"


def test_directions_slow_each_other_down() -> None:
    device, _, _ = timed_device(duplex_slowdown=2.0)
    assert out(device, 3) == 3
    assert urgent(device, 1) == 2
    assert urgent(device, 1) == 4
    assert urgent(device, 1) == 5, "the copy out has ended"


def test_attention_and_the_link_slow_each_other_down() -> None:
    device, clock, _ = timed_device(link_slowdown=3.0, host_slowdown=2.0)
    assert urgent(device, 1) == 1
    device.allocate_host(1).spend("steps", nbytes=2)
    assert clock.time == 4, "the thread slept until it was done"
    assert device.busy_seconds()["host_compute"] == 4
    clock.time = 3
    assert urgent(device, 1) == 6, "for which the host was busy until 4"


def test_what_moves_memory_on_the_host_goes_beside_attention_and_delays_what_follows() -> None:
    device, clock, _ = timed_device()
    host = device.allocate_host(1)
    host.spend("steps", nbytes=10)
    assert clock.time == 10
    clock.time = 2
    host.spend("memory", nbytes=3)
    assert clock.time == 5, "another thread, while attention goes on"
    host.spend("steps", nbytes=1)
    assert clock.time == 10 + 3 + 1
    assert device.busy_seconds()["host_compute"] == 14


def test_a_worker_may_have_to_wait_for_its_copies() -> None:
    device, clock, _ = timed_device(CopyRules(waits=True))
    assert urgent(device, 2) == 2
    assert clock.time == 0, "the thread that computes never waits"
    worker = threading.Thread(target=urgent, args=(device, 2))
    worker.start()
    worker.join()
    assert clock.time == 4


def test_nothing_takes_time_before_the_clock_is_started() -> None:
    device, clock, _ = timed_device()
    clock.begun = False
    compute(device, 10)
    device.read(100 * CHUNK)
    device.allocate_host(1).spend("steps", nbytes=100)
    assert [brought(device, 9, device.marker()), urgent(device, 9), out(device, 9), clock.time] == [0, 0, 0, 0]
    clock.begun = True
    assert brought(device, 1) == 1
    device.read(2 * CHUNK)
    assert (clock.time, device.busy_seconds()["disk"]) == (2, 2)


def test_the_budget_is_kept() -> None:
    device, *_ = timed_device()
    device.allocate(1 << 40)
    with pytest.raises(CapacityError, match="raise device_mem"):
        device.allocate(1)
    assert device.allocate_host(1 << 45).nbytes == 1 << 45, "and host memory is none"


def test_a_clock_in_slow_motion() -> None:
    clock = Clock(0.01)  # a hundred times as fast, so that the test does not take long
    assert (clock.now(), clock.runs) == (0, False)
    clock.wait_until(1e9)
    clock.start()
    start = time.perf_counter()
    clock.wait_until(5)
    assert time.perf_counter() - start >= 0.045
    assert clock.now() >= 5
    clock.stop()
    stopped = clock.now()
    clock.wait_until(1e9)
    assert (clock.now(), clock.runs) == (stopped, False)
