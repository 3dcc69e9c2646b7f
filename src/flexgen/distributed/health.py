"""Whether all ranks of a run are well, and the end of the run on all of them when one is not.

Every rank counts a number up in the store (its beat) and reads those of all others.  A rank is lost when its beat stands still, when a
connection to it breaks or is silent, or when it reports an error.  The first report in the store is the verdict for everybody.  A second
thread never waits for the store: it notices a store that is lost or does not answer, and ends the process if its main thread is stuck.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal

from flexgen.distributed.failure import Failure, HealthStore, Timings
from flexgen.errors import StageError

logger = logging.getLogger(__name__)

EXIT_CODE = 75  # that of StageError, for a process that has to be ended from a thread
_FAILURE = "failure"  # the key of the verdict
_DONE, _LEFT = b"done", b"left"  # in place of a beat: the rank waits for the others' end, or needs the store no longer


class Health:
    """Watches the other ranks.  Thread-safe.

    Args:
        rank: The own rank.
        hosts: The hosts of all ranks.
        connect: A function that returns a connection to the store, in which every rank has a beat already.
        store_rank: The rank whose process serves the store; None where another process does.
        timings: When a rank counts as lost.
        watchdog: Whether the process may be ended when its main thread is stuck.
        end: The function that ends the process, with its exit code.
    """

    def __init__(
        self, rank: int, hosts: Sequence[str], connect: Callable[[], HealthStore], *,
        store_rank: int | None, timings: Timings, watchdog: bool = True, end: Callable[[int], Any] = os._exit,
    ) -> None:  # fmt: skip
        self.rank, self.hosts, self.timings = rank, tuple(hosts), timings
        self._connect, self._store_rank, self._end = connect, store_rank, end
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []
        self._failure: Failure | None = None
        self._suspicion: Failure | None = None
        self._suspected_at = self._failed_at = 0.0
        self._answered_at = self._asked_at = time.monotonic()  # the store, as the two threads know
        self._armed, self._is_delivered = watchdog, False
        self._state: Literal["alive", "done", "left"] = "alive"
        self._beats: dict[int, tuple[bytes, float]] = {}  # of the others, with the time at which they changed
        self._is_over, self._wake = threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._pulse, "health-pulse"), (self._watch, "health-watch"))
        ]

    def start(self) -> None:
        """Begin to watch."""
        for thread in self._threads:
            thread.start()

    @property
    def has_failed(self) -> bool:
        """Whether the run ends because of a loss."""
        return self._failure is not None

    def check(self) -> None:
        """Return if nothing is known to be wrong.

        Raises:
            StageError: A rank is lost; the message names it, its host, and what is wrong with it.
        """
        if self._failure is not None:
            if threading.current_thread() is threading.main_thread():
                self._delivered()
            raise StageError(self.describe(self._failure))

    def suspect(self, rank: int, reason: str) -> None:
        """Report that a rank seems to be lost; what becomes of it is decided by whoever reports first.

        Args:
            rank: The rank.
            reason: What is wrong with it, as the end of a sentence that begins with its name.
        """
        with self._lock:
            if self._suspicion is None:
                self._suspicion, self._suspected_at = Failure(rank, reason), time.monotonic()
        self._wake.set()

    def fail(self, reason: str) -> None:
        """Report that the own rank ends with an error, and wait until the others can know it, or for a short time in vain."""
        with self._lock:
            self._suspicion, self._suspected_at = Failure(self.rank, reason), time.monotonic()
            self._armed = False
        self._wake.set()
        with suppress(StageError):
            self.settle()

    def settle(self, *, is_certain: bool = False) -> None:
        """Wait until a suspicion, if there is one, has become a loss or has turned out to be none, but not for long.

        Args:
            is_certain: Whether something is wrong although nobody is suspected yet.

        Raises:
            StageError: It is a loss.
        """
        self._wake.set()
        until = time.monotonic() + self.timings.verdict_seconds + 1.0
        while (is_certain or self._suspicion is not None) and self._failure is None and time.monotonic() < until:
            time.sleep(0.01)
        self.check()

    def on_failure(self, callback: Callable[[], None]) -> None:
        """Call a short function when a rank is lost, at once if that is so already."""
        with self._lock:
            self._callbacks.append(callback)
            failed = self._failure is not None
        if failed:
            callback()

    def wait_for_all(self, timeout: float) -> None:
        """Say that this rank is done, and wait until all are.

        Raises:
            StageError: A rank was lost before, or is not done in time.
        """
        self._state = "done"
        self._wake.set()
        until = time.monotonic() + timeout
        while missing := [rank for rank in range(len(self.hosts)) if rank != self.rank and not self._is_done(rank)]:
            self.check()
            if time.monotonic() > until:
                raise StageError(self.late(missing[0], timeout))
            self._wake.set()
            time.sleep(0.02)

    def stop(self) -> None:
        """Watch no longer.  A process that serves the store has to wait for the others then."""
        self._state, self._armed = "left", False
        self._is_over.set()
        self._wake.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(self.timings.beat_seconds)  # it hangs where the store does
        self._callbacks.clear()

    def wait_for_leavers(self, store: HealthStore) -> None:
        """Wait until all others know how the run ended, but not for long: they may be lost."""
        lost = self._failure.rank if self._failure is not None else None
        others = [rank for rank in range(len(self.hosts)) if rank not in (self.rank, lost)]
        until = time.monotonic() + 3 * self.timings.beat_seconds
        with suppress(RuntimeError):
            while others and time.monotonic() < until:
                beats = store.multi_get([_beat(rank) for rank in others])
                others = [rank for rank, beat in zip(others, beats, strict=True) if beat != _LEFT]
                time.sleep(0.02)

    def name(self, rank: int | None) -> str:
        """Return how a rank is called in messages."""
        return "the server of the store" if rank is None else f"rank {rank} on {self.hosts[rank]}"

    def late(self, rank: int, seconds: float) -> str:
        """Return what is said of a rank that does not come to its end."""
        return f"{self.name(rank)} is not done {seconds:g} s after {self.name(self.rank)}"

    def describe(self, failure: Failure) -> str:
        """Return a failure as a sentence."""
        return f"{self.name(failure.rank)} {failure.reason}"

    # -- the thread that talks to the store --------------------------------------------------------------------------------------------

    def _pulse(self) -> None:
        try:
            store = self._connect()
            self._answered_at = self._asked_at = time.monotonic()
            count = 0
            while self._failure is None and not self._is_over.is_set():
                count += 1
                self._beat_once(store, count)
                self._wake.wait(self.timings.beat_seconds)
                self._wake.clear()
            store.set(_beat(self.rank), _LEFT.decode())
        except (RuntimeError, StageError) as error:  # whatever goes wrong in torch's store
            if not self._is_over.is_set() and self._failure is None:
                self._store_is_lost(f"has ended: its store is gone ({str(error).partition(chr(10))[0]})", is_gone=True)

    def _beat_once(self, store: HealthStore, count: int) -> None:
        """Write the own beat, read all others, and what is the verdict if there is one."""
        store.set(_beat(self.rank), str(count) if self._state == "alive" else _DONE.decode())
        if store.check([_FAILURE]):
            return self._conclude(Failure.from_json(store.get(_FAILURE), len(self.hosts)))
        others = [rank for rank in range(len(self.hosts)) if rank != self.rank]
        beats = store.multi_get([_beat(rank) for rank in others]) if others else []
        now = time.monotonic()
        paused = now - self._asked_at > 3 * self.timings.beat_seconds  # this process stood still, and may not judge others by that
        self._answered_at = self._asked_at = now
        for rank, beat in zip(others, beats, strict=True):
            known, since = self._beats.get(rank, (b"", now))
            self._beats[rank] = (beat, now if paused or beat != known else since)
            if not self._is_done(rank) and now - self._beats[rank][1] > self.timings.silence_seconds:
                self.suspect(rank, f"does not answer: it was not heard of for {self.timings.silence_seconds:g} s")
        with self._lock:
            if self._suspicion is not None and self._suspicion.rank is not None and self._is_done(self._suspicion.rank):
                self._suspicion = None  # a connection that ended as it should
            suspicion = self._suspicion
        if suspicion is not None:
            verdict = store.compare_set(_FAILURE, "", suspicion.to_json())
            self._conclude(Failure.from_json(verdict, len(self.hosts)))
        return None

    def _is_done(self, rank: int) -> bool:
        return self._beats.get(rank, (b"", 0.0))[0] in (_DONE, _LEFT)

    # -- the thread that waits for nobody ----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        timings, last = self.timings, time.monotonic()
        while not self._is_over.wait(min(0.25, timings.beat_seconds / 2)):
            now = time.monotonic()
            if now - last > 2 * timings.beat_seconds:  # this process stood still: the others are asked before anybody is blamed
                self._answered_at = self._suspected_at = now
            last = now
            if self._failure is not None:
                if self._armed and now - self._failed_at > timings.grace_seconds:
                    self._end_process(self._failure)
            elif now - self._answered_at > timings.silence_seconds:
                self._store_is_lost(f"does not answer: its store was not heard of for {timings.silence_seconds:g} s")
            elif self._suspicion is not None and now - self._suspected_at > timings.verdict_seconds:
                self._store_is_lost("does not answer: its store says nothing")

    def _store_is_lost(self, reason: str, *, is_gone: bool = False) -> None:
        """Conclude without the store: whoever serves it is lost, or else whoever is suspected.

        A store that `is_gone` at once has ended: ranks that noticed it earlier have ended because of that, and their connections broke.
        """
        suspicion = self._suspicion
        if suspicion is not None:
            own = suspicion.rank == self.rank  # its own error is certain
            answered = self._suspected_at - self._answered_at < self.timings.verdict_seconds  # until what is suspected happened
            if own or (answered and not is_gone and self._store_rank in (None, self.rank)):
                return self._conclude(suspicion)
        return self._conclude(Failure(self._store_rank, reason))

    def _conclude(self, failure: Failure) -> None:
        with self._lock:
            if self._failure is not None:
                return
            self._failed_at = time.monotonic()
            self._failure = failure
            callbacks = tuple(self._callbacks)
        logger.debug("the run ends: %s", self.describe(failure))
        for callback in callbacks:
            try:
                callback()
            except Exception:
                logger.exception("a wait could not be ended")

    def _delivered(self) -> None:
        """The main thread knows.  The leader may take its time to write what it has; a follower has only to end, as long as before."""
        if self.rank == 0:
            self._armed = False
        elif not self._is_delivered:
            self._is_delivered, self._failed_at = True, time.monotonic()

    def _end_process(self, failure: Failure) -> None:
        self._armed = False
        os.write(2, f"flexgen: {self.describe(failure)}\nthe same command goes on\n".encode())
        self._end(EXIT_CODE)


def _beat(rank: int) -> str:
    return f"beat/{rank}"


def first_beat(store: HealthStore, rank: int) -> None:
    """Give a rank its first beat, before others can look for it."""
    store.set(_beat(rank), "0")
