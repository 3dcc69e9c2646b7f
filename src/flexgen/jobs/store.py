"""The output file and what is known about it: which lines are answered, so that a rerun answers only the others.

A record is first noted in a journal beside the output (OUTPUT.flexgen/done): line number, hash of the input line, end and checksum
of the record; then it is appended to the output by one write.  At the next start a note without its whole record is dropped, with
what there is of the record, so whatever a kill tears off, the output ends with a whole record that the journal knows.  Records without
a note (a power failure can lose it) are moved to OUTPUT.flexgen/cut; bytes that are no records are never touched.  Knows nothing
of requests.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import struct
import time
import zlib
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexgen.errors import StorageError
from flexgen.sizes import MIB, format_size

logger = logging.getLogger(__name__)

_ENTRY = struct.Struct("<QQQII")  # line number, digest, end in the output, crc32 of the record, failed
_SUM = struct.Struct("<I")  # crc32 of the entry
_ENTRY_BYTES = _ENTRY.size + _SUM.size
_SYNC_SECONDS = 1.0
_RECORD_START = b'{"id": '  # of every form's records


class Store:
    """The answers of one job.

    Args:
        output: the file of answers; created, or continued if it belongs to the same job.
        identity: what must not change between runs of a job (model, seed, ...), as JSON values.

    Attributes:
        created: seconds since 1970 at the first start of the job.
        num_answered, num_failed: lines with an answer and with an error, earlier runs included.
        num_found: lines that earlier runs had finished.

    Raises:
        StorageError: the output belongs to something else, was changed, is in use, or cannot be written.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any]) -> None:
        self.output = output
        self.num_answered = self.num_failed = 0
        self._digests = array("Q")  # by line number; 0 for lines that are not done
        self._end = 0
        self._next_sync = 0.0
        self._output_fd = self._journal_fd = -1
        folder = output.with_name(output.name + ".flexgen")
        try:
            with _translated(output):
                if output.is_dir():
                    raise StorageError(f"{output} is a folder; the output is a file")
                if output.exists() and output.stat().st_size > 0 and not (folder / "done").exists():
                    raise self._changed()
                folder.mkdir(mode=0o700, exist_ok=True)
                self._journal_fd = os.open(folder / "done", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                self._lock()
                self._output_fd = os.open(output, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                self._recover(folder)
                self.created = self._check_identity(folder / "job.json", dict(identity))
        except BaseException:
            self.close()
            raise
        self.num_found = self.num_answered + self.num_failed

    def is_done(self, line_number: int, digest: int) -> bool:
        """Whether the line has its record.

        Raises:
            StorageError: it has one, but of a line with other content: the input is not the one that was answered.
        """
        known = self._digests[line_number] if line_number < len(self._digests) else 0
        if known and known != digest:
            raise StorageError(
                f"{self.output} answers another input (line {line_number} differs): give another output, "
                f"or remove it together with {self.output.name}.flexgen"
            )
        return known != 0

    def check_last_line(self, line_number: int) -> None:
        """Raises StorageError when lines after `line_number`, the input's last, have been answered."""
        if len(self._digests) > line_number + 1:
            raise StorageError(f"{self.output} answers another input ({len(self._digests) - 1} lines; this one has {line_number})")

    def append(self, line_number: int, digest: int, record: bytes, *, failed: bool) -> None:
        """Note the record of a line, then write it."""
        end = self._end + len(record)
        entry = _ENTRY.pack(line_number, digest, end, zlib.crc32(record), failed)
        with _translated(self.output):
            _write(self._journal_fd, entry + _SUM.pack(zlib.crc32(entry)), self._num_done * _ENTRY_BYTES)
            _write(self._output_fd, record, self._end)
            self._note(line_number, digest, end, failed)
            if time.monotonic() >= self._next_sync:
                self._sync()

    def close(self) -> None:
        """Make everything durable and let go of the files."""
        try:
            if self._output_fd >= 0 and self._journal_fd >= 0:
                with _translated(self.output):
                    self._sync()
        finally:
            for fd in (self._output_fd, self._journal_fd):
                if fd >= 0:
                    os.close(fd)
            self._output_fd = self._journal_fd = -1

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def _num_done(self) -> int:
        return self.num_answered + self.num_failed

    def _note(self, line_number: int, digest: int, end: int, failed: int) -> None:
        if line_number >= len(self._digests):
            self._digests.extend([0] * (line_number + 1 - len(self._digests)))
        self._digests[line_number] = digest
        self._end = end
        if failed:
            self.num_failed += 1
        else:
            self.num_answered += 1

    def _sync(self) -> None:
        os.fdatasync(self._journal_fd)
        os.fdatasync(self._output_fd)
        self._next_sync = time.monotonic() + _SYNC_SECONDS

    def _lock(self) -> None:
        try:
            fcntl.flock(self._journal_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(f"{self.output} is being written by another flexgen") from error

    def _recover(self, folder: Path) -> None:
        """Note what is done, and cut off what was begun."""
        size = os.fstat(self._output_fd).st_size
        begun = False
        for line_number, digest, end, checksum, failed in self._entries():
            record = _read(self._output_fd, end - self._end, self._end)
            begun = len(record) < end - self._end or b"\0" in record  # zeros: it never reached the disk before a power failure
            if begun:
                break
            if zlib.crc32(record) != checksum:
                raise self._changed()
            self._note(line_number, digest, end, failed)
        rest = _read(self._output_fd, min(size - self._end, len(_RECORD_START)), self._end).rstrip(b"\0")
        if not _RECORD_START.startswith(rest):
            raise self._changed()
        if rest and not begun:
            self._move_rest(folder / "cut", size)
        os.ftruncate(self._output_fd, self._end)
        os.ftruncate(self._journal_fd, self._num_done * _ENTRY_BYTES)

    def _move_rest(self, target: Path, size: int) -> None:
        with target.open("ab") as file:
            for offset in range(self._end, size, MIB):
                file.write(_read(self._output_fd, min(MIB, size - offset), offset))
        logger.warning("%s: %s of answers that the journal does not know went to %s", self.output, format_size(size - self._end), target)

    def _changed(self) -> StorageError:
        return StorageError(
            f"{self.output} was not written by flexgen, or changed since: give another output, "
            f"or remove it together with {self.output.name}.flexgen"
        )

    def _entries(self) -> Iterator[tuple[int, int, int, int, int]]:
        """The whole and intact entries of the journal, in order."""
        offset = end = 0
        while len(entry := _read(self._journal_fd, _ENTRY_BYTES, offset)) == _ENTRY_BYTES:
            (checksum,) = _SUM.unpack(entry[_ENTRY.size :])
            values = _ENTRY.unpack(entry[: _ENTRY.size])
            if zlib.crc32(entry[: _ENTRY.size]) != checksum or values[2] <= end:
                break
            yield values
            offset, end = offset + _ENTRY_BYTES, values[2]

    def _check_identity(self, path: Path, identity: dict[str, Any]) -> int:
        """The job's start; a job of which nothing is done may change its identity."""
        if self._num_done:
            try:
                known = json.loads(path.read_text())
            except ValueError as error:
                raise StorageError(f"{path} is damaged: {error}") from error
            for name in [*identity, *(name for name in known["identity"] if name not in identity)]:
                old, new = known["identity"].get(name), identity.get(name)
                if old != new:
                    raise StorageError(
                        f"{self.output} was begun with {name} {old!r}, now it is {new!r}: give another output, "
                        f"or remove it together with {self.output.name}.flexgen"
                    )
            return known["created"]
        created = int(time.time())
        temporary = path.with_name(path.name + ".new")
        temporary.write_text(json.dumps({"created": created, "identity": identity}, indent=2))
        temporary.replace(path)
        return created


def _write(fd: int, data: bytes, offset: int) -> None:
    """One write, unless the system cuts it short."""
    written = os.pwrite(fd, data, offset)
    while written < len(data):
        written += os.pwrite(fd, data[written:], offset + written)


def _read(fd: int, size: int, offset: int) -> bytes:
    data = os.pread(fd, size, offset)
    while len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
        data += more
    return data


@contextmanager
def _translated(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{output} cannot be written: {error}") from error
