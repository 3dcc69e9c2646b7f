"""A thread that computes attention in parallel with the rest of a pass, and what stands for it where nothing may be parallel."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import torch


class Worker:
    """A thread that runs jobs in order; the first error is kept and raised by `drain`.

    Submitting never waits, since the thread that submits has other micro-batches to go on with.
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        """Queue a job after the earlier ones."""
        self._jobs.put(job)

    def _work(self) -> None:
        with torch.no_grad():
            while (job := self._jobs.get()) is not None:
                try:
                    job()
                except BaseException as error:  # noqa: BLE001 - raised by drain()
                    self.error = self.error or error
                finally:
                    del job  # an idle thread keeps no tensors alive
                    self._jobs.task_done()
        self._jobs.task_done()

    def drain(self) -> None:
        """Return once all jobs have run, and raise the first error among them."""
        self._jobs.join()
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """Return once all jobs have run and the thread has ended."""
        self._jobs.put(None)
        self._thread.join()


class AtOnce:
    """Runs jobs on the thread that submits them, before `submit` returns; their errors are raised there."""

    def submit(self, job: Callable[[], None]) -> None:
        job()

    def drain(self) -> None:
        """Do nothing: all jobs have run."""

    def close(self) -> None:
        """Do nothing: there is no thread."""
