"""Sequences that wait to enter the block, in the order in which they should."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from flexgen.engine.sequence import Sequence

_BEFORE_ALL = -(1 << 60)


class Waiting:
    """Longest expected answer first, then as told by `order`; preempted sequences before all others."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, tuple[int, ...], Sequence]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Sequence]:
        """The sequences, first one first; what is not asked for is not sorted."""
        heap = self._heap.copy()
        while heap:
            yield heapq.heappop(heap)[2]

    def add(self, sequence: Sequence, order: tuple[int, ...], *, preempted: bool = False) -> None:
        """Let it wait.

        Args:
            order: among those of answers as long; no two sequences have the same.
        """
        heapq.heappush(self._heap, (_BEFORE_ALL if preempted else -sequence.remaining, order, sequence))

    @property
    def first(self) -> Sequence:
        """Whose turn it is next."""
        return self._heap[0][2]

    def pop(self) -> Sequence:
        """The first one, which no longer waits."""
        return heapq.heappop(self._heap)[2]

    def clear(self) -> None:
        """Forget all."""
        self._heap.clear()
