"""What a conversion has written so far: a JSON file in its folder, replaced as a whole and durably after every file that is complete."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from flexgen.base.files import sync_folder
from flexgen.base.from_json import dataclass_from_json, parsed_json
from flexgen.errors import OptionError, StorageError
from flexgen.hub.diagnose import CONVERSION_FILE

RECORD_FILE = CONVERSION_FILE
PARTIAL = ".partial"  # the ending of files that are not complete
_SCHEMA_VERSION = 1
_ADDED = {"allow_requantize": False}  # what records of earlier versions lack


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSums:
    """A file that is complete.

    Attributes:
        nbytes: Its size.
        blocks: The digest of each block of `sums.BLOCK_BYTES`, the last of which may be short.
    """

    nbytes: int
    blocks: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The state of a conversion.

    Attributes:
        source: The model that is converted: the name of a hub repository, or the path of a folder from the root.
        identity: What tells its weights from others, see `source.identity_of`.
        settings: The fields of QuantizeSettings.
        shard_bytes: The most bytes of a file of weights.
        total_bytes: The bytes of all files of weights when they are complete.
        kept: For each matrix that is not rounded, the reason.
        allow_requantize: Whether weights may be rounded that are in a low-bit format already.
        files: The files that are complete, by name.
        complete: Whether all files are.
        schema_version: The version of this description.
    """

    source: str
    identity: str
    settings: dict[str, Any]
    shard_bytes: int
    total_bytes: int
    kept: dict[str, str]
    allow_requantize: bool = False
    files: dict[str, FileSums] = field(default_factory=dict)
    complete: bool = False
    schema_version: int = _SCHEMA_VERSION

    def made_of(self, other: Record) -> bool:
        """Return whether both are the conversion of the same weights with the same settings."""
        same = ("identity", "settings", "shard_bytes", "total_bytes")
        return all(getattr(self, name) == getattr(other, name) for name in same)

    def write(self, folder: Path) -> None:
        """Replace the record in the folder, durably."""
        replace_file(folder / RECORD_FILE, (json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n").encode())


class UnusableRecord(StorageError):
    """The record in a folder cannot be read or understood."""


class FolderHoldsOther(OptionError):
    """A folder holds something else than the conversion that is asked for.

    Args:
        what: What it holds.
        advice: What to do about it.
    """

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"{what}: {advice}")
        self.what = what


def read_record(folder: Path) -> Record | None:
    """Return the record in a folder; None if it has none.

    Raises:
        UnusableRecord: It cannot be read or understood.
    """
    path = folder / RECORD_FILE
    try:
        fields = parsed_json(path.read_text(encoding="utf-8"), str(path))
        if isinstance(fields, dict):
            fields = _ADDED | cast(dict[str, Any], fields)
        record = dataclass_from_json(Record, fields, str(path))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, OptionError) as error:
        raise UnusableRecord(f"{path} cannot be understood ({error}): remove {folder}, and convert again") from error
    if record.schema_version != _SCHEMA_VERSION:
        raise UnusableRecord(f"{path} was written by another version of flexgen: remove {folder}, and convert again")
    return record


def lost(folder: Path, record: Record) -> dict[str, str]:
    """Return what is wrong with files that were complete, in words by name: they are gone, or cut.  What they hold is not read."""
    found: dict[str, str] = {}
    for name, sums in record.files.items():
        path = folder / name
        nbytes = path.stat().st_size if path.is_file() else None
        if nbytes != sums.nbytes:
            found[name] = f"{name} is missing" if nbytes is None else f"{name} has {nbytes:,} bytes of {sums.nbytes:,}"
    return found


def present(folder: Path, record: Record) -> Record:
    """Return the record without the files that are gone or cut, which makes it that of a conversion to go on with."""
    gone = lost(folder, record)
    if not gone:
        return record
    return dataclasses.replace(record, files={name: sums for name, sums in record.files.items() if name not in gone}, complete=False)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file that takes the place of an earlier one when it is durable."""
    partial = path.with_name(path.name + PARTIAL)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


class FolderIsLocked(StorageError):
    """Another process writes to the folder."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder; the kernel releases it however the process ends.

    Raises:
        FolderIsLocked: Another process has locked it.
        StorageError: It cannot be locked.
    """
    descriptor = -1
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if descriptor >= 0:
            os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise FolderIsLocked(f"{folder} is being written by another process: wait for it, or take another folder") from error
        raise StorageError(f"{folder} cannot be locked against other processes: {error.strerror or error}") from error
    try:
        yield
    finally:
        os.close(descriptor)
