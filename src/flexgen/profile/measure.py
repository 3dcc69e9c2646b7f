"""The best rates of this machine, measured in a few seconds: disk, memory, linear layers, attention, copies.

Of each setting the median of a few runs, of all settings and rounds the best: neighbours come and go, and an ideal is an
upper bound.  Keeps its buffers below `max_bytes`, since it may run inside a tight budget.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import errno
import functools
import hashlib
import json
import logging
import mmap
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from flexgen.errors import OptionError, StorageError
from flexgen.plan.machine import Machine
from flexgen.sizes import MIB

logger = logging.getLogger(__name__)

DIRECT_ALIGNMENT = 4096
DENSE_ROWS = (64, 128, 256, 512, 1024)
DENSE_SHAPES = ((4096, 4096), (8192, 3072))  # (out features, in features)
READ_THREADS = (1, 2, 4)
READ_SIZES = (4 * MIB, 8 * MIB, 16 * MIB)
FILE_BYTES = (128 * MIB, 256 * MIB)  # quick, or not
READ_SECONDS = (0.15, 0.3)  # of one setting; quick, or not
LARGE_FILE_BYTES = 256 * MIB
DISK_SHARE = 0.25  # of the free space, for the measured file


def measure(device: str, dtype: str, folder: Path, *, quick: bool = False, max_bytes: int = 128 * MIB) -> Machine:
    """Measure the machine; about 8 seconds, or 3 if `quick`.

    Args:
        device: "cpu", "cuda" or "sim" (computes on the CPU; its links are copies in host memory).
        dtype: a torch name; only this one is measured.
        folder: where weights stream from: its largest file is read (a temporary one where all are small), and a
            temporary file is written.
        max_bytes: most memory of all buffers alive at once.

    Raises:
        StorageError: the file system fails. OptionError: an unknown dtype.
    """
    torch_dtype = getattr(torch, dtype, None)
    if not isinstance(torch_dtype, torch.dtype):
        raise OptionError(f"dtype={dtype!r} is not a dtype of torch")
    started = time.perf_counter()
    share = 0.4 if quick else 1.0
    where = torch.device("cuda" if device == "cuda" else "cpu")
    with torch.inference_mode():
        disk_read, disk_write = _disk_rates(folder, quick, max_bytes)
        memory = _memory_rate(max_bytes, 0.5 * share)
        rows = _dense_rows(where, torch_dtype, max_bytes, 2.5 * share)
        attention = _attention_rate(where, torch_dtype, max_bytes, 1.0 * share)
        to_device, to_host = _copy_rates(device, max_bytes, 0.5 * share)
    _trim()
    logger.info("measured %s in %.1f s", device, time.perf_counter() - started)
    return Machine(
        name=_name(device),
        measured=datetime.datetime.now(datetime.UTC).date().isoformat(),
        cores=num_cores(),
        disk_read_bytes_per_s=disk_read,
        disk_write_bytes_per_s=disk_write,
        host_memory_bytes_per_s=memory,
        host_to_device_bytes_per_s=to_device,
        device_to_host_bytes_per_s=to_host,
        dense_flops={dtype: max(rate for _, rate in rows)},
        dense_rows={dtype: rows},
        attention_flops={dtype: attention},
    )


def cached_machine(
    device: str,
    dtype: str,
    folder: Path,
    *,
    cache_dir: Path | None = None,
    quick: bool = False,
    max_bytes: int = 128 * MIB,
    again: bool = False,
) -> Machine:
    """The machine as measured before, or measured now and kept.

    Kept per host, processor, cores, file system of `folder`, torch version, dtype and device; `again` measures anyway, and
    what was measured `quick` serves only those who ask for no more.

    Args:
        cache_dir: None is ~/.cache/flexgen.  A cache that cannot be read or written is done without.
    """
    key = machine_key(device, dtype, folder)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = (cache_dir or Path.home() / ".cache" / "flexgen") / f"machine-{digest}.json"
    if not again and (machine := _load(path, key, quick)) is not None:
        return machine
    machine = measure(device, dtype, folder, quick=quick, max_bytes=max_bytes)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps({"key": key, "quick": quick, "machine": json.loads(machine.to_json())}, indent=2))
        fresh.replace(path)
    except OSError as error:
        logger.warning("the machine's rates are not kept: %s", error)
    return machine


def machine_key(device: str, dtype: str, folder: Path) -> dict[str, str | int]:
    """What a measurement depends on."""
    return {
        "host": platform.node(),
        "processor": _processor(),
        "accelerator": torch.cuda.get_device_name() if device == "cuda" else "",
        "cores": num_cores(),
        "file_system": folder.stat().st_dev if folder.is_dir() else _writable(folder).stat().st_dev,
        "torch": torch.__version__,
        "dtype": dtype,
        "device": device,
        "version": 1,
    }


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _load(path: Path, key: dict[str, str | int], quick: bool) -> Machine | None:
    try:
        kept = json.loads(path.read_text())
        if kept["key"] != key or (kept["quick"] and not quick):
            return None
        return Machine.from_json(json.dumps(kept["machine"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OptionError) as error:
        logger.warning("%s is of no use and is measured again: %s", path, error)
        return None


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _name(device: str) -> str:
    name = f"{_processor()}, {num_cores()} cores"
    return f"{torch.cuda.get_device_name()}; {name}" if device == "cuda" else name


def _trim() -> None:
    """Give freed memory back to the system, where the C library can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _median_seconds(run: Callable[[], object], budget_seconds: float) -> float:
    """The median time of three calls, after one that is not counted; of fewer where they are slow."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 4 and (not times or time.perf_counter() - began < budget_seconds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:] or times)


def _best_rate(amount: float, run: Callable[[], object], seconds: float) -> float:
    """Amount per second, the best of the rounds that the time allows."""
    best, began = 0.0, time.perf_counter()
    while not best or time.perf_counter() - began < seconds:
        best = max(best, amount / _median_seconds(run, seconds))
    return best


# Disk


def _writable(folder: Path) -> Path:
    """The folder, or the system's temporary one where nothing can be written."""
    if folder.is_dir() and os.access(folder, os.W_OK):
        return folder
    logger.warning("%s cannot be written to: the disk of %s is measured instead", folder, tempfile.gettempdir())
    return Path(tempfile.gettempdir())


def _disk_rates(folder: Path, quick: bool, max_bytes: int) -> tuple[float, float]:
    """(read, write) bytes per second, past the page cache where the file system lets us.

    Weights are read from their own files where those are large; what is written goes where something can be written.
    """
    where = _writable(folder)
    free = os.statvfs(where)
    largest = max(READ_SIZES)
    size = min(FILE_BYTES[not quick], int(free.f_bavail * free.f_frsize * DISK_SHARE)) // largest * largest
    try:
        if size == 0 and (weights := _large_file(folder)) is not None:
            read = _best_read_rate(weights, quick, max_bytes)
            logger.warning("%s: no room to measure writes; they are taken to be as fast as reads", where)
            return read, read
        if size == 0:
            raise StorageError(f"{where}: no room for a file of 64 MiB to measure the disk with")
        with tempfile.NamedTemporaryFile(dir=where, prefix="flexgen-measure-") as file:
            with _opened(file.name, os.O_RDWR) as descriptor:
                write = _write_rate(descriptor, size, min(largest, max_bytes))
            return _best_read_rate(_large_file(folder) or file.name, quick, max_bytes), write
    except OSError as error:
        raise StorageError(f"{folder}: measuring the disk failed: {error}") from error


def _best_read_rate(path: str, quick: bool, max_bytes: int) -> float:
    """The best of all settings, the promising ones tried again."""
    settings = [(threads, block) for threads in READ_THREADS for block in READ_SIZES if threads * block <= max_bytes]
    with _opened(path, os.O_RDONLY) as descriptor:
        reader = functools.partial(_read_rate, descriptor, os.fstat(descriptor).st_size, seconds=READ_SECONDS[not quick])
        once = {setting: reader(*setting) for setting in settings or [(1, 1 * MIB)]}
        promising = sorted(once, key=once.__getitem__, reverse=True)[: 2 if quick else 3]
        return max(*once.values(), *(reader(*setting) for setting in promising for _ in range(2)))


def _large_file(folder: Path) -> str | None:
    """The largest file of weights, if it is large enough to read from for a while."""
    files = [path for path in folder.glob("*.safetensors") if path.is_file() and path.stat().st_size >= LARGE_FILE_BYTES]
    return str(max(files, key=lambda path: path.stat().st_size)) if files else None


@contextlib.contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    """A descriptor past the page cache, or a plain one where O_DIRECT is refused."""
    try:
        descriptor = os.open(path, flags | os.O_DIRECT)
        try:
            with mmap.mmap(-1, DIRECT_ALIGNMENT) as block:
                if flags & os.O_RDWR:
                    os.pwritev(descriptor, [block], 0)
                else:
                    os.preadv(descriptor, [block], 0)
        except OSError:
            os.close(descriptor)
            raise
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
        descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write_rate(descriptor: int, size: int, block: int) -> float:
    with mmap.mmap(-1, block) as buffer:
        # Numbers that no file system can compress or share.
        noise = os.urandom(1 * MIB)
        for start in range(0, block, len(noise)):
            buffer[start : start + len(noise)] = noise[: min(len(noise), block - start)]
        began = time.perf_counter()
        for offset in range(0, size, block):
            buffer[: len(noise) // 2] = noise[len(noise) // 2 :] if offset // block % 2 else noise[: len(noise) // 2]
            _whole(os.pwritev, descriptor, buffer, min(block, size - offset), offset)
        os.fsync(descriptor)
        return size / (time.perf_counter() - began)


def _read_rate(descriptor: int, size: int, threads: int, block: int, *, seconds: float) -> float:
    """Bytes per second of `threads` readers that share the file's blocks, from its beginning, for a while."""
    with contextlib.suppress(OSError):
        os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_DONTNEED)
    blocks = max(size // block, 1)
    block = min(block, size)
    errors: list[OSError] = []
    counts = [0] * threads

    def read(number: int) -> None:
        with mmap.mmap(-1, block) as buffer:
            buffer.write(bytes(block))  # faulted in before the clock starts
            ready.wait()
            began = time.perf_counter()
            try:
                while time.perf_counter() - began < seconds:
                    at = (number + counts[number] * threads) % blocks
                    _whole(os.preadv, descriptor, buffer, block, at * block)
                    counts[number] += 1
            except OSError as error:
                errors.append(error)

    ready = threading.Barrier(threads + 1)
    readers = [threading.Thread(target=read, args=(number,), name=f"flexgen-measure-{number}") for number in range(threads)]
    for reader in readers:
        reader.start()
    ready.wait()
    began = time.perf_counter()
    for reader in readers:
        reader.join()
    if errors:
        raise errors[0]
    return sum(counts) * block / (time.perf_counter() - began)


def _whole(transfer: Callable[[int, list[memoryview], int], int], descriptor: int, buffer: mmap.mmap, size: int, offset: int) -> None:
    """A transfer of exactly `size` bytes."""
    with memoryview(buffer) as view:
        done = 0
        while done < size:
            with view[done:size] as rest:
                moved = transfer(descriptor, [rest], offset + done)
            if moved <= 0:
                raise OSError(errno.EIO, "a transfer ended early")
            done += moved


# Memory, compute, links


def _memory_rate(max_bytes: int, seconds: float) -> float:
    """Bytes per second that all cores read together."""
    data = torch.ones(max_bytes // 4, dtype=torch.float32)
    return max(_best_rate(data.nbytes, run, seconds / 2) for run in (data.sum, data.max))


def _dense_rows(where: torch.device, dtype: torch.dtype, max_bytes: int, seconds: float) -> list[tuple[int, float]]:
    """(rows, FLOP/s) of linear layers, each the best over shapes and rounds."""
    best = dict.fromkeys(DENSE_ROWS, 0.0)
    began, rounds = time.perf_counter(), 0
    while not rounds or time.perf_counter() - began < seconds / 2:  # the next round takes as long as those before
        for shape in DENSE_SHAPES:
            features_out, features_in = _shrunken(shape, dtype.itemsize, max_bytes // 3)  # the library may pack it once more
            weight = _random((features_out, features_in), where, dtype)
            for rows in DENSE_ROWS:
                if best[DENSE_ROWS[0]] and time.perf_counter() - began > 2 * seconds:
                    break
                if rows * (features_in + features_out) * dtype.itemsize > max_bytes // 3:
                    break
                x = _random((rows, features_in), where, dtype)
                taken = _median_seconds(lambda x=x, weight=weight: _wait(torch.nn.functional.linear(x, weight)), seconds / 15)
                best[rows] = max(best[rows], 2 * rows * features_in * features_out / taken)
            del weight
        rounds += 1
    return [(rows, rate) for rows, rate in best.items() if rate]


def _random(shape: tuple[int, ...], where: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=where).uniform_(-1, 1)


def _shrunken(shape: tuple[int, int], item_bytes: int, max_bytes: int) -> tuple[int, int]:
    """The shape, its outputs halved until it fits."""
    features_out, features_in = shape
    while features_out * features_in * item_bytes > max_bytes and features_out > 256:
        features_out //= 2
    return features_out, features_in


def _attention_rate(where: torch.device, dtype: torch.dtype, max_bytes: int, seconds: float) -> float:
    """FLOP/s of causal attention over the visible pairs: the better of torch's own and of plain matrix products."""
    heads, width, best = 16, 128, 0.0
    for tokens in (256, 512, 1024):
        if best and 10 * heads * tokens * width * max(dtype.itemsize, 4) > max_bytes:
            continue
        q, k, v = (_random((1, heads, tokens, width), where, dtype) for _ in range(3))  # (1, heads, tokens, width)
        flops = 4 * width * heads * tokens * (tokens + 1) / 2

        def ready(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> None:
            _wait(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))

        def plain(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> None:
            _wait(_plain_attention(q[0], k[0], v[0]))

        best = max(best, _best_rate(flops, ready, seconds / 6), _best_rate(flops, plain, seconds / 6))
    return best


def _plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int = 256) -> torch.Tensor:
    """Causal attention as two products per block of queries, each against the keys up to it; (heads, tokens, width)."""
    parts: list[torch.Tensor] = []
    for start in range(0, q.shape[1], block):
        end = min(start + block, q.shape[1])
        scores = torch.bmm(q[:, start:end], k[:, :end].transpose(1, 2)).mul_(q.shape[2] ** -0.5)  # (heads, block, end)
        hidden = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu_(1)
        scores[:, :, start:].masked_fill_(hidden, -torch.inf)
        parts.append(torch.bmm(scores.softmax(-1), v[:, :end]))
    return torch.cat(parts, 1)


def _copy_rates(device: str, max_bytes: int, seconds: float) -> tuple[float | None, float | None]:
    """(host to device, device to host) bytes per second; None without a separate device."""
    if device == "cpu":
        return None, None
    size = min(max_bytes // 2, 64 * MIB)
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device == "cuda").fill_(1)
    other = torch.empty(size, dtype=torch.uint8, device="cuda" if device == "cuda" else "cpu").fill_(1)
    to_device = _best_rate(size, lambda: _wait(other.copy_(host)), seconds / 2)
    to_host = _best_rate(size, lambda: _wait(other, host.copy_(other)), seconds / 2)
    return to_device, to_host


def _wait(result: torch.Tensor, *_: torch.Tensor) -> None:
    """Until what was launched on the result's device is done."""
    if result.is_cuda:
        torch.cuda.synchronize()
