"""Threads that read and write files.  A group of transfers completes as one ticket."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from flexgen.base.recorder import IO, Recorder, recorded
from flexgen.errors import StorageError
from flexgen.io.direct_io import File

CHUNK_BYTES = 8 << 20


class Ticket:
    """Completion of a group of transfers.  Thread-safe.

    Args:
        parts: Number of transfers.
        on_done: Called once, on the thread that completes the last transfer.
        record: Called once, before anybody can see that the last transfer is complete.
    """

    def __init__(self, parts: int, on_done: Callable[[], None] | None = None, record: Callable[[], None] | None = None) -> None:
        self._left = parts
        self._lock = threading.Lock()
        self._event = threading.Event()
        self._on_done, self._record = on_done, record
        self.error: BaseException | None = None
        if parts == 0:
            self._finish()

    def part_done(self, error: BaseException | None = None) -> None:
        with self._lock:
            self._left -= 1
            self.error = self.error or error
            last = self._left == 0
        if last:
            self._finish()

    def _finish(self) -> None:
        if self._record is not None:
            self._record()
        on_done, self._on_done = self._on_done, None  # a kept ticket keeps no buffer alive
        self._event.set()
        if on_done is not None:
            on_done()

    def done(self) -> bool:
        return self._event.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until everything has completed, and return whether it has.

        Raises:
            StorageError: A transfer failed.
        """
        finished = self._event.wait(timeout)
        if finished and self.error is not None:
            raise self.error if isinstance(self.error, StorageError) else StorageError(str(self.error)) from self.error
        return finished

    def settle(self) -> None:
        """Wait until everything has completed or failed."""
        self._event.wait()


class Contents(NamedTuple):
    """What a group of transfers moves, for the trace.

    Attributes:
        kind: "weights" or "KV".
        name: What it is of that kind, such as "unit 5".
    """

    kind: str
    name: str


@dataclass(frozen=True, slots=True)
class _Transfer:
    file: File
    offset: int
    view: memoryview
    ticket: Ticket
    write: bool
    contents: Contents | None


class IOPool:
    """Threads that read and write files in the order of submission.

    Args:
        num_threads: The number of threads.
        recorder: The recorder of the trace; None without one.
        now: Returns the time in seconds.

    Attributes:
        bytes_read: Bytes read so far.
        bytes_written: Bytes written so far.
        busy_seconds: Time so far during which at least one transfer was in flight.
    """

    def __init__(self, num_threads: int, recorder: Recorder | None = None, now: Callable[[], float] = time.perf_counter) -> None:
        self._recorder, self._now = recorder, now
        self._transfers: queue.SimpleQueue[_Transfer | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._in_flight = 0
        self._busy_since = 0.0
        self.bytes_read = 0
        self.bytes_written = 0
        self.busy_seconds = 0.0
        self._threads = [
            threading.Thread(target=self._work, args=(f"{IO} {index}",), name=f"flexgen-io-{index}", daemon=True)
            for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def read(
        self, parts: Sequence[tuple[File, int, memoryview]], on_done: Callable[[], None] | None = None, contents: Contents | None = None
    ) -> Ticket:
        """Start reading (file, offset, destination) ranges.  `on_done` runs on an I/O thread."""
        return self._submit(parts, False, on_done, contents)

    def write(
        self, parts: Sequence[tuple[File, int, memoryview]], on_done: Callable[[], None] | None = None, contents: Contents | None = None
    ) -> Ticket:
        """Start writing (file, offset, source) ranges.  Sources must stay unchanged until the ticket is done."""
        return self._submit(parts, True, on_done, contents)

    def _submit(
        self, parts: Sequence[tuple[File, int, memoryview]], write: bool, on_done: Callable[[], None] | None, contents: Contents | None
    ) -> Ticket:
        chunks = [
            (file, offset + at, view[at : at + CHUNK_BYTES]) for file, offset, view in parts for at in range(0, len(view), CHUNK_BYTES)
        ]
        record = None
        if self._recorder is not None and contents is not None and chunks:
            track, size = f"{contents.kind} {'to' if write else 'from'} disk", sum(len(view) for _, _, view in chunks)
            record = partial(self._recorder.transfer, track, contents.name, self._recorder.now(), bytes=size)
        ticket = Ticket(len(chunks), on_done, record)
        with self._lock:
            if chunks and self._in_flight == 0:
                self._busy_since = self._now()
            self._in_flight += len(chunks)
        for file, offset, view in chunks:
            self._transfers.put(_Transfer(file, offset, view, ticket, write, contents))
        return ticket

    def _work(self, track: str) -> None:
        while (transfer := self._transfers.get()) is not None:
            error: BaseException | None = None
            file, contents, size = transfer.file, transfer.contents, len(transfer.view)
            name = f"{'write' if transfer.write else 'read'} {file.path.name if contents is None else contents.name}"
            with recorded(self._recorder, track, name, bytes=size, file=file.path.name):
                try:
                    (file.write_from if transfer.write else file.read_into)(transfer.view, transfer.offset)
                except Exception as caught:  # noqa: BLE001 - handed to whoever waits for the ticket
                    error = caught
            with self._lock:
                self._in_flight -= 1
                if transfer.write:
                    self.bytes_written += size
                else:
                    self.bytes_read += size
                if self._in_flight == 0:
                    self.busy_seconds += self._now() - self._busy_since
            transfer.ticket.part_done(error)
            del transfer, file  # an idle thread keeps no buffer alive

    def close(self) -> None:
        """Let queued transfers finish, then end the threads."""
        for _ in self._threads:
            self._transfers.put(None)
        for thread in self._threads:
            thread.join()
