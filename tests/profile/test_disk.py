"""Reading rates of volumes that let some bytes through at once and the rest at a limit."""

from __future__ import annotations

import threading
import time

import pytest

from flexgen.base.quantities import MIB
from flexgen.profile.disk import read_rate, sustained_rate

BURST_BYTES, LIMIT = 64 * MIB, 256 * MIB


class LimitedVolume:
    """A file on a volume that lets BURST_BYTES through at once, and then LIMIT bytes per second."""

    def __init__(self) -> None:
        self._lock, self._began, self._taken = threading.Lock(), 0.0, 0

    def forget_cached(self) -> None:
        self._began, self._taken = time.perf_counter(), 0

    def read_into(self, buffer: memoryview, offset: int) -> None:
        with self._lock:
            self._taken += len(buffer)
            due = self._began + max(self._taken - BURST_BYTES, 0) / LIMIT
        time.sleep(max(due - time.perf_counter(), 0))


@pytest.mark.parametrize("threads", [1, 4])
def test_what_a_volume_lets_through_at_first_is_not_its_rate(threads):
    seconds, volume = 0.8, LimitedVolume()
    short, _ = read_rate(volume, 1 << 30, threads, 4 * MIB, seconds=0.25)
    assert short > 1.1 * LIMIT, "half of what is read then is the burst"
    assert sustained_rate(volume, 1 << 30, threads, 4 * MIB, seconds=seconds) == pytest.approx(LIMIT, rel=0.25)


def test_a_volume_that_is_too_slow_for_a_second_request():
    volume = LimitedVolume()
    assert 0 < sustained_rate(volume, 1 << 30, 2, 64 * MIB, seconds=0.01) < float("inf")
