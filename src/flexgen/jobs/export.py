"""The output file, made from the database: as a whole, in one moment, at any time, also while a run goes on."""

from __future__ import annotations

import fcntl
import hashlib
import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from flexgen.base.failpoints import failpoint
from flexgen.base.files import check_target, create, follow, open_private, sync_folder, temporary_beside
from flexgen.base.quantities import MIB
from flexgen.errors import JobError, OptionError, StorageError
from flexgen.jobs.database import connect, transaction, translated
from flexgen.jobs.folder import JobFolder, JobPaths

# Both follow an index: nothing is sorted, whatever the size.
_ORDERS = {
    "input": "SELECT record FROM records ORDER BY line",
    "done": "SELECT record FROM results CROSS JOIN records USING (line) ORDER BY place",
}
ORDERS = tuple(_ORDERS)


class DeliveryError(StorageError):
    """Standard output did not take what is done and kept."""


def export(paths: JobPaths, target: Path, order: str = "input") -> int:
    """Write the records of the lines that are done to `target`, which is replaced at once or not at all.

    Args:
        order: "input", or "done" for the order in which lines were finished.

    Returns:
        How many records.

    Raises:
        JobError: There is a file that no export has written.
        OptionError: An unknown order.
        StorageError: It cannot be written; what was there is still there.
    """
    query = _query(order)
    check_target(target)
    with translated(target), _turn(paths) as turn, _reading(paths) as connection:
        target = follow(target)  # a link stays a link
        _check_ours(connection, target)
        with turn.temporary(target) as temporary:
            count, digest = _write(connection, query, temporary, target)
            with transaction(connection, paths.database):
                connection.execute("INSERT OR IGNORE INTO exports VALUES (?)", (digest,))
            failpoint("export.rename")
            temporary.replace(target)
        failpoint("export.renamed")
        sync_folder(target.parent)
    return count


def export_to_stream(paths: JobPaths, stream: BinaryIO, order: str = "input") -> int:
    """The same to an open stream.

    Raises:
        DeliveryError: It does not take all of them.
    """
    query = _query(order)
    count = 0
    with _reading(paths) as connection:
        try:
            for record in _records(connection, query):
                stream.write(record)
                count += 1
            stream.flush()
        except OSError as error:
            _send_nowhere(stream)
            why = "its reader has left" if isinstance(error, BrokenPipeError) else error.strerror or error
            raise DeliveryError(f"standard output: {why}") from error
    return count


def check_output(paths: JobPaths) -> None:
    """Raises JobError when the output is a file that no export of this job has written."""
    if paths.output is None:
        return
    with _reading(paths) as connection:
        _check_ours(connection, follow(paths.output))


def remove_job(folder: JobFolder) -> None:
    """Remove what earlier runs of a job kept and wrote (`--fresh`).

    Raises:
        JobError: Its output is not theirs; nothing is removed then.
    """
    paths = folder.paths
    if paths.database.exists():
        _check_before_removal(paths)
        if paths.output is not None:
            with translated(paths.output):
                paths.output.unlink(missing_ok=True)
    with _turn(paths):
        pass  # what a killed export left goes
    folder.remove_state()


def _check_before_removal(paths: JobPaths) -> None:
    """A database that cannot be read tells nothing of the output: then only an empty one may go."""
    try:
        check_output(paths)
    except StorageError as error:
        if paths.output is not None and paths.output.exists() and paths.output.stat().st_size > 0:
            raise JobError(f"{error}; {paths.output} may not be the job's: move it away") from error


def _query(order: str) -> str:
    if order not in _ORDERS:
        raise OptionError(f"order={order!r} is unknown; known: {', '.join(_ORDERS)}")
    return _ORDERS[order]


def _records(connection: sqlite3.Connection, query: str) -> Iterator[bytes]:
    for (record,) in connection.execute(query):
        yield record


def _write(connection: sqlite3.Connection, query: str, temporary: Path, target: Path) -> tuple[int, bytes]:
    """(records written, digest of the file), durable."""
    count, hasher = 0, hashlib.blake2b(digest_size=16)
    with create(temporary, target) as file:
        for record in _records(connection, query):
            failpoint("export.write")
            file.write(record)
            hasher.update(record)
            count += 1
        file.flush()
        failpoint("export.fsync")
        os.fsync(file.fileno())
    return count, hasher.digest()


def _check_ours(connection: sqlite3.Connection, target: Path) -> None:
    with translated(target):
        if not target.exists() or target.stat().st_size == 0:
            return
        with target.open("rb") as file:
            hasher = hashlib.blake2b(digest_size=16)
            while piece := file.read(MIB):
                hasher.update(piece)
        known = connection.execute("SELECT 1 FROM exports WHERE digest = ?", (hasher.digest(),)).fetchone()
    if known is None:
        raise JobError(f"{target} was not written by this job, or was changed since: move it away, or give another output")


class _Turn:
    """The right to export.  The file that gives it names the temporary file in use, so that the next one can remove it after a kill."""

    def __init__(self, lock: int) -> None:
        self._lock = lock

    @contextmanager
    def temporary(self, target: Path) -> Iterator[Path]:
        """A name for what is to take the place of `target`; gone at the end."""
        temporary = temporary_beside(target.absolute())
        self._note(os.fsencode(temporary))
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)
            self._note(b"")

    def remove_left(self) -> None:
        """Remove the file that a killed export left, if what lies there can be it."""
        left = Path(os.fsdecode(os.pread(self._lock, os.fstat(self._lock).st_size, 0)))
        if left.name:
            with suppress(OSError):  # gone, or in a folder that is gone
                found = left.lstat()
                if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
                    left.unlink()
            self._note(b"")

    def _note(self, name: bytes) -> None:
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, name, 0)


@contextmanager
def _turn(paths: JobPaths) -> Iterator[_Turn]:
    """One export at a time: a slow one must not replace what a later one has written."""
    with translated(paths.folder):
        fd = open_private(paths.folder / "export.lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            turn = _Turn(fd)
            turn.remove_left()
            yield turn
        finally:
            os.close(fd)


@contextmanager
def _reading(paths: JobPaths) -> Iterator[sqlite3.Connection]:
    connection = connect(paths.database)
    try:
        with translated(paths.database):
            yield connection
    finally:
        connection.close()


def _send_nowhere(stream: BinaryIO) -> None:
    """Let what is still buffered be written without complaint when the stream is closed."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
