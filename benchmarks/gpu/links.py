"""Pinning, copies between host and device, a small copy behind a large one, reads into pinned memory, launches.  Prints JSON.

Without a GPU the same steps copy within host memory, so that the script can be tried out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from flexgen.base.quantities import GIB, KIB, MIB
from flexgen.devices.arena import HostArena
from flexgen.devices.cudart import cuda_runtime
from flexgen.io.direct_io import File
from flexgen.io.pool import IOPool

LARGE_BYTES, SMALL_BYTES, CHUNK_BYTES = 411 * 10**6, 1 * 10**6, 8 * MIB
OUTSTANDING = 2  # chunks that are submitted at a time
ROUNDS, LAUNCHES = 5, 2000


class Copies:
    """Copies on streams of their own; on a CPU they are done when they are started."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self.arena = HostArena(cuda_runtime() if self._cuda else None)
        self.where = torch.device("cuda" if self._cuda else "cpu")

    def stream(self) -> Callable[[], AbstractContextManager[Any]]:
        """Return a function that makes a new stream current within a `with` block."""
        if not self._cuda:
            return contextlib.nullcontext
        stream = torch.cuda.Stream()
        return lambda: torch.cuda.stream(stream)

    def start(self, destination: torch.Tensor, source: torch.Tensor) -> Callable[[], None]:
        """Start a copy on the current stream, and return a function that waits for its end."""
        destination.copy_(source, non_blocking=True)
        return torch.cuda.current_stream().record_event().synchronize if self._cuda else lambda: None

    def wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


def pinning(copies: Copies, size: int) -> tuple[torch.Tensor, dict[str, float]]:
    """Return pinned memory, and what pinning it took."""
    start = time.perf_counter()
    memory = copies.arena.allocate(size)
    return memory, {"seconds_per_gib": (time.perf_counter() - start) * GIB / size}


def rates(copies: Copies, host: torch.Tensor, device: torch.Tensor) -> dict[str, float]:
    """Return the bytes per second of copies in, out, and of both at once, in both directions together."""
    half = len(host) // 2
    inward, outward = copies.stream(), copies.stream()

    def into() -> None:
        with inward():
            copies.start(device[:half], host[:half])

    def out() -> None:
        with outward():
            copies.start(host[half : 2 * half], device[half : 2 * half])

    def both() -> None:
        into()
        out()

    return {name: times * half / _median(run, copies.wait) for name, run, times in (("in", into, 1), ("out", out, 1), ("both", both, 2))}


def behind(copies: Copies, host: torch.Tensor, device: torch.Tensor, small_bytes: int, how: str) -> float:
    """Return the seconds until a small copy has ended that is started right behind a large one.

    Args:
        how: "same" or "other" stream; "chunked" is another stream, with few chunks of the large copy submitted at a time.
    """
    large, other = copies.stream(), copies.stream()
    size = len(host) - small_bytes
    started = threading.Event()

    def bring() -> None:
        waiting: list[Callable[[], None]] = []
        step = CHUNK_BYTES if how == "chunked" else size
        with large():
            for at in range(0, size, step):
                if len(waiting) == OUTSTANDING:
                    waiting.pop(0)()
                waiting.append(copies.start(device[at : min(at + step, size)], host[at : min(at + step, size)]))
                if len(waiting) == OUTSTANDING or step == size:
                    started.set()
        started.set()

    def once() -> float:
        started.clear()
        copies.wait()
        thread = threading.Thread(target=bring)
        thread.start()
        started.wait()
        start = time.perf_counter()
        with (large if how == "same" else other)():
            end = copies.start(device[size:], host[size:])
        end()
        seconds = time.perf_counter() - start
        thread.join()
        return seconds

    return statistics.median(once() for _ in range(ROUNDS))


def reads(folder: Path, memory: torch.Tensor) -> dict[str, float]:
    """Return the bytes per second of reads past the page cache into pinned memory."""
    size = len(memory) // (4 * KIB) * (4 * KIB)
    path, view = folder / "links.bin", memory[:size].numpy().data
    try:
        with contextlib.closing(File(path, flags=os.O_RDWR | os.O_CREAT)) as file, contextlib.closing(IOPool(4)) as io:
            io.write([(file, 0, view)]).wait()
            file.sync()
            file.forget_cached()
            seconds = _median(lambda: io.read([(file, 0, view)]).wait(), rounds=3)
            return {"bytes_per_s": size / seconds, "direct": float(file.direct)}
    finally:
        path.unlink(missing_ok=True)


def launches(copies: Copies) -> dict[str, float]:
    """Return the microseconds of an operation on a few numbers: until it is submitted, and until the last of many has ended."""
    numbers = torch.zeros(16, device=copies.where)
    copies.wait()
    start = time.perf_counter()
    for _ in range(LAUNCHES):
        numbers.add_(1)
    submitted = time.perf_counter() - start
    copies.wait()
    ended = time.perf_counter() - start
    return {"submitted_us": submitted / LAUNCHES * 1e6, "ended_us": ended / LAUNCHES * 1e6}


def _median(run: Callable[[], object], wait: Callable[[], None] = lambda: None, rounds: int = ROUNDS) -> float:
    seconds: list[float] = []
    for _ in range(rounds + 1):  # the first is a warm-up
        wait()
        start = time.perf_counter()
        run()
        wait()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def measure(device: str, folder: Path, *, tiny: bool) -> Iterator[tuple[str, Any]]:
    """Yield the name of a measurement and its result, one after the other."""
    large, small = (16 * MIB, 256 * KIB) if tiny else (LARGE_BYTES, SMALL_BYTES)
    copies = Copies(device)
    with contextlib.closing(copies.arena):
        host, took = pinning(copies, large + small)
        yield "pinning", took
        there = torch.zeros(large + small, dtype=torch.uint8, device=copies.where)
        yield "bytes_per_s", rates(copies, host, there)
        yield "small_behind_large_s", {how: behind(copies, host, there, small, how) for how in ("same", "other", "chunked")}
        yield "disk", reads(folder, host)
        yield "operations", launches(copies)
        copies.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    print(json.dumps(dict(measure(asked.device, asked.folder, tiny=asked.tiny)), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
