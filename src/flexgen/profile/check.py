"""Compares the machine's speed just now with its profile: a moment of matrix products, and of reading where weights stream.

A shared machine changes within minutes, and both show it, so that a report can tell a slow machine from a slow engine.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flexgen.base.quantities import MIB
from flexgen.errors import StorageError
from flexgen.plan.machine import Machine
from flexgen.profile.busy import BusyCores
from flexgen.profile.compute import DENSE_SHAPES, queued
from flexgen.profile.disk import opened, read_rate
from flexgen.report.progress import CheckedMachine

logger = logging.getLogger(__name__)

# What a look takes at most, and of the time that the job is expected to take.
MOST_SECONDS, SHARE = 0.3, 0.02
# The rows of products, and what a call should take at most: beside other programs, many short ones tell more than a few long ones.
ROWS, CALL_SECONDS = 128, 0.02
CHECK_BLOCK_BYTES = 4 * MIB
LEAST_FILE_BYTES = 64 * MIB  # smaller ones say little of a disk


@dataclass(slots=True, kw_only=True)
class MachineCheck:
    """Compares the machine with its profile, at the beginning and at the end of a run.

    Attributes:
        machine: The profile.
        device: Device that computes.
        dtype: Dtype that is computed in.
        max_bytes: Memory that products may take.
        job_seconds: Seconds that the job is expected to take.
        weights: File that weights stream from; None where none do.
        at_start: Result of `now` when the run began; empty where nobody looked.
    """

    machine: Machine
    device: str
    dtype: str
    max_bytes: int
    job_seconds: float
    weights: Path | None = None
    at_start: dict[str, float] = field(default_factory=dict[str, float])
    _busy: BusyCores = field(default_factory=BusyCores)

    def start(self) -> None:
        """Look at the machine when the run begins."""
        self.at_start = self.now()
        self._busy = BusyCores()

    def end(self) -> CheckedMachine:
        """Look at the machine again, and return both results and who used the machine in between."""
        busy_cores = self._busy.by_others()
        return CheckedMachine(start=self.at_start, end=self.now(), busy_cores=busy_cores)

    def now(self) -> dict[str, float]:
        """Return resource -> its rate just now over the typical one of the profile, without what cannot be looked at."""
        began, rates = time.perf_counter(), dict[str, float]()
        try:
            with torch.inference_mode():
                rates["compute"] = self._products()
            if self.weights is not None and self.weights.stat().st_size >= LEAST_FILE_BYTES:
                rates["disk_read"] = self._reading(self.weights)
        except (OSError, StorageError, MemoryError, RuntimeError) as error:  # the run itself will say what is wrong
            logger.info("the machine could not be checked: %s", error)
        shown = ", ".join(f"{name} {rate:.2f}" for name, rate in rates.items())
        logger.debug("this machine just now, of its profile's rates: %s (in %.2f s)", shown, time.perf_counter() - began)
        return rates

    def _products(self) -> float:
        """Return the relative rate of linear layers with about ROWS rows, in a shape of the profile."""
        rows, rate = min(self.machine.dense[self.dtype], key=lambda point: abs(point[0] - ROWS))
        features_out, features_in = DENSE_SHAPES[0]
        where, dtype = torch.device("cuda" if self.device == "cuda" else "cpu"), getattr(torch, self.dtype)
        fits = self.max_bytes // (3 * features_in * dtype.itemsize)  # the library may pack it once more
        soon = CALL_SECONDS / self._seconds(rows, 1, rate.typical)
        while features_out > max(min(fits, soon), 256):
            features_out //= 2
        numbers = torch.linspace(-1, 1, 256 * features_in, device=where).to(dtype).view(256, features_in)  # nobody's random state changes
        weight, x = numbers.repeat(features_out // 256, 1), numbers.repeat(-(-int(rows) // 256), 1)[: int(rows)]
        run, at_once = queued(lambda: torch.nn.functional.linear(x, weight), where, int(rows))  # as the profile measured
        run()
        calls, began = 0, time.perf_counter()
        while calls < 2 or time.perf_counter() - began < self._most_seconds:
            run()
            calls += at_once
        return calls * self._seconds(rows, features_out, rate.typical) / (time.perf_counter() - began)

    @property
    def _most_seconds(self) -> float:
        """The most seconds that a look at one resource may take."""
        return min(MOST_SECONDS, SHARE * self.job_seconds)

    @staticmethod
    def _seconds(rows: float, features_out: int, rate: float) -> float:
        """Return the seconds that a product should take."""
        return 2 * rows * features_out * DENSE_SHAPES[0][1] / rate

    def _reading(self, path: Path) -> float:
        """Return the relative rate of the disk that weights stream from, past the page cache."""
        with opened(path, os.O_RDONLY) as file:
            rate, _ = read_rate(file, path.stat().st_size, self.machine.io_threads, CHECK_BLOCK_BYTES, seconds=self._most_seconds / 2)
        return rate / self.machine.disk_read.typical
