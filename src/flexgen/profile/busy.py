"""Measures how many cores other programs use in the meantime."""

from __future__ import annotations

import time

import psutil


class BusyCores:
    """Counts the cores that other programs use, from its making on."""

    def __init__(self) -> None:
        self._began, self._all, self._own = time.perf_counter(), _busy_seconds(), time.process_time()

    def by_others(self) -> float:
        """Return the mean number of cores so far."""
        others = _busy_seconds() - self._all - (time.process_time() - self._own)
        return round(max(others, 0.0) / max(time.perf_counter() - self._began, 1e-9), 2)


def _busy_seconds() -> float:
    """Return the processor seconds of the whole machine that were not idle, with those that a hypervisor gave to others."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + getattr(times, "steal", 0.0)
