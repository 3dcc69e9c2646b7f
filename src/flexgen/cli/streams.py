"""Standard input, output and error of the command, so that where messages go decides about nothing else.

What standard error does not take is dropped.  Standard output keeps its first failure in mind, because it may carry results; what is
no result (the report of a run) goes there by `reports`.  Descriptors 0 to 2 exist, or a database would be opened on one of them.
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
from flexgen.errors import StorageError

# Closed descriptors are opened the wrong way round: using them fails as before, and as `check_stdin` and `check_stdout` tell.
_CLOSED = {0: os.O_WRONLY, 1: os.O_RDONLY, 2: os.O_WRONLY}


class _Descriptor(io.FileIO):
    """Bytes to a descriptor that stays open.  One that takes nothing just now (another program made it non-blocking) is waited for."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)

    def write(self, data: Any, /) -> int:
        while (written := super().write(data)) is None:
            select.select([], [self], [])
        return written


class _Dropping(_Descriptor):
    """What cannot be written is dropped."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


class _Results(_Descriptor):
    """Fails once.  What follows is dropped: it could only be a part, and the interpreter flushes once more when it ends.

    Attributes:
        failure: The error, if there was one.
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
    """Open the three streams for a command, and end the process with the code it asks for, unless its results could not be written."""
    _open_descriptors()
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(_Dropping(2), sys.stderr, line_buffering=True)
    results = _Results(1)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(results, sys.stdout, line_buffering=results.isatty())
    stdout = sys.stdout  # typer puts another in its place when a reader has left
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
    """The exit code of a command that could not write its results (1 may be typer's own word for a reader who left)."""
    if code in (ExitCode.ALL_ANSWERED, ExitCode.SOME_FAILED):
        return complain(f"standard output: {reason_of(failure)}", ExitCode.RESUMABLE)
    return code


def reason_of(error: OSError) -> str:
    """Why something could not be written to standard output."""
    said = {errno.EPIPE: "its reader has left", errno.EBADF: "it is closed, or open for reading only"}
    return said.get(error.errno or 0) or error.strerror or str(error)


def reports() -> TextIO:
    """Standard output for what is no result: dropped where it cannot be written."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return _text(_Dropping(1), sys.stdout, line_buffering=True) if isinstance(raw, _Results) else sys.stdout


def check_stdin() -> None:
    """Raises StorageError when standard input is closed."""
    if _access(sys.stdin) == os.O_WRONLY:
        raise StorageError("standard input is closed: give a file of requests in place of -")


def check_stdout() -> None:
    """Raises StorageError when standard output takes nothing, as far as that shows before something is written."""
    access = _access(sys.stdout)
    if access is None:
        return
    try:
        fault = "it is closed, or open for reading only" if access == os.O_RDONLY else _fault(sys.stdout.fileno())
    except OSError as error:
        fault = reason_of(error)
    if fault:
        raise StorageError(f"standard output: {fault}; give a file in place of -")


def _fault(descriptor: int) -> str:
    """What keeps a descriptor from taking bytes; empty if nothing does."""
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISCHR(mode):
        os.write(descriptor, b"")  # a full device and a closed terminal refuse even that
    elif stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        if any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0)):
            return "its reader has left"
    elif stat.S_ISREG(mode):
        space = os.fstatvfs(descriptor)
        if space.f_blocks and not space.f_bavail:
            return os.strerror(errno.ENOSPC)
    return ""


def _access(stream: TextIO) -> int | None:
    """Whether the stream's descriptor is open for reading, writing or both; None for a stream without one, as in tests."""
    try:
        return fcntl.fcntl(stream.fileno(), fcntl.F_GETFL) & os.O_ACCMODE
    except (OSError, ValueError):
        return None


def _open_descriptors() -> None:
    for descriptor, flags in _CLOSED.items():
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, flags)  # the lowest that is free: this one
            os.set_inheritable(opened, True)


def _text(raw: _Descriptor, like: TextIO | None, *, line_buffering: bool) -> TextIO:
    """A stream of text in the encoding of `like`; characters that it lacks, and bytes in file names that are none, do not fail."""
    encoding = like.encoding if like is not None else "utf-8"
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding, errors="backslashreplace", line_buffering=line_buffering)


def _flush(stream: TextIO) -> None:
    """Have the interpreter find nothing to write when it ends; a failure is kept in mind by the stream."""
    try:
        stream.flush()
    except (OSError, ValueError):
        pass
