"""Files that are written for others to find: whole or not at all, and safely in folders that others can write to.

The folder of an output may be shared.  A name that can be guessed may then be a link to one of the user's files, or a pipe that
nobody reads.  So a new file gets a name that cannot be guessed and that must not exist, and takes its place when it is complete.
"""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import stat
from pathlib import Path
from typing import Any, BinaryIO

from flexgen.base.quantities import MIB
from flexgen.errors import StorageError

_MOST_LINKS = 40  # as many as Linux follows


def follow(path: Path) -> Path:
    """Return the file that is meant by `path`, following links of the user and of root only.

    Raises:
        StorageError: A link belongs to another user, or links go round in circles.
        OSError: A name is too long.
    """
    for _ in range(_MOST_LINKS):
        found = _lstat(path)
        if found is None or not stat.S_ISLNK(found.st_mode):
            return path.parent.resolve() / path.name
        if found.st_uid not in (os.geteuid(), 0):
            raise StorageError(f"{path} is a link that another user made; give another name")
        path = path.parent / path.readlink()
    raise StorageError(f"{path}: too many links, one to the other")


def check_target(path: Path | None) -> None:
    """Check that a file can be made or replaced at `path`; None is standard output.

    A file beside it is made and removed, which tests names, permissions and the file system at once.

    Raises:
        StorageError: No file can be made there; the message says why.
    """
    if path is None:
        return
    try:
        target = follow(path)
        found = _lstat(target)
        if found is not None:
            _check_replaceable(path, target, found)
        _check_folder(path, target, found)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error


def check_folder(path: Path) -> None:
    """Check that files can be written into a folder, or that the folder can be made.

    Raises:
        StorageError: They cannot; the message says why.
    """
    try:
        if os.path.lexists(path) and not path.is_dir():
            raise StorageError(f"{path} is not a folder; give the name of a new folder")
        _check_writable(path, path if path.is_dir() else path.parent)
    except OSError as error:
        raise StorageError(f"{path} cannot be used: {error.strerror or error}") from error


def _check_replaceable(path: Path, target: Path, found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise StorageError(f"{path} is a folder; give the name of a file")
    if not stat.S_ISREG(found.st_mode):
        raise StorageError(f"{path} is not a regular file; give the name of one (-o - writes to standard output)")
    if any(_is_open_on(descriptor, found) for descriptor in (0, 1, 2)):
        raise StorageError(f"{path} is what a standard stream of this process reads or writes: give another file")
    if not os.access(target, os.W_OK):
        raise StorageError(f"{path} is read-only")


def _check_folder(path: Path, target: Path, found: os.stat_result | None) -> None:
    folder = target.parent
    _check_writable(path, folder)
    inside = folder.stat()
    if found is not None and inside.st_mode & stat.S_ISVTX and os.geteuid() not in (0, found.st_uid, inside.st_uid):
        raise StorageError(f"{path} belongs to another user, and in {folder} only they can replace it")
    temporary = temporary_beside(target)
    create(temporary, target).close()
    temporary.unlink()


def _check_writable(path: Path, folder: Path) -> None:
    if not folder.is_dir():
        raise StorageError(f"{path} cannot be written: the folder {folder} is missing")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(f"{path} cannot be written: the folder {folder} is read-only")


def _is_open_on(descriptor: int, found: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), found)
    except OSError:
        return False


def temporary_beside(target: Path) -> Path:
    """Return a name in the target's folder that cannot be guessed, of the same length however long the target's is."""
    return target.with_name(f".flexgen-{secrets.token_hex(8)}.new")


def create(temporary: Path, target: Path) -> BinaryIO:
    """Create and open the file that will take the place of `target`.

    It gets the permissions of an existing target, otherwise those that the umask gives a new file.
    """
    there = _lstat(target)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(temporary, flags, 0o666 if there is None else 0o600)
    if there is not None:
        os.fchmod(descriptor, stat.S_IMODE(there.st_mode) & 0o777)
    return os.fdopen(descriptor, "wb", buffering=MIB)


class Hashed(io.RawIOBase):
    """A stream that writes to an open file, and hashes what it writes.  Closing it leaves the file open.

    Args:
        file: The file.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hasher = file, hashlib.blake2b(digest_size=16)

    @property
    def digest(self) -> bytes:
        """The digest of everything that was written."""
        return self._hasher.digest()

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self._hasher.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()


def write_file(path: Path, text: str) -> None:
    """Make or replace a text file.

    Raises:
        StorageError: The file cannot be written; an earlier file is unchanged.
    """
    check_target(path)
    target = follow(path)
    temporary = temporary_beside(target)
    try:
        with create(temporary, target) as file:
            file.write(text.encode())
        temporary.replace(target)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def open_private(path: Path, flags: int) -> int:
    """Open a file that only its owner can read and that has no second name, and return the descriptor.

    Raises:
        StorageError: Something else lies there: a pipe, another user's file, or a file with a hard link.
        OSError: A symbolic link lies there, or the file cannot be opened.
    """
    truncate = flags & os.O_TRUNC
    flags = flags & ~os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # without waiting for the other end of a pipe
    descriptor = os.open(path, flags, 0o600)
    try:
        check_private(path, os.fstat(descriptor))
        if truncate:
            os.ftruncate(descriptor, 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def check_private(path: Path, found: os.stat_result) -> None:
    """Check that a file of a job is a regular file of this user, without a second name.

    Raises:
        StorageError: It is not; the message says in what respect.
    """
    if not stat.S_ISREG(found.st_mode):
        raise StorageError(f"{path} is not a regular file")
    if os.geteuid() not in (found.st_uid, 0):
        raise StorageError(f"{path} belongs to another user")
    if found.st_nlink > 1:
        raise StorageError(f"{path} has a second name (a hard link), and what lies there would be written over")


def sync_folder(folder: Path) -> None:
    """Make the list of files in the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lstat(path: Path) -> os.stat_result | None:
    """Return the status of `path` itself, or None if nothing is there."""
    try:
        return path.lstat()
    except FileNotFoundError:
        return None
