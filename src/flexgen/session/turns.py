"""Lets several callers take turns with one engine: one call at a time, in the process of the first call."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

from flexgen.errors import FlexGenError

_Item = TypeVar("_Item")


class Turns:
    """Lets calls of several threads wait for each other.

    An iterator over results holds the engine from its first result to its end. Other calls do not wait for an iterator, because nobody
    knows when it will go on: they are refused until it is exhausted or closed.

    A forked process is refused, because it has none of the threads and, after the first matrix product, no working OpenMP.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process: int | None = None  # of the first call
        self._closed = False
        self._taken = False  # by a call or by an iterator that has not reached its end
        self._working = False  # the holder of the lock is at work
        self._items: Generator[object] | None = None  # the items of the iterator that holds the engine

    def check(self) -> None:
        """Check that a call is possible.

        Raises:
            FlexGenError: This is a forked process, or the LLM is closed.
        """
        if self._is_elsewhere():
            raise FlexGenError(forked("this LLM has been used"))
        if self._closed:
            raise FlexGenError("this LLM is closed")
        self._process = os.getpid()

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Hold the engine for one call.

        Raises:
            FlexGenError: As for `check`, or because an iterator has not reached its end.
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
        """Yield the items, which the engine computes one by one; the lock is held only while it computes.

        Raises:
            FlexGenError: As for `call` when the first item is requested, and as for `check` at any other.
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
        """Take the last turn, after the call that is at work, and close an iterator that has not reached its end.

        Args:
            wait: Whether to wait for a call of another thread.

        Yields:
            Whether there is something to close: not in a forked process, nor (without waiting) while another call is at work.

        Raises:
            FlexGenError: The request comes from within the call that is at work.
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
    """Explain why a forked process is refused, and what to do instead.

    Args:
        used: A clause that says what was done before the fork.
    """
    return (
        f"{used} in the process that this one was forked from, whose threads are not here: products would wait for them for ever. "
        'Start processes with multiprocessing.get_context("spawn") and make the LLM in there'
    )
