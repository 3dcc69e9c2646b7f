"""The threads that host kernels run on: named, started once, and owned by the caller.

Numba's own parallel regions abort when two threads enter them, and OpenMP's pool belongs to torch.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Self

import numpy as np

from flexgen.errors import EngineError

SLICES_PER_THREAD = 4  # more than one, since another process may slow a core down

Range = tuple[int, int]


class KernelThreads:
    """Runs a function over slices of a work list, on the calling thread and on `num_threads - 1` of its own."""

    def __init__(self, num_threads: int) -> None:
        if num_threads < 1:
            raise EngineError(f"kernels cannot run on {num_threads} threads")
        self.num_threads = num_threads
        self._batches: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=_work, args=(self._batches,), name=f"flexgen-kernel-{i}", daemon=True) for i in range(1, num_threads)
        ]
        for thread in self._threads:
            thread.start()
        self._stop = weakref.finalize(self, _stop, self._batches, len(self._threads))

    def run(self, function: Callable[[int, int], None], ranges: Sequence[Range]) -> None:
        """Call `function(begin, end)` once for each range, in any order.  The first error is raised after all have ended."""
        if not self._stop.alive:
            raise EngineError("these kernel threads are closed")
        if not self._threads or len(ranges) <= 1:
            for begin, end in ranges:
                function(begin, end)
            return
        batch = _Batch(function, ranges)
        for _ in range(min(len(self._threads), len(ranges) - 1)):
            self._batches.put(batch)
        batch.drain()
        batch.wait()

    def over(self, function: Callable[[int, int], None], count: int) -> None:
        """Call `function(begin, end)` for ranges that cover [0, count), several for each thread.  Errors are raised as by `run`."""
        num_slices = min(count, SLICES_PER_THREAD * self.num_threads) if self._threads else 1
        bounds = [count * i // max(num_slices, 1) for i in range(num_slices + 1)]
        self.run(function, list(pairwise(bounds)))

    def close(self) -> None:
        """End the threads.  Closing twice does no harm."""
        self._stop()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class _Batch:
    """The slices of one call; whoever is free takes the next one."""

    def __init__(self, function: Callable[[int, int], None], ranges: Sequence[Range]) -> None:
        self._function = function
        self._ranges = deque(ranges)
        self._num_running = len(ranges)
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._error: BaseException | None = None

    def drain(self) -> None:
        while True:
            try:
                begin, end = self._ranges.popleft()
            except IndexError:
                return
            error = None
            try:
                self._function(begin, end)
            except BaseException as raised:  # noqa: BLE001  (raised again by `wait`, on the thread that called)
                error = raised
            with self._lock:
                self._error = self._error or error
                self._num_running -= 1
                if self._num_running == 0:
                    self._done.set()

    def wait(self) -> None:
        self._done.wait()
        if self._error is not None:
            raise self._error


def split_evenly(costs: np.ndarray, num_slices: int) -> list[Range]:
    """Cut a work list into at most `num_slices` ranges of about the same total cost (all costs positive)."""
    total = np.cumsum(costs)
    if len(total) == 0:
        return []
    targets = total[-1] * np.arange(1, num_slices) / num_slices
    bounds = [0, *np.unique(np.searchsorted(total, targets, side="left") + 1).tolist(), len(total)]
    return [(begin, end) for begin, end in pairwise(bounds) if begin < end]


def _work(batches: queue.SimpleQueue[_Batch | None]) -> None:
    while (batch := batches.get()) is not None:
        batch.drain()
        del batch  # while idle, a thread keeps no tensor alive


def _stop(batches: queue.SimpleQueue[_Batch | None], num_threads: int) -> None:
    for _ in range(num_threads):
        batches.put(None)
