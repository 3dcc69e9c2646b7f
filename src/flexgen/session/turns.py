"""Whose turn it is with a model's engine: one call at a time, in the process that began.  Knows nothing of engines."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

from flexgen.errors import FlexGenError

_Item = TypeVar("_Item")


class Turns:
    """Calls of several threads take turns: each waits for the one before.

    Whoever iterates over results has the engine from the first to the end, but is not waited for, because nobody knows when, or in which
    thread, it goes on: other calls are refused until the iterator is exhausted or closed.

    A process that was forked has neither the threads nor, after the first product, a working OpenMP: it is refused.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process: int | None = None  # of the first call
        self._closed = False
        self._taken = False  # by a call or by an iterator
        self._working = False  # somebody is at work who holds the lock
        self._items: Generator[object] | None = None  # what is iterated over

    def check(self) -> None:
        """Raises FlexGenError where no call is possible: in a forked process, or after the end."""
        if self._is_elsewhere():
            raise FlexGenError(forked("this LLM has been used"))
        if self._closed:
            raise FlexGenError("this LLM is closed")
        self._process = os.getpid()

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """A call that has the engine until it ends.

        Raises:
            FlexGenError: as `check`, or because an iterator is not at its end.
        """
        self.check()
        with self._lock:
            self._take()
            try:
                with self._work():
                    yield
            finally:
                self._taken = False

    def iterate(self, items: Generator[_Item]) -> Generator[_Item]:
        """The items, which the engine computes one by one; the lock is held only while it does.

        Raises:
            FlexGenError: as `call`, when the first item is asked for; as `check`, at any other.
        """
        self.check()
        with self._lock:
            self._take()
            self._items = items
        try:
            while True:
                self.check()
                with self._lock, self._work():
                    try:
                        item = next(items)
                    except StopIteration:
                        return
                yield item
        finally:
            if not self._is_elsewhere():
                with self._lock:
                    items.close()
                    if self._items is items:
                        self._items, self._taken = None, False

    @contextlib.contextmanager
    def end(self, *, wait: bool) -> Iterator[bool]:
        """The last turn, after whoever is at work; an iterator that is not at its end is closed.

        Args:
            wait: for a call of another thread.

        Yields:
            whether there is anything to close: not in a forked process, nor, without waiting, while somebody is at work.

        Raises:
            FlexGenError: the call that is at work asks for it.
        """
        if self._is_elsewhere() or not self._lock.acquire(blocking=wait):
            yield False
            return
        try:
            if self._working:
                raise FlexGenError("this LLM cannot be closed from within its own call: stop that first")
            self._closed = True
            if self._items is not None:
                self._items.close()
            yield True
        finally:
            self._lock.release()

    def _is_elsewhere(self) -> bool:
        return self._process not in (None, os.getpid())

    def _take(self) -> None:
        if self._closed:
            raise FlexGenError("this LLM is closed")
        if self._taken:
            raise FlexGenError("this LLM is busy with an iterator of stream() that is not at its end: exhaust or close that first")
        self._taken = True

    @contextlib.contextmanager
    def _work(self) -> Iterator[None]:
        if self._working:
            raise FlexGenError("this iterator is at work already")
        self._working = True
        try:
            yield
        finally:
            self._working = False


def forked(used: str) -> str:
    """Why a forked process is refused, and what to do.

    Args:
        used: what was done before, as a clause.
    """
    return (
        f"{used} in the process that this one was forked from, whose threads are not here: products would wait for them for ever. "
        'Start processes with multiprocessing.get_context("spawn") and make the LLM in there'
    )
