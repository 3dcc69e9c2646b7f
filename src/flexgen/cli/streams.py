"""Standard input, output and error of the command, arranged so that messages that cannot be written do not stop a run.

Bytes that standard error does not take are dropped.  Standard output records its first failure, because it may carry results; other text
(such as the report of a run) is written to it by `reports`.  Closed descriptors 0 to 2 are opened, because a database would be opened on
one of them otherwise.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import select
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from flexgen.cli.exit_codes import ExitCode, complain
from flexgen.errors import StorageError, no_room

# Closed descriptors are opened in the wrong direction, so that using them still fails, and `check_stdin` and `check_stdout` notice.
_CLOSED = {0: os.O_WRONLY, 1: os.O_RDONLY, 2: os.O_WRONLY}


class _Descriptor(io.FileIO):
    """Writes bytes to a descriptor that stays open, and waits if another program has made it non-blocking."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)

    def write(self, data: Any, /) -> int:
        while (written := super().write(data)) is None:
            select.select([], [self], [])
        return written


class _Dropping(_Descriptor):
    """Drops bytes that cannot be written."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


class _Results(_Descriptor):
    """Raises the first error, and drops all later bytes.

    The results are incomplete by then, and the interpreter flushes once more when it ends.

    Attributes:
        failure: The first error, or None.
    """

    failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        if self.failure is not None:
            return memoryview(data).nbytes
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


@contextmanager
def standard_streams() -> Iterator[None]:
    """Open the three streams for a command, and exit with its exit code, or with RESUMABLE if its results could not be written."""
    _open_descriptors()
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(_Dropping(2), sys.stderr, line_buffering=True)
    results = _Results(1)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(results, sys.stdout, line_buffering=results.isatty())
    stdout = sys.stdout  # typer replaces it when the reader has left
    code: object = ExitCode.ALL_ANSWERED
    try:
        yield
    except SystemExit as end:
        code = end.code or ExitCode.ALL_ANSWERED
    except OSError as error:
        if error is not results.failure:
            raise
    finally:
        _flush(stdout)
    if results.failure is not None:
        code = _undelivered(results.failure, code)
    sys.exit(code)  # pyright: ignore[reportArgumentType]


def _undelivered(failure: OSError, code: object) -> object:
    """Return the exit code of a command that could not write its results.  A code of 1 may come from typer, whose reader has left."""
    if code in (ExitCode.ALL_ANSWERED, ExitCode.SOME_FAILED):
        return complain(f"standard output: {reason_of(failure)}", ExitCode.RESUMABLE)
    return code


def reason_of(error: OSError) -> str:
    """Return the reason why standard output could not be written."""
    said = {errno.EPIPE: "its reader has left", errno.EBADF: "it is closed, or open for reading only"}
    return said.get(error.errno or 0) or error.strerror or str(error)


def reports() -> TextIO:
    """Return standard output for text that is not a result, which is dropped if it cannot be written."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return _text(_Dropping(1), sys.stdout, line_buffering=True) if isinstance(raw, _Results) else sys.stdout


def check_stdin() -> None:
    """Check that standard input can be read.

    Raises:
        StorageError: Standard input is closed.
    """
    if _access(sys.stdin) == os.O_WRONLY:
        raise StorageError("standard input is closed: give a file of requests in place of -")


def check_stdout() -> None:
    """Check that standard output can be written, as far as this can be known before a write.

    Raises:
        StorageError: Standard output cannot be written.
    """
    access = _access(sys.stdout)
    if access is None:
        return
    try:
        fault = "it is closed, or open for reading only" if access == os.O_RDONLY else _fault(sys.stdout.fileno())
    except OSError as error:
        raise StorageError(f"standard output: {reason_of(error)}; give a file in place of -") from error
    if fault:
        raise StorageError(f"standard output: {fault}; give a file in place of -")


def _fault(descriptor: int) -> str:
    """Return the reason why a descriptor cannot be written; empty if it can.

    Raises:
        OSError: The system refuses to write, or there is no room.
    """
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISCHR(mode):
        try:
            os.write(descriptor, b"")  # a full device and a closed terminal refuse even that
        except OSError as error:
            if error.errno == errno.EIO:
                return "its terminal is closed"
            raise
    elif stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        if any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0)):
            return "its reader has left"
    elif stat.S_ISREG(mode):
        space = os.fstatvfs(descriptor)
        if space.f_blocks and not space.f_bavail:
            raise no_room()
    return ""


def _access(stream: TextIO) -> int | None:
    """Return the access mode of the stream's descriptor, such as `os.O_RDONLY`; None for a stream without one, as in tests."""
    try:
        return fcntl.fcntl(stream.fileno(), fcntl.F_GETFL) & os.O_ACCMODE
    except (OSError, ValueError):
        return None


def _open_descriptors() -> None:
    for descriptor, flags in _CLOSED.items():
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, flags)  # the lowest free descriptor, which is this one
            os.set_inheritable(opened, True)


def _text(raw: _Descriptor, like: TextIO | None, *, line_buffering: bool) -> TextIO:
    """Return a stream of text in the encoding of `like`.

    Characters that the encoding lacks, and undecodable bytes of file names, are escaped.
    """
    encoding = like.encoding if like is not None else "utf-8"
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding, errors="backslashreplace", line_buffering=line_buffering)


def _flush(stream: TextIO) -> None:
    """Flush the stream, so that nothing is left to write when the interpreter ends.  The stream records a failure."""
    try:
        stream.flush()
    except (OSError, ValueError):
        pass
