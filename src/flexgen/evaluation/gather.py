"""Gathers what arrives one by one and answers it together.  Knows nothing of harnesses or models."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

from flexgen.errors import FlexGenError, is_failure

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


class Gatherer(Generic[_Item, _Answer]):
    """Gathers items that arrive within a short time, and answers them with one call.

    What arrives during a call waits for the next one.  The thread that makes the calls lives while there are items, so nothing has to be
    closed.

    Args:
        answer: Answers items, in their order.
        quiet_seconds: The time without a new item after which the items that have arrived are answered.
        most: The number of items that are answered without waiting for more.
    """

    def __init__(self, answer: Callable[[Sequence[_Item]], Sequence[_Answer]], *, quiet_seconds: float, most: int = 100_000) -> None:
        self._answer, self._quiet_seconds, self._most = answer, quiet_seconds, most
        self._changed = threading.Condition()
        self._waiting: list[tuple[_Item, Future[_Answer]]] = []
        self._thread: threading.Thread | None = None

    def submit(self, item: _Item) -> Future[_Answer]:
        """Return the future answer to an item.  Where the call that answers it fails, the future has its exception."""
        future: Future[_Answer] = Future()
        with self._changed:
            self._waiting.append((item, future))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="flexgen-gather", daemon=True)
                self._thread.start()
            self._changed.notify()
        return future

    def _work(self) -> None:
        while batch := self._next():
            self._settle([(item, future) for item, future in batch if future.set_running_or_notify_cancel()])

    def _next(self) -> list[tuple[_Item, Future[_Answer]]]:
        """Return the next items to answer, once no more arrive; none when there are none, which ends the thread."""
        with self._changed:
            while 0 < (before := len(self._waiting)) < self._most:
                self._changed.wait_for(lambda: len(self._waiting) > before, timeout=self._quiet_seconds)
                if len(self._waiting) == before:
                    break
            batch, self._waiting = self._waiting, []
            if not batch:
                self._thread = None
            return batch

    def _settle(self, batch: Sequence[tuple[_Item, Future[_Answer]]]) -> None:
        if not batch:
            return
        try:
            answers = self._answer([item for item, _ in batch])
            if len(answers) != len(batch):
                raise FlexGenError(f"{len(batch)} items have {len(answers)} answers")
        except BaseException as error:  # noqa: BLE001
            failure = error if is_failure(error) else FlexGenError("the run was stopped")
            for _, future in batch:
                future.set_exception(failure)
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            future.set_result(answer)
