"""Sparse attention: which queries leave positions out, and how many values were not read because of it.

Tokens of a prompt attend to all that they see.  A generated token keeps, per head, a share of the positions that it sees, and its own page
(kernels/sparse.py).  Both follow from positions and the length of the prompt alone, so that it does not matter whether a generated token is
computed as the next one or, after a preemption or by a later run, together with the prompt.
"""

from __future__ import annotations

import threading

from flexgen.passes.geometry import KVGeometry
from flexgen.passes.plan import Slice
from flexgen.plan.policy import kept_positions


class ValueCounter:
    """The bytes of values that next tokens saw and did not read, counted by several threads.

    Attributes:
        seen_bytes: The bytes of the values at all visible positions.
        unread_bytes: The bytes of those that were not read.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.seen_bytes = self.unread_bytes = 0

    def add(self, seen_bytes: int, unread_bytes: int) -> None:
        """Count the attention of one layer."""
        with self._lock:
            self.seen_bytes += seen_bytes
            self.unread_bytes += unread_bytes


class SparseAttention:
    """The share of positions that generated tokens keep, at one home of KV.

    Args:
        share: The share, 0 < share <= 1.
        counter: What counts the values that are read.
        saves: Whether values are read only once it is known which ones are kept; on disk they are read ahead together with the keys.
    """

    def __init__(self, share: float, counter: ValueCounter, *, saves: bool = True) -> None:
        self._share, self._counter, self._saves = share, counter, saves

    def kept(self, geometry: KVGeometry, position: int) -> int:
        """Return how many positions a generated token keeps for their scores; as many as it sees where it keeps all."""
        return kept_positions(self._share, _num_visible(geometry, position))

    def leaves_out(self, geometry: KVGeometry, each: Slice, position: int) -> bool:
        """Return whether the token at this position of a slice keeps fewer positions than it sees."""
        return position >= each.prompt_len and self.kept(geometry, position) < _num_visible(geometry, position)

    def num_dense(self, geometry: KVGeometry, each: Slice) -> int:
        """Return how many tokens of a slice come before the first one that leaves positions out."""
        generated = range(max(each.start, each.prompt_len), each.stop)
        return next((place for place in generated if self.leaves_out(geometry, each, place)), each.stop) - each.start

    def count(self, seen_bytes: int, unread_bytes: int) -> None:
        """Count the values of next tokens in one layer."""
        self._counter.add(seen_bytes, unread_bytes if self._saves else 0)


def _num_visible(geometry: KVGeometry, position: int) -> int:
    return position + 1 - geometry.first_visible(position)
