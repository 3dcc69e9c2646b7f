"""Measures how much what goes on at the same time slows each other down beside a device: copies, attention on the host, reading."""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from flexgen.base.quantities import MIB
from flexgen.devices.base import Device, Event
from flexgen.profile.compute import steps
from flexgen.profile.contention import FILE_BYTES, RING_BLOCK_BYTES, THREADS
from flexgen.profile.disk import file_to_read, opened, read_rate

COPY_BYTES = 32 * MIB

Worker = Callable[[float], float]  # works for so many seconds, and returns what it did per second


@dataclass(frozen=True, slots=True, kw_only=True)
class Slowdowns:
    """How many times longer each takes beside the other, at least 1; the fields of `Machine` of the same names.

    Attributes:
        duplex: A copy in one direction beside copies in the other.
        link: Copies to the device beside attention on the host.
        host: Attention on the host beside copies to the device.
        disk: Reading beside attention on the host.
        compute: Attention on the host beside reading.
    """

    duplex: float
    link: float
    host: float
    disk: float
    compute: float


def slowdowns_beside(device: Device, folder: Path, dtype: torch.dtype, max_bytes: int, seconds: float, *, rounds: int) -> Slowdowns:
    """Measure all pairs.

    Args:
        device: The device, whose budget holds three copies of COPY_BYTES, or of a sixth of `max_bytes`.
        folder: Folder whose largest file of weights is read; where it has none, a temporary file.
        dtype: Dtype that the host attends in.
        max_bytes: Host memory to use: half for copies or for what is read, a quarter for attention.
        seconds: Time that all measurements take.
        rounds: Number of measurements of each pair.
    """
    length = seconds / rounds / 9  # of three measurements of three pairs
    size = min(COPY_BYTES, max_bytes // 6)
    with steps(dtype, max_bytes // 4) as attend, _reading(folder, max_bytes // 2) as read:
        copy_in, copy_out = _copying_in(device, size), _copying_out(device, size)
        attention = repeated(attend)
        both = slowdown_of_each(copy_in, copy_out, length, rounds)
        link, host = slowdown_of_each(copy_in, attention, length, rounds)
        disk, compute = slowdown_of_each(read, attention, length, rounds)
    return Slowdowns(duplex=statistics.mean(both), link=link, host=host, disk=disk, compute=compute)


def slowdown_of_each(one: Worker, other: Worker, seconds: float, rounds: int) -> tuple[float, float]:
    """Return how many times longer each of two workers takes beside the other: medians of several rounds, at least 1."""
    found: list[tuple[float, float]] = []
    for _ in range(rounds):
        alone = one(seconds), other(seconds)
        together = at_once(one, other, seconds)
        found.append((alone[0] / together[0], alone[1] / together[1]))
    first, second = (max(statistics.median(each), 1.0) for each in zip(*found, strict=True))
    return first, second


def at_once(one: Worker, other: Worker, seconds: float) -> tuple[float, float]:
    """Let both work at the same time, and return what each did per second."""
    ready, rates = threading.Barrier(2), dict[str, float]()

    def work(name: str, worker: Worker) -> None:
        ready.wait()
        rates[name] = worker(seconds)

    thread = threading.Thread(target=work, args=("other", other), name="flexgen-measure-beside")
    thread.start()
    work("one", one)
    thread.join()
    return rates["one"], rates["other"]


def repeated(run: Callable[[], object], amount: float = 1.0) -> Worker:
    """Return a worker that does the same again and again, each time so much."""

    def work(seconds: float) -> float:
        began, number = time.perf_counter(), 0
        while number == 0 or time.perf_counter() - began < seconds:
            run()
            number += 1
        return amount * number / (time.perf_counter() - began)

    return work


def _copying_in(device: Device, size: int) -> Worker:
    source, targets = device.allocate_host(size).fill_(1), [device.allocate(size) for _ in range(2)]
    return repeated(_one_ahead(lambda number: device.copy_in(targets[number % 2], source)), size)


def _copying_out(device: Device, size: int) -> Worker:
    source, targets = device.allocate(size), [device.allocate_host(size) for _ in range(2)]
    return repeated(_one_ahead(lambda number: device.copy_out(targets[number % 2], source)), size)


def _one_ahead(copy: Callable[[int], Event]) -> Callable[[], None]:
    """Return a function that starts a copy and waits for the one before it; `copy` gets the number of each."""
    number, before = 0, list[Event]()

    def run() -> None:
        nonlocal number
        before.append(copy(number))
        number += 1
        if len(before) > 1:
            before.pop(0).wait()

    return run


@contextlib.contextmanager
def _reading(folder: Path, ring_bytes: int) -> Iterator[Worker]:
    """Yield a worker that reads the folder's weights into a ring, as a pass does."""
    block = min(RING_BLOCK_BYTES, ring_bytes // 2)
    with file_to_read(folder, min(FILE_BYTES, 2 * ring_bytes)) as path, opened(path, os.O_RDONLY) as file:
        yield lambda seconds: read_rate(file, path.stat().st_size, THREADS, block, seconds=seconds, ring_bytes=ring_bytes)[0]
