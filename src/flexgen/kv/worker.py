"""A thread that computes attention in parallel with the rest of a pass, and what stands for it where nothing may be parallel."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from flexgen.devices.base import Event

POLL_SECONDS = 0.0001  # between looks at what has to arrive: no thread can sleep until one of two events


class Worker:
    """A thread that runs jobs; the first error is kept and raised by `drain`.

    There are two queues, each of which keeps its order.  A job begins when what it needs has arrived; meanwhile the other queue goes on.
    Submitting never waits, since the thread that submits has other micro-batches to go on with.
    """

    def __init__(self, name: str) -> None:
        self._condition = threading.Condition()
        self._first, self._others = deque[_Job](), deque[_Job]()
        self._num_unfinished, self._closing = 0, False
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None], arrival: Event | None = None, *, first: bool = False) -> None:
        """Queue a job.

        Args:
            job: The job.
            arrival: The completion of what the job needs; None if it needs nothing.
            first: Whether it depends on no job of the other queue, nor such a job on it; it then goes before those.
        """
        with self._condition:
            self._num_unfinished += 1
            (self._first if first else self._others).append(_Job(job, arrival))
            self._condition.notify_all()

    def _work(self) -> None:
        with torch.no_grad():
            while (job := self._next()) is not None:
                try:
                    job.run()
                except BaseException as error:  # noqa: BLE001 - raised by drain()
                    self.error = self.error or error
                finally:
                    del job  # an idle thread keeps no tensors alive
                    with self._condition:
                        self._num_unfinished -= 1
                        self._condition.notify_all()

    def _next(self) -> _Job | None:
        """Wait for a job that can begin, and return it; None when closing and nothing is left."""
        with self._condition:
            while True:
                for jobs in (self._first, self._others):
                    if jobs and jobs[0].may_begin():
                        return jobs.popleft()
                is_empty = not self._first and not self._others
                if is_empty and self._closing:
                    return None
                self._condition.wait(None if is_empty else POLL_SECONDS)

    def drain(self) -> None:
        """Return once all jobs have run, and raise the first error among them."""
        with self._condition:
            self._condition.wait_for(lambda: not self._num_unfinished)
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """Return once all jobs have run and the thread has ended."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        self._thread.join()


@dataclass(frozen=True, slots=True)
class _Job:
    """A job, and what has to arrive before it begins."""

    run: Callable[[], None]
    arrival: Event | None

    def may_begin(self) -> bool:
        """Return whether what the job needs has arrived, or never will, which the job finds out."""
        try:
            return self.arrival is None or self.arrival.done()
        except Exception:  # noqa: BLE001 - the job raises it again
            return True


class AtOnce:
    """Runs jobs on the thread that submits them, before `submit` returns; their errors are raised there."""

    def submit(self, job: Callable[[], None], arrival: Event | None = None, *, first: bool = False) -> None:
        job()

    def drain(self) -> None:
        """Do nothing: all jobs have run."""

    def close(self) -> None:
        """Do nothing: there is no thread."""
