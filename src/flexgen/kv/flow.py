"""How many prompts may have keys and values between the device and the host: memory for that is limited, and nothing else stops them."""

from __future__ import annotations

import threading

from flexgen.plan.policy import PROMPTS_ON_THE_WAY


class KVFlow:
    """Counts the micro-batches of prompts whose keys and values are on the way, of one layer each.  Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._number = 0

    def has_room(self) -> bool:
        """Return whether one more may enter."""
        return self._number < PROMPTS_ON_THE_WAY

    def enter(self) -> None:
        """Count a micro-batch whose keys and values start, or are asked for."""
        with self._lock:
            self._number += 1

    def leave(self) -> None:
        """Count that a micro-batch's have all arrived."""
        with self._lock:
            self._number -= 1
