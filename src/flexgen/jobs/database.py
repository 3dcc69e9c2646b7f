"""The database of a job: its tables, how it is opened, and when a transaction is durable.  Knows nothing of requests.

It is SQLite with a write-ahead log and synchronous=FULL: what is committed survives a kill and a power failure, and other processes
(`flexgen status`, `flexgen export`) read a consistent snapshot while a run writes.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flexgen.base.failpoints import failpoint
from flexgen.base.files import check_private, open_private
from flexgen.errors import StorageError, io_failure, no_room
from flexgen.jobs.folder import JobPaths

_APPLICATION_ID = 0x666C7867  # "flxg", which distinguishes a job from other databases
_VERSION = 1
_BUSY_SECONDS = 60.0
_FILES_BESIDE = 3  # a journal, -wal and -shm
# What SQLite says of a full disk: the first where it adds to a file, the others of files that may not grow and of its shared memory.
_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE, sqlite3.SQLITE_IOERR_SHMMAP)
_PRIMARY = 0xFF  # these bits of what SQLite says are the kind of an error, the others tell more
# Rows of `results` are small, so that counting a million lines and finding those that are done reads no answers.
_SCHEMA = f"""
BEGIN;
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE runs (
    id INTEGER PRIMARY KEY, started REAL NOT NULL, seconds REAL NOT NULL, lines INTEGER NOT NULL, lines_before INTEGER NOT NULL,
    tokens_before INTEGER NOT NULL, tokens INTEGER NOT NULL, updated REAL NOT NULL, ending TEXT
);
CREATE TABLE results (
    line INTEGER PRIMARY KEY, digest INTEGER NOT NULL, place INTEGER NOT NULL UNIQUE, failed INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL
);
CREATE TABLE records (line INTEGER PRIMARY KEY, record BLOB NOT NULL);
CREATE TABLE begun (
    line INTEGER NOT NULL, choice INTEGER NOT NULL, start INTEGER NOT NULL, digest INTEGER NOT NULL, tokens INTEGER NOT NULL,
    token_ids TEXT NOT NULL, logprobs TEXT, ending TEXT, PRIMARY KEY (line, choice, start)
) WITHOUT ROWID;
CREATE TABLE exports (digest BLOB PRIMARY KEY) WITHOUT ROWID;
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_VERSION};
COMMIT;
"""

# Tables added later.  Older versions work without them, so the format keeps its number.
_ADDITIONS = "CREATE TABLE IF NOT EXISTS snapshot (id INTEGER PRIMARY KEY, value TEXT NOT NULL)"


def connect(paths: JobPaths, *, create: bool = False) -> sqlite3.Connection:
    """Open the database of a job.  Outside of `transaction` and `hold`, every statement is a transaction of its own.

    Raises:
        StorageError: The database does not exist (unless `create` is true), cannot be opened, is damaged, is of another version, or is
            not that of a job.
    """
    path = paths.database
    with translated(path):
        _check_file(path, create)
        connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
        try:
            _prepare(connection, paths, create)
        except BaseException:
            connection.close()
            raise
    return connection


def _check_file(path: Path, create: bool) -> None:
    """Check that the database is a private file and not a symlink, creating an empty one first if asked to.

    A file that exists is not opened, because closing it would drop the SQLite locks of this process.
    """
    if create:
        with suppress(FileExistsError):
            os.close(open_private(path, os.O_RDWR | os.O_CREAT | os.O_EXCL))
    check_private(path, path.lstat())
    for end in ("-wal", "-shm"):  # made by SQLite, which would follow a symlink there
        beside = path.with_name(path.name + end)
        with suppress(FileNotFoundError):
            check_private(beside, beside.lstat())


def _prepare(connection: sqlite3.Connection, paths: JobPaths, create: bool) -> None:
    path = paths.database
    is_new = create and connection.execute("SELECT count(*) FROM sqlite_schema").fetchone() == (0,)
    if not is_new and connection.execute("PRAGMA application_id").fetchone() != (_APPLICATION_ID,):
        raise StorageError(f"{path} is not a flexgen job")
    if connection.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
        raise StorageError(f"the file system of {path} cannot hold the state of a job: name a local folder{paths.spelling.folder}")
    connection.execute("PRAGMA synchronous = FULL")
    if is_new:
        connection.executescript(_SCHEMA)
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version != _VERSION:
        raise StorageError(f"{path} was written by another version of flexgen (format {version}, this one has {_VERSION})")
    if create:
        connection.execute(_ADDITIONS)


@contextmanager
def transaction(connection: sqlite3.Connection, path: Path) -> Iterator[None]:
    """Run the body as one transaction, which is durable when the context is left.

    After `hold` the body becomes a part of the transaction that `hold` began, and is durable with its commit.

    Raises:
        StorageError: The transaction could not be made durable; nothing has changed then.
    """
    held = connection.in_transaction
    hold(connection, path)
    try:
        with translated(path):
            yield
        if not held:
            commit(connection, path)
    except BaseException:
        if connection.in_transaction and not held:
            connection.execute("ROLLBACK")
        raise


def hold(connection: sqlite3.Connection, path: Path) -> None:
    """Begin a transaction that lasts until `commit`, unless one is open.  Closing the connection instead rolls it back."""
    with translated(path):
        if not connection.in_transaction:
            connection.execute("BEGIN IMMEDIATE")


def commit(connection: sqlite3.Connection, path: Path) -> None:
    """Commit everything since `hold`."""
    with translated(path):
        failpoint("store.commit")
        connection.execute("COMMIT")
        failpoint("store.committed")


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Raise errors of SQLite and of the operating system as StorageError."""
    try:
        yield
    except sqlite3.Error as error:
        raise StorageError(f"{path}: {error}") from _cause(error, path)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}") from error


def _cause(error: sqlite3.Error, path: Path) -> Exception:
    """Return the system's error where SQLite failed because the disk is full or does not work, else SQLite's own."""
    code = getattr(error, "sqlite_errorcode", None)
    if _is_full(code, path):
        return no_room()
    return io_failure() if code is not None and code & _PRIMARY == sqlite3.SQLITE_IOERR else error


def _is_full(code: int | None, path: Path) -> bool:
    """Return whether SQLite failed for want of room, which it does not say where it cannot make one of its files beside the database."""
    if code != sqlite3.SQLITE_CANTOPEN:
        return code in _FULL
    with suppress(OSError):
        room = os.statvfs(path.parent)
        return not room.f_bavail or room.f_favail < _FILES_BESIDE < room.f_files
    return False
