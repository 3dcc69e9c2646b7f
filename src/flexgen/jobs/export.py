"""Writes the output file from the database: the records, or the table whose rows they answer.

The file is replaced atomically, and this works at any time, also during a run.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from flexgen.base.failpoints import failpoint
from flexgen.base.files import Hashed, check_target, create, follow, open_private, sync_folder, temporary_beside
from flexgen.base.quantities import MIB
from flexgen.errors import JobError, OptionError, StorageError
from flexgen.jobs.database import connect, transaction, translated
from flexgen.jobs.folder import JobFolder, JobPaths
from flexgen.jobs.workers.place import remove_folder
from flexgen.tables.form import TableForm
from flexgen.tables.join import write_table

# Both queries follow an index, so that nothing is sorted, however large the job is.
_ORDERS = {
    "input": "SELECT record FROM records ORDER BY line",
    "done": "SELECT record FROM results CROSS JOIN records USING (line) ORDER BY place",
}
ORDERS = tuple(_ORDERS)


class DeliveryError(StorageError):
    """Standard output did not take all answers; they are still in the database."""


def export(paths: JobPaths, target: Path, order: str = "input") -> int:
    """Write the records of all finished lines, or the table that they answer, to `target`, which is replaced atomically.

    Args:
        paths: The paths of the job.
        target: The file to write.
        order: "input" for the order of the input, or "done" for the order in which lines were finished.

    Returns:
        The number of records, or of rows.

    Raises:
        JobError: `target` exists and was not written by an export of this job.
        OptionError: `order` is unknown, or is not that of a table's rows.
        StorageError: The file cannot be written; an earlier file is unchanged.
    """
    query = _query(order)
    check_target(target)
    with translated(target), _turn(paths) as turn, _reading(paths) as connection:
        target = follow(target)  # a symlink stays, and its target is replaced
        _check_ours(connection, target)
        with turn.temporary(target) as temporary:
            form = _output_form(connection)
            if form is not None and order != "input":
                raise OptionError(f"the output is a table, whose rows have their own order, not order={order!r}")
            count, digest = _write(_records(connection, query), form, temporary, target)
            with transaction(connection, paths.database):
                connection.execute("INSERT OR IGNORE INTO exports VALUES (?)", (digest,))
            failpoint("export.rename")
            temporary.replace(target)
        failpoint("export.renamed")
        sync_folder(target.parent)
    return count


def read_records(paths: JobPaths) -> Iterator[dict[str, Any]]:
    """Yield the records of all finished lines, in the order of the input.

    Raises:
        StorageError: The database cannot be read.
    """
    with _reading(paths) as connection:
        for record in _records(connection, _ORDERS["input"]):
            yield json.loads(record)


def export_to_stream(paths: JobPaths, stream: BinaryIO, order: str = "input") -> int:
    """Write the records of all finished lines to an open stream, and return their number.

    Raises:
        DeliveryError: The stream does not take all of them.
        OptionError: `order` is unknown.
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
    """Check that the output can be replaced: it is missing, empty, or was written by an export of this job.

    Raises:
        JobError: The output is a file that no export of this job has written.
    """
    if paths.output is None:
        return
    with _reading(paths) as connection:
        _check_ours(connection, follow(paths.output))


def remove_job(folder: JobFolder) -> None:
    """Remove the state and the output of earlier runs of a job (`--fresh`).

    Raises:
        JobError: The output was not written by this job; nothing is removed then.
    """
    paths = folder.paths
    if paths.database.exists():
        _check_before_removal(paths)
        if paths.output is not None:
            with translated(paths.output):
                paths.output.unlink(missing_ok=True)
    with _turn(paths):
        pass  # taking the turn removes the file that a killed export left
    remove_folder(paths.workers)
    folder.remove_state()


def _check_before_removal(paths: JobPaths) -> None:
    """Check that the output may be removed; where the database cannot be read, only an empty output may."""
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


def _output_form(connection: sqlite3.Connection) -> TableForm | None:
    """Return the form of an output that is a table; None for one of records."""
    found = connection.execute("SELECT value FROM facts WHERE name = 'output_form'").fetchone()
    return None if found is None else TableForm.from_json(found[0])


def _write(records: Iterator[bytes], form: TableForm | None, temporary: Path, target: Path) -> tuple[int, bytes]:
    """Write the output to `temporary` durably; return the number of its records or rows, and the digest of the file."""
    with create(temporary, target) as file:
        hashed = Hashed(file)
        count = _write_records(records, hashed) if form is None else write_table(form, records, hashed, target)
        file.flush()
        failpoint("export.fsync")
        os.fsync(file.fileno())
    return count, hashed.digest


def _write_records(records: Iterator[bytes], file: Hashed) -> int:
    count = 0
    for record in records:
        failpoint("export.write")
        file.write(record)
        count += 1
    return count


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
    """The exclusive right to export.

    The lock file holds the name of the temporary file in use, so that the next export can remove that file after a kill.
    """

    def __init__(self, lock: int) -> None:
        self._lock = lock

    @contextmanager
    def temporary(self, target: Path) -> Iterator[Path]:
        """Yield the path of a temporary file that is to replace `target`, and remove what is left of it at the end."""
        temporary = temporary_beside(target.absolute())
        self._note(os.fsencode(temporary))
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)
            self._note(b"")

    def remove_left(self) -> None:
        """Remove the temporary file of a killed export, if the file of that name is a regular file of this user."""
        left = Path(os.fsdecode(os.pread(self._lock, os.fstat(self._lock).st_size, 0)))
        if left.name:
            with suppress(OSError):  # the file or its folder no longer exists
                found = left.lstat()
                if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
                    left.unlink()
            self._note(b"")

    def _note(self, name: bytes) -> None:
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, name, 0)


@contextmanager
def _turn(paths: JobPaths) -> Iterator[_Turn]:
    """Wait for the right to export: one export runs at a time, because a slow one must not replace the file of a later one."""
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
    connection = connect(paths)
    try:
        with translated(paths.database):
            yield connection
    finally:
        connection.close()


def _send_nowhere(stream: BinaryIO) -> None:
    """Redirect the stream to /dev/null, so that flushing its buffer when it is closed does not fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
