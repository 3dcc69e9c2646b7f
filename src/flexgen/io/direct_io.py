"""Aligned O_DIRECT reads and writes on a few named threads.  Knows files and bytes, nothing of tensors' meaning.

A read is a list of (file, offset, size, destination); it completes as one ticket.  Where a file system refuses
O_DIRECT, plain reads take over and that is said once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flexgen.base.failpoints import failpoint
from flexgen.base.quantities import align_up
from flexgen.errors import StorageError
from flexgen.io.checksums import BlockSums

logger = logging.getLogger(__name__)

ALIGNMENT = 4096
CHUNK_BYTES = 8 << 20
HUGE_PAGE = 2 << 20
SMALLEST_HUGE_BYTES = 4 * HUGE_PAGE


class AlignedBuffer:
    """Page-aligned anonymous host memory, as a uint8 tensor and as a memoryview.

    Large buffers ask for huge pages: a direct read then pins and maps 512 times fewer pages, which is most of its CPU time.
    The memory goes back when the last view of it is gone.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = max(align_up(size_bytes, ALIGNMENT), ALIGNMENT)
        huge = self.size_bytes >= SMALLEST_HUGE_BYTES
        self._map = mmap.mmap(-1, self.size_bytes + (HUGE_PAGE if huge else 0), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = 0
        if huge:
            start = -torch.frombuffer(self._map, dtype=torch.uint8, count=1).data_ptr() % HUGE_PAGE
            with contextlib.suppress(OSError):  # a kernel without huge pages
                self._map.madvise(mmap.MADV_HUGEPAGE, start, self.size_bytes - self.size_bytes % HUGE_PAGE)
        self.view = memoryview(self._map)[start : start + self.size_bytes]
        self.tensor = torch.frombuffer(self.view, dtype=torch.uint8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """A byte range of a file, aligned at both ends, and where it goes in a staging buffer."""

    path: Path
    offset: int
    size: int
    position: int


class Ticket:
    """Completion of a group of transfers.  Thread-safe."""

    def __init__(self, parts: int, on_done: Callable[[], None] | None = None) -> None:
        self._left = parts
        self._lock = threading.Lock()
        self._event = threading.Event()
        self._on_done = on_done
        self.error: BaseException | None = None
        if parts == 0:
            self._event.set()

    def part_done(self, error: BaseException | None = None) -> None:
        with self._lock:
            self._left -= 1
            self.error = self.error or error
            last = self._left == 0
        if last:
            on_done, self._on_done = self._on_done, None  # a kept ticket keeps no buffer alive
            self._event.set()
            if on_done is not None:
                on_done()

    def done(self) -> bool:
        return self._event.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """True once everything has completed.

        Raises:
            StorageError: when a part failed.
        """
        finished = self._event.wait(timeout)
        if finished and self.error is not None:
            raise self.error if isinstance(self.error, StorageError) else StorageError(str(self.error)) from self.error
        return finished

    def settle(self) -> None:
        """Return once everything has completed or failed."""
        self._event.wait()


def _warn_of_plain(folder: Path, why: str) -> None:
    logger.warning("%s: the file system %s; plain reads go through the page cache and are slower", folder, why)


class File:
    """An open file that is read, or read and written, at offsets; O_DIRECT where the file system takes it.

    Args:
        verify: compare whatever is read with what was written, or read before.
        on_plain: told (folder, reason) when O_DIRECT is refused.
    """

    def __init__(
        self,
        path: Path,
        *,
        flags: int = os.O_RDONLY,
        direct: bool = True,
        unlinked: bool = False,
        verify: bool = False,
        on_plain: Callable[[Path, str], None] = _warn_of_plain,
    ) -> None:
        self.path, self._on_plain = path, on_plain
        self._lock = threading.Lock()
        self.direct = direct
        try:
            self._fd = self._open(flags, direct)
        except OSError as error:
            raise StorageError(f"cannot open {path}: {error.strerror}") from error
        self._opened_bytes = os.fstat(self._fd).st_size
        if unlinked:
            path.unlink()
        self._sums = BlockSums(self._opened_bytes) if verify else None
        self._state = self._find_state()

    def _open(self, flags: int, direct: bool) -> int:
        mode = 0o600
        try:
            return os.open(self.path, flags | (os.O_DIRECT if direct else 0) | os.O_CLOEXEC, mode)
        except OSError as error:
            if not direct or error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        if flags & os.O_EXCL:
            self.path.unlink(missing_ok=True)  # Linux creates the file before it refuses the flag
        fd = os.open(self.path, flags | os.O_CLOEXEC, mode)
        self.direct = False
        self._on_plain(self.path.parent, "refuses O_DIRECT")
        return fd

    def will_read(self, offset: int, size: int) -> None:
        """Let the page cache fetch this meanwhile; for files that are read through it."""
        with contextlib.suppress(OSError):  # a hint
            os.posix_fadvise(self._fd, offset, size, os.POSIX_FADV_WILLNEED)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset`; bytes past the end that the file had when opened are left as they are.

        Raises:
            StorageError: on an I/O error, when the file has become shorter, or twice reads otherwise than before.
        """
        self._fill(view, offset)
        if self._sums is None:
            return
        size = max(min(len(view), self._opened_bytes - offset), 0)
        if self._sums.agree(view[:size], offset):
            return
        logger.warning("%s at %d: %d bytes are not what they were; reading them again", self.path, offset, size)
        self._fill(view, offset)
        if not self._sums.agree(view[:size], offset):
            raise StorageError(f"{self.path} at {offset}: {size} bytes are not what they were when they were written or first read")

    def _fill(self, view: memoryview, offset: int) -> None:
        end = min(offset + len(view), self._opened_bytes)
        while len(view):
            count, direct = self._transfer(os.preadv, "reading", view, offset)
            view, offset = view[count:], offset + count
            if count == 0 or (direct and count % ALIGNMENT):  # a short direct read ends at the end of the file
                break
        if offset < end:
            raise StorageError(f"{self.path} has become shorter while it was in use: it ends at {offset}")

    def write_from(self, view: memoryview, offset: int) -> None:
        """Write all of `view` at `offset`.

        Raises:
            StorageError: on an I/O error or a full disk.
        """
        written, start = view, offset
        while len(view):
            count, _ = self._transfer(os.pwritev, "writing", view, offset)
            view, offset = view[count:], offset + count
        if self._sums is not None:
            self._sums.note(written, start)

    def _transfer(self, call: Callable[[int, list[memoryview], int], int], what: str, view: memoryview, offset: int) -> tuple[int, bool]:
        """(bytes moved by one system call, whether it was a direct one); repeated when interrupted or O_DIRECT is refused."""
        while True:
            direct = self.direct
            try:
                failpoint("disk.read" if call is os.preadv else "disk.write")
                return call(self._fd, [view], offset), direct
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno == errno.EINVAL and direct:
                    self._become_plain()
                    continue
                raise StorageError(f"{what} {self.path} at {offset}: {error.strerror}") from error

    def _become_plain(self) -> None:
        """Drop O_DIRECT from the open file; several threads may find it refused at once."""
        with self._lock:
            if not self.direct:
                return
            flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            self.direct = False
        self._on_plain(self.path.parent, "refuses O_DIRECT at these offsets")

    def _find_state(self) -> tuple[int, int]:
        found = os.fstat(self._fd)
        return found.st_size, found.st_mtime_ns

    def check_unchanged(self) -> None:
        """Raises StorageError when somebody wrote to the file since it was opened here for reading."""
        if self._find_state() != self._state:
            raise StorageError(f"{self.path} changed while it was being read")

    def truncate(self, size_bytes: int) -> None:
        """Give a new file its size; it reads as zeros.  Raises StorageError where it cannot be so large."""
        try:
            os.ftruncate(self._fd, size_bytes)
        except OSError as error:
            raise StorageError(f"{self.path} cannot have {size_bytes} bytes: {error.strerror}") from error
        self._opened_bytes = size_bytes
        if self._sums is not None:
            self._sums = BlockSums(size_bytes, known=True)

    def sync(self) -> None:
        """Raises StorageError when what was written cannot be made durable."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise StorageError(f"syncing {self.path}: {error.strerror}") from error

    def forget_cached(self) -> None:
        """Have the system drop what it caches of the file, as far as it likes."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        os.close(self._fd)


@dataclass(frozen=True, slots=True)
class _Job:
    file: File
    offset: int
    view: memoryview
    ticket: Ticket
    write: bool


class IOPool:
    """Threads that read and write files; first come, first served.

    Attributes:
        bytes_read, bytes_written: totals so far. busy_seconds: time during which at least one transfer was in flight.
    """

    def __init__(self, num_threads: int) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._in_flight = 0
        self._busy_since = 0.0
        self.bytes_read = 0
        self.bytes_written = 0
        self.busy_seconds = 0.0
        self._threads = [threading.Thread(target=self._work, name=f"flexgen-io-{index}", daemon=True) for index in range(num_threads)]
        for thread in self._threads:
            thread.start()

    def read(self, parts: Sequence[tuple[File, int, memoryview]], on_done: Callable[[], None] | None = None) -> Ticket:
        """Start reading (file, offset, destination) ranges; `on_done` runs on an I/O thread."""
        return self._submit(parts, False, on_done)

    def write(self, parts: Sequence[tuple[File, int, memoryview]], on_done: Callable[[], None] | None = None) -> Ticket:
        """Start writing (file, offset, source) ranges; sources must stay unchanged until the ticket is done."""
        return self._submit(parts, True, on_done)

    def _submit(self, parts: Sequence[tuple[File, int, memoryview]], write: bool, on_done: Callable[[], None] | None) -> Ticket:
        chunks = [
            (file, offset + at, view[at : at + CHUNK_BYTES]) for file, offset, view in parts for at in range(0, len(view), CHUNK_BYTES)
        ]
        ticket = Ticket(len(chunks), on_done)
        with self._lock:
            if chunks and self._in_flight == 0:
                self._busy_since = time.perf_counter()
            self._in_flight += len(chunks)
        if not chunks and on_done is not None:
            on_done()
        for file, offset, view in chunks:
            self._jobs.put(_Job(file, offset, view, ticket, write))
        return ticket

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            error: BaseException | None = None
            try:
                (job.file.write_from if job.write else job.file.read_into)(job.view, job.offset)
            except Exception as caught:  # noqa: BLE001 - handed to whoever waits for the ticket
                error = caught
            size = len(job.view)
            with self._lock:
                self._in_flight -= 1
                if job.write:
                    self.bytes_written += size
                else:
                    self.bytes_read += size
                if self._in_flight == 0:
                    self.busy_seconds += time.perf_counter() - self._busy_since
            job.ticket.part_done(error)
            del job  # an idle thread keeps no buffer alive

    def close(self) -> None:
        """Let what is queued finish, then end the threads."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()


class FileSet:
    """Read-only files, opened once each; folders that refuse O_DIRECT are named once.  `verify` as for `File`."""

    def __init__(self, *, verify: bool = False) -> None:
        self._verify = verify
        self._files: dict[Path, File] = {}
        self._plain: set[Path] = set()

    def __getitem__(self, path: Path) -> File:
        if path not in self._files:
            self._files[path] = File(path, verify=self._verify, on_plain=self._say_once)
        return self._files[path]

    def _say_once(self, folder: Path, why: str) -> None:
        if folder not in self._plain:
            self._plain.add(folder)
            _warn_of_plain(folder, why)

    def check_unchanged(self) -> None:
        """Raises StorageError when one of them is not what it was."""
        for file in self._files.values():
            file.check_unchanged()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


def plan_extents(ranges: Sequence[tuple[Path, int, int]], max_gap: int = 128 << 10) -> tuple[list[Extent], list[int], int]:
    """Aligned reads that cover byte ranges.

    Args:
        ranges: (path, offset, size) as stored; need not be aligned or sorted.
        max_gap: unneeded bytes that are read rather than starting a new extent.

    Returns:
        (extents, position of each range within the staging buffer, bytes of the staging buffer).
    """
    order = sorted(range(len(ranges)), key=lambda index: (str(ranges[index][0]), ranges[index][1]))
    extents: list[Extent] = []
    positions = [0] * len(ranges)
    total = 0
    for index in order:
        path, offset, size = ranges[index]
        start, stop = offset - offset % ALIGNMENT, align_up(offset + size, ALIGNMENT)
        last = extents[-1] if extents else None
        if last is not None and last.path == path and start <= last.offset + last.size + max_gap:
            grown = max(last.offset + last.size, stop) - last.offset
            extents[-1] = Extent(path=path, offset=last.offset, size=grown, position=last.position)
            total = last.position + grown
        else:
            extents.append(Extent(path=path, offset=start, size=stop - start, position=total))
            total += stop - start
        positions[index] = extents[-1].position + offset - extents[-1].offset
    return extents, positions, total
