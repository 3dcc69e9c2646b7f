"""Measures how fast a folder's file system reads and writes past the page cache."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flexgen.base.quantities import KIB, MIB
from flexgen.errors import StorageError, no_room
from flexgen.io.aligned import AlignedBuffer
from flexgen.io.direct_io import File
from flexgen.io.pool import IOPool
from flexgen.plan.machine import DiskRequest, Rate

logger = logging.getLogger(__name__)

READ_THREADS = (1, 2, 4)
READ_SIZES = (4 * MIB, 8 * MIB, 16 * MIB)
FILE_BYTES = (128 * MIB, 256 * MIB)  # quick, or not
READ_SECONDS = (0.15, 0.3)  # of one setting; quick, or not
# Volumes with a limit let some time's worth through at once; a run of hours reads at the rate that comes after it.
SUSTAINED_BYTES, LEAST_SUSTAINED_SECONDS, MOST_SUSTAINED_SECONDS, SUSTAINED_SHARE = 1024 * MIB, 0.6, (3.0, 6.0), 0.95
LARGE_FILE_BYTES = 256 * MIB
# Small requests: as large as a page of KV, so many at once, so often.
SMALL_BYTES, REQUESTS, REQUEST_ROUNDS = 32 * KIB, 500, 3
LEAST_REQUEST_SECONDS = 1e-6
FREE_SHARE = 0.25  # of the free space, for the measured file


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRates:
    """Rates of a file system past the page cache, where it allows that.

    Attributes:
        read: Bytes per second.
        write: Bytes per second.
        core_seconds_per_byte: Processor time of reading a byte.
        request: Fixed costs of a request.
    """

    read: Rate
    write: Rate
    core_seconds_per_byte: float
    request: DiskRequest


def disk_rates(folder: Path, quick: bool, max_bytes: int, io_threads: int) -> DiskRates:
    """Measure the file system of a folder.

    Weights are read from their own files where those are large; writes go to a folder that can be written.

    Args:
        folder: The folder.
        quick: Whether to measure less.
        max_bytes: Most memory to use.
        io_threads: Number of threads that will read and write, on which the cost of small requests depends.

    Raises:
        StorageError: The disk cannot be measured.
    """
    where = writable(folder)
    free = os.statvfs(where)
    largest = max(READ_SIZES)
    size = min(FILE_BYTES[not quick], int(free.f_bavail * free.f_frsize * FREE_SHARE)) // largest * largest
    try:
        if size == 0 and (weights := large_file(folder)) is not None:
            read, core_seconds = _read_rates(weights, quick, max_bytes)
            logger.warning("%s: no room to measure writes; they are taken to be as fast as reads", where)
            with opened(weights, os.O_RDONLY) as read_only:
                request = _request_cost(read_only, weights.stat().st_size, read.typical, io_threads, writes=False)
            return DiskRates(read=read, write=read, core_seconds_per_byte=core_seconds, request=request)
        if size == 0:
            raise StorageError(f"{where}: no room for a file of 64 MiB to measure the disk with") from no_room()
        with tempfile.NamedTemporaryFile(dir=where, prefix="flexgen-measure-") as file:
            with opened(Path(file.name), os.O_RDWR) as written:
                write = Rate.of([_write_rate(written, size, min(largest, max_bytes)) for _ in range(2 if quick else 4)])
                request = _request_cost(written, size, write.typical, io_threads, writes=True)
            read, core_seconds = _read_rates(large_file(folder) or Path(file.name), quick, max_bytes)
            return DiskRates(read=read, write=write, core_seconds_per_byte=core_seconds, request=request)
    except OSError as error:
        raise StorageError(f"{folder}: measuring the disk failed: {error}") from error


def writable(folder: Path) -> Path:
    """Return the folder, or the system's temporary one if the folder cannot be written."""
    if folder.is_dir() and os.access(folder, os.W_OK):
        return folder
    logger.warning("%s cannot be written to: the disk of %s is measured instead", folder, tempfile.gettempdir())
    return Path(tempfile.gettempdir())


def _read_rates(path: Path, quick: bool, max_bytes: int) -> tuple[Rate, float]:
    """Measure reading with several settings, the promising ones repeatedly.

    Returns:
        The rate of the best setting, with the best rate of all; and its processor seconds per byte.
    """
    settings = [(threads, block) for threads in READ_THREADS for block in READ_SIZES if threads * block <= max_bytes] or [(1, 1 * MIB)]
    with opened(path, os.O_RDONLY) as file:
        size = path.stat().st_size
        tried: dict[tuple[int, int], list[tuple[float, float]]] = {setting: [] for setting in settings}

        def again(setting: tuple[int, int]) -> None:
            tried[setting].append(read_rate(file, size, *setting, seconds=READ_SECONDS[not quick]))

        for setting in settings:
            again(setting)
        for setting in sorted(settings, key=lambda each: tried[each][0][0], reverse=True)[: 2 if quick else 3]:
            for _ in range(2 if quick else 4):
                again(setting)
        rounds = {setting: Rate.of([rate for rate, _ in each]) for setting, each in tried.items()}
        repeated = [setting for setting, each in tried.items() if len(each) > 1] or settings
        chosen = max(repeated, key=lambda setting: rounds[setting].typical)
        best, typical = max(each.best for each in rounds.values()), rounds[chosen].typical
        long = min(max(SUSTAINED_BYTES / typical, LEAST_SUSTAINED_SECONDS), MOST_SUSTAINED_SECONDS[not quick])
        sustained = sustained_rate(file, size, *chosen, seconds=long)
    if sustained < SUSTAINED_SHARE * typical:
        best = typical = sustained
    rate = Rate(best=best, typical=typical, spread=rounds[chosen].spread)
    return rate, sorted(seconds for _, seconds in tried[chosen])[len(tried[chosen]) // 2]


def large_file(folder: Path) -> Path | None:
    """Return the largest file of weights that is large enough to read from for a while; None if there is none."""
    files = [path for path in folder.glob("*.safetensors") if path.is_file() and path.stat().st_size >= LARGE_FILE_BYTES]
    return max(files, key=lambda path: path.stat().st_size, default=None)


@contextlib.contextmanager
def file_to_read(folder: Path, num_bytes: int) -> Iterator[Path]:
    """Yield the folder's largest file of weights, or a temporary one of random bytes where all are small."""
    if (weights := large_file(folder)) is not None:
        yield weights
        return
    with tempfile.NamedTemporaryFile(dir=writable(folder), prefix="flexgen-measure-") as file:
        file.write(os.urandom(MIB) * (num_bytes // MIB))
        file.flush()
        os.fsync(file.fileno())
        yield Path(file.name)


def opened(path: Path, flags: int) -> contextlib.closing[File]:
    """Open a file past the page cache where possible, without the warning where it is not; the engine gives that."""
    return contextlib.closing(File(path, flags=flags, on_plain=lambda folder, why: None))


def _write_rate(file: File, size: int, block: int) -> float:
    buffer = AlignedBuffer(block).view
    # Numbers that no file system can compress or share.
    noise = os.urandom(1 * MIB)
    for start in range(0, block, len(noise)):
        buffer[start : start + len(noise)] = noise[: min(len(noise), block - start)]
    began = time.perf_counter()
    for offset in range(0, size, block):
        buffer[: len(noise) // 2] = noise[len(noise) // 2 :] if offset // block % 2 else noise[: len(noise) // 2]
        file.write_from(buffer[: min(block, size - offset)], offset)
    file.sync()
    return size / (time.perf_counter() - began)


def _request_cost(file: File, size: int, rate: float, num_threads: int, *, writes: bool) -> DiskRequest:
    """Measure the fixed cost of small requests all over the file, made as the engine makes them.

    Half of them are writes if `writes`; the time that their bytes take is subtracted.
    """
    buffer = AlignedBuffer(num_threads * SMALL_BYTES).view
    draw = random.Random(0)
    seconds: list[float] = []
    core_seconds: list[float] = []
    with contextlib.closing(IOPool(num_threads)) as io:
        for number in range(REQUEST_ROUNDS * (1 + writes)):
            parts = [
                (file, draw.randrange(size // SMALL_BYTES) * SMALL_BYTES, buffer[at % num_threads * SMALL_BYTES :][:SMALL_BYTES])
                for at in range(REQUESTS)
            ]
            began, worked = time.perf_counter(), time.process_time()
            (io.write if writes and number % 2 else io.read)(parts).wait()
            seconds.append((time.perf_counter() - began) / REQUESTS)
            core_seconds.append((time.process_time() - worked) / REQUESTS)
    return DiskRequest(
        seconds=max(statistics.median(seconds) - SMALL_BYTES / rate, LEAST_REQUEST_SECONDS), core_seconds=statistics.median(core_seconds)
    )


def read_rate(file: File, size: int, threads: int, block: int, *, seconds: float, ring_bytes: int = 0) -> tuple[float, float]:
    """Measure readers that share the file's blocks, from its beginning, for a while.

    Args:
        file: The file.
        size: Size of the file.
        threads: Number of readers.
        block: Bytes of a read.
        seconds: How long to read.
        ring_bytes: Memory that is read into, in turn; at least a block per thread, which caches may hold.

    Returns:
        Bytes per second, and processor seconds per byte.
    """
    done = _read_for(file, size, threads, block, seconds, ring_bytes)
    return done.rate, done.core_seconds / done.num_bytes


def sustained_rate(file: File, size: int, threads: int, block: int, *, seconds: float) -> float:
    """Measure the bytes per second of the second half of the time, after what a limited volume lets through at first.

    Args:
        file, size, threads, block, seconds: As for `read_rate`.
    """
    done = _read_for(file, size, threads, block, seconds, 0)
    # Between one end of a request and another, a reader has read whole blocks.
    late = [[each for each in times if each - done.began >= seconds / 2] for times in done.completed]
    if all(len(times) > 1 for times in late):
        return sum((len(times) - 1) * done.block / (times[-1] - times[0]) for times in late)
    return done.rate


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reads:
    """What some readers have read.

    Attributes:
        block: Bytes of a request.
        began: The time when all readers began.
        completed: For each reader, the times when its requests were complete.
        core_seconds: Processor seconds of all.
    """

    block: int
    began: float
    completed: list[list[float]]
    core_seconds: float

    @property
    def num_bytes(self) -> int:
        return max(sum(map(len, self.completed)) * self.block, 1)

    @property
    def rate(self) -> float:
        """Bytes per second from the begin to the end of the last request."""
        return self.num_bytes / (max(times[-1] for times in self.completed if times) - self.began)


def _read_for(file: File, size: int, threads: int, block: int, seconds: float, ring_bytes: int) -> _Reads:
    """Let readers read for so many seconds; arguments are those of `read_rate`."""
    file.forget_cached()
    blocks = max(size // block, 1)
    block = min(block, size)
    errors: list[StorageError] = []
    completed: list[list[float]] = [[] for _ in range(threads)]

    slots = max(ring_bytes // (threads * block), 1)
    buffers = AlignedBuffer(slots * threads * block)
    buffers.tensor.zero_()  # faulted in before the clock starts

    def read(number: int) -> None:
        ready.wait()
        began, ends = time.perf_counter(), completed[number]
        try:
            while time.perf_counter() - began < seconds:
                at, slot = (number + len(ends) * threads) % blocks, number * slots + len(ends) % slots
                file.read_into(buffers.view[slot * block : (slot + 1) * block], at * block)
                ends.append(time.perf_counter())
        except StorageError as error:
            errors.append(error)

    ready = threading.Barrier(threads + 1)
    readers = [threading.Thread(target=read, args=(number,), name=f"flexgen-measure-{number}") for number in range(threads)]
    for reader in readers:
        reader.start()
    ready.wait()
    began, worked = time.perf_counter(), time.process_time()
    for reader in readers:
        reader.join()
    if errors:
        raise errors[0]
    return _Reads(block=block, began=began, completed=completed, core_seconds=time.process_time() - worked)
