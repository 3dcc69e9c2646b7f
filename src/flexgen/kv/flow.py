"""How many prompts may have keys and values on the way to their pages or from them: nothing else limits the memory that they take there."""

from __future__ import annotations

import threading

from flexgen.plan.policy import PROMPTS_ON_THE_WAY

PROMPTS_TO_STORE = 8  # where the host computes, and what is to be stored waits in the memory of computing


class KVFlow:
    """Counts the micro-batches of prompts whose keys and values are on the way, of one layer each.  Thread-safe.

    Args:
        most: The most that may be.
    """

    def __init__(self, most: int) -> None:
        self._lock = threading.Lock()
        self._number, self._most = 0, most

    @classmethod
    def of(cls, *, has_device: bool) -> KVFlow:
        """Return the flow between host and device, or within the host."""
        return cls(PROMPTS_ON_THE_WAY if has_device else PROMPTS_TO_STORE)

    def has_room(self) -> bool:
        """Return whether one more may enter."""
        return self._number < self._most

    def enter(self) -> None:
        """Count a micro-batch whose keys and values start, or are asked for."""
        with self._lock:
            self._number += 1

    def leave(self) -> None:
        """Count that a micro-batch's have all arrived."""
        with self._lock:
            self._number -= 1
