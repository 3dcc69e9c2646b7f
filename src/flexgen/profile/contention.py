"""Measures how much reading and computing slow each other down on a CPU, where they share memory, caches and cores."""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from flexgen.base.quantities import MIB
from flexgen.profile.compute import random_numbers, steps
from flexgen.profile.disk import file_to_read, opened, read_rate

THREADS, RING_BLOCK_BYTES, FILE_BYTES = 2, 8 * MIB, 128 * MIB
MANY_ROWS, FEW_ROWS, WIDTH = 512, 16, 2048


def slowdowns(folder: Path, dtype: torch.dtype, max_bytes: int, seconds: float, *, rounds: int) -> tuple[float, float]:
    """Measure how much longer reading and computing take together than apart.

    The results are means over three kinds of work: products of many rows, products of few rows, attention of next tokens.  Data is read
    into a ring, and what is computed with comes from memory that no cache holds, as in a run.

    Args:
        folder: Folder whose largest file of weights is read; where it has none, a temporary file.
        dtype: Dtype that is computed in.
        max_bytes: Memory to use: half for the ring, a quarter for the rest.
        seconds: Time that all measurements take.
        rounds: Number of measurements of each kind of work.

    Returns:
        The slowdown of the disk by computing, and of computing by the disk, each at least 1.
    """
    disk: list[float] = []
    compute: list[float] = []
    with file_to_read(folder, min(FILE_BYTES, max_bytes)) as path, opened(path, os.O_RDONLY) as file:

        def read(results: list[float], length: float) -> None:
            block = min(RING_BLOCK_BYTES, max_bytes // 4)
            results.append(read_rate(file, path.stat().st_size, THREADS, block, seconds=length, ring_bytes=max_bytes // 2)[0])

        kinds = (_products(MANY_ROWS, dtype, max_bytes // 4), _products(FEW_ROWS, dtype, max_bytes // 4), steps(dtype, max_bytes // 4))
        for kind in kinds:
            with kind as work:
                found = [_round(read, work, seconds / len(kinds) / rounds / 3) for _ in range(rounds)]
            disk.append(max(statistics.median(each for each, _ in found), 1.0))
            compute.append(max(statistics.median(each for _, each in found), 1.0))
    return statistics.mean(disk), statistics.mean(compute)


def _round(read: Callable[[list[float], float], None], work: Callable[[], None], length: float) -> tuple[float, float]:
    """Measure both slowdowns once."""
    alone: list[float] = []
    beside: list[float] = []
    read(alone, length)
    rate = _per_second(work, length)
    reader = threading.Thread(target=read, args=(beside, length), name="flexgen-measure-beside")
    reader.start()
    rate_beside = _per_second(work, length, until=reader)
    reader.join()
    return alone[0] / beside[0], rate / rate_beside


@contextlib.contextmanager
def _products(rows: int, dtype: torch.dtype, max_bytes: int) -> Iterator[Callable[[], None]]:
    """Yield a function that computes a linear layer, each time with other weights."""
    host = torch.device("cpu")
    weights = [random_numbers((WIDTH, WIDTH), host, dtype) for _ in range(max(max_bytes // (WIDTH * WIDTH * dtype.itemsize), 1))]
    x = random_numbers((rows, WIDTH), host, dtype)
    number = 0

    def once() -> None:
        nonlocal number
        torch.nn.functional.linear(x, weights[number % len(weights)])
        number += 1

    yield once


def _per_second(work: Callable[[], None], seconds: float, *, until: threading.Thread | None = None) -> float:
    """Return how often the work is done per second, over some seconds or as long as a thread lives."""
    began, number = time.perf_counter(), 0
    while (until.is_alive() if until is not None else time.perf_counter() - began < seconds) or number == 0:
        work()
        number += 1
    return number / (time.perf_counter() - began)
