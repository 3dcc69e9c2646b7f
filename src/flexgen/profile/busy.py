"""How many cores other programs use meanwhile."""

from __future__ import annotations

import time

import psutil


class BusyCores:
    """Counts from when this is made on."""

    def __init__(self) -> None:
        self._began, self._all, self._own = time.perf_counter(), _busy_seconds(), time.process_time()

    def by_others(self) -> float:
        """The mean so far."""
        others = _busy_seconds() - self._all - (time.process_time() - self._own)
        return round(max(others, 0.0) / max(time.perf_counter() - self._began, 1e-9), 2)


def _busy_seconds() -> float:
    """Processor seconds of the whole machine that were not idle; those that a hypervisor gave to others count, too."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + getattr(times, "steal", 0.0)
