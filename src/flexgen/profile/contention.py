"""How much reading and computing slow each other down when a CPU does both: memory, caches and cores are shared."""

from __future__ import annotations

import os
import statistics
import threading
import time
from pathlib import Path

import torch

from flexgen.profile.compute import random_numbers
from flexgen.profile.disk import file_to_read, opened, read_rate
from flexgen.sizes import MIB

THREADS, BLOCK_BYTES, FILE_BYTES = 2, 8 * MIB, 128 * MIB
ROWS, WIDTH = 512, 2048
ROUNDS = 5


def slowdowns(folder: Path, dtype: torch.dtype, max_bytes: int, seconds: float) -> tuple[float, float]:
    """(of the disk by computing, of computing by the disk): time together over time apart, medians, each at least 1.

    What is read goes to a ring and what is multiplied comes from weights that no cache holds, as in a run.

    Args:
        folder: whose largest file of weights is read, or a temporary one. max_bytes: half for the ring, a quarter for weights.
    """
    with file_to_read(folder, min(FILE_BYTES, max_bytes)) as path:
        block, threads = min(BLOCK_BYTES, max_bytes // 4), THREADS
        number = max(max_bytes // 4 // (WIDTH * WIDTH * dtype.itemsize), 1)
        host = torch.device("cpu")
        weights = [random_numbers((WIDTH, WIDTH), host, dtype) for _ in range(number)]
        x = random_numbers((ROWS, WIDTH), host, dtype)
        disk: list[float] = []
        compute: list[float] = []
        with opened(path, os.O_RDONLY) as file:

            def read(results: list[float], length: float) -> None:
                results.append(read_rate(file, path.stat().st_size, threads, block, seconds=length, ring_bytes=max_bytes // 2)[0])

            share = seconds / ROUNDS / 3
            for _ in range(ROUNDS):
                alone: list[float] = []
                beside: list[float] = []
                read(alone, share)
                products = _products_per_second(x, weights, share)
                reader = threading.Thread(target=read, args=(beside, share), name="flexgen-measure-beside")
                reader.start()
                products_beside = _products_per_second(x, weights, share, until=reader)
                reader.join()
                disk.append(alone[0] / beside[0])
                compute.append(products / products_beside)
    return max(statistics.median(disk), 1.0), max(statistics.median(compute), 1.0)


def _products_per_second(x: torch.Tensor, weights: list[torch.Tensor], seconds: float, *, until: threading.Thread | None = None) -> float:
    """For a while, or as long as a thread lives."""
    began, number = time.perf_counter(), 0
    while (until.is_alive() if until is not None else time.perf_counter() - began < seconds) or number == 0:
        torch.nn.functional.linear(x, weights[number % len(weights)])
        number += 1
    return number / (time.perf_counter() - began)
