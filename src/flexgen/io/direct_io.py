"""Files read and written past the page cache (O_DIRECT), with plain reads and writes where a file system refuses that."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from flexgen.base.failpoints import failpoint
from flexgen.errors import StorageError
from flexgen.io.aligned import ALIGNMENT
from flexgen.io.checksums import BlockSums

logger = logging.getLogger(__name__)


def _warn_of_plain(folder: Path, why: str) -> None:
    logger.warning("%s: the file system %s; plain reads go through the page cache and are slower", folder, why)


class File:
    """An open file that is read, or read and written, at offsets; with O_DIRECT where the file system allows it.

    Args:
        path: The file.
        flags: Flags of open(2).
        direct: Whether to try O_DIRECT.
        unlinked: Whether to remove the file's name as soon as it is open, so that it goes when it is closed.
        verify: Whether to compare whatever is read with what was written or first read.
        on_plain: Called with the folder and the reason when O_DIRECT is refused.
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
        try:
            return os.open(self.path, flags | (os.O_DIRECT if direct else 0) | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if not direct or error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        if flags & os.O_EXCL:
            self.path.unlink(missing_ok=True)  # Linux creates the file before it refuses the flag
        fd = os.open(self.path, flags | os.O_CLOEXEC, 0o600)
        self.direct = False
        self._on_plain(self.path.parent, "refuses O_DIRECT")
        return fd

    @property
    def size_bytes(self) -> int:
        """The size that the file had when it was opened, or that `truncate` gave it."""
        return self._opened_bytes

    def will_read(self, offset: int, size: int) -> None:
        """Ask the page cache to fetch a range in the meantime; for files that are read through it."""
        with contextlib.suppress(OSError):  # a hint
            os.posix_fadvise(self._fd, offset, size, os.POSIX_FADV_WILLNEED)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset`.  Bytes past the end that the file had when it was opened are left as they are.

        Raises:
            StorageError: The read failed, the file has become shorter, or it twice brought something else than before.
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
            StorageError: The write failed or the disk is full.
        """
        written, start = view, offset
        while len(view):
            count, _ = self._transfer(os.pwritev, "writing", view, offset)
            view, offset = view[count:], offset + count
        if self._sums is not None:
            self._sums.note(written, start)

    def _transfer(self, call: Callable[[int, list[memoryview], int], int], what: str, view: memoryview, offset: int) -> tuple[int, bool]:
        """Move bytes with one system call, which is repeated when it is interrupted or refuses O_DIRECT.

        Returns:
            The number of bytes, and whether the call was a direct one.
        """
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
        """Check that nobody wrote to the file since it was opened here for reading.

        Raises:
            StorageError: The file changed.
        """
        if self._find_state() != self._state:
            raise StorageError(f"{self.path} changed while it was being read")

    def truncate(self, size_bytes: int) -> None:
        """Give a new file its size; it reads as zeros.

        Raises:
            StorageError: The file cannot be so large.
        """
        try:
            os.ftruncate(self._fd, size_bytes)
        except OSError as error:
            raise StorageError(f"{self.path} cannot have {size_bytes} bytes: {error.strerror}") from error
        self._opened_bytes = size_bytes
        if self._sums is not None:
            self._sums = BlockSums(size_bytes, known=True)

    def sync(self) -> None:
        """Make durable what was written.

        Raises:
            StorageError: The system could not do it.
        """
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise StorageError(f"syncing {self.path}: {error.strerror}") from error

    def forget_cached(self) -> None:
        """Ask the system to drop what it caches of the file."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        os.close(self._fd)


class FileSet:
    """Read-only files, each opened once.  A folder that refuses O_DIRECT is reported once.

    Args:
        verify: As for `File`.
        tell_plain: Whether a folder that refuses O_DIRECT is reported.
        open_file: Opens a file; called with the arguments of `File`.
    """

    def __init__(self, *, verify: bool = False, tell_plain: bool = True, open_file: Callable[..., File] = File) -> None:
        self._verify, self._tell_plain, self._open_file = verify, tell_plain, open_file
        self._files: dict[Path, File] = {}
        self._plain: set[Path] = set()

    def __getitem__(self, path: Path) -> File:
        if path not in self._files:
            self._files[path] = self._open_file(path, verify=self._verify, on_plain=self._say_once)
        return self._files[path]

    def _say_once(self, folder: Path, why: str) -> None:
        if self._tell_plain and folder not in self._plain:
            self._plain.add(folder)
            _warn_of_plain(folder, why)

    def check_unchanged(self) -> None:
        """Check that none of the files changed since it was opened.

        Raises:
            StorageError: One of them changed.
        """
        for file in self._files.values():
            file.check_unchanged()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
