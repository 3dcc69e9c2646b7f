"""Masks of the tokens that may come next, found by llguidance on threads of their own, as many at a time as were asked for."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llguidance import LLMatcher


class Mask:
    """The mask for one matcher in its present state; until it is done, the matcher belongs to the threads.

    Args:
        matcher: The matcher.

    Attributes:
        words: A bit for each token, lowest bit first; None until the mask is done.
        error: The exception that came instead of it.
    """

    __slots__ = ("error", "matcher", "words")

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher
        self.words: np.ndarray | None = None
        self.error: BaseException | None = None

    @property
    def is_done(self) -> bool:
        return self.words is not None or self.error is not None


class MaskThread:
    """A thread that fills masks, with llguidance's own threads below it.

    Whatever was asked for while it was busy is filled together, without the interpreter, so that a thousand masks hardly disturb the
    thread that computes a pass.

    Args:
        num_tokens: The number of tokens that the matchers know.
        num_threads: The number of threads that fill masks.
    """

    def __init__(self, num_tokens: int, num_threads: int) -> None:
        from llguidance import LLExecutor

        self._num_words = -(-num_tokens // 32)
        self._executor = LLExecutor(num_threads)
        self._changed = threading.Condition()
        self._asked: list[Mask] = []
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="flexgen-masks", daemon=True)
        self._thread.start()

    def ask(self, matcher: LLMatcher) -> Mask:
        """Ask for the mask of a matcher, and return it undone."""
        mask = Mask(matcher)
        with self._changed:
            self._asked.append(mask)
            self._changed.notify_all()
        return mask

    def wait(self, mask: Mask) -> None:
        """Wait until the mask is done; the matcher belongs to the caller again."""
        if not mask.is_done:
            with self._changed:
                self._changed.wait_for(lambda: mask.is_done)

    def close(self) -> None:
        """End the thread once it has done what it was asked for."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asked or self._closed)
                masks, self._asked = self._asked, []
            if not masks:
                return
            self._fill(masks)
            with self._changed:
                self._changed.notify_all()

    def _fill(self, masks: list[Mask]) -> None:
        from llguidance.numpy import fill_next_token_bitmask_par

        words = np.zeros((len(masks), self._num_words), dtype=np.int32)
        try:
            fill_next_token_bitmask_par(self._executor, [(mask.matcher, row) for row, mask in enumerate(masks)], words)
        except BaseException as error:  # noqa: BLE001  (raised again in the thread that waits for the mask)
            for mask in masks:
                mask.error = error
            return
        for row, mask in enumerate(masks):
            mask.words = words[row]
