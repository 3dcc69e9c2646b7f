"""Who waits to enter the block, and how many of them the next pass admits.  Pure: no tensors, no clocks.

Three schedules are three functions.  Every pass carries the next token of each live sequence; they differ in when
new sequences may join.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from flexgen.engine.sequence import LiveSequence
from flexgen.plan.policy import Policy

_BEFORE_ALL = -(1 << 60)


class Waiting:
    """The sequences that wait: the longest expected answer first, then by their `order`; preempted sequences before all others."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, tuple[int, ...], LiveSequence]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[LiveSequence]:
        """The sequences, first one first; they are sorted only as far as they are asked for."""
        heap = self._heap.copy()
        while heap:
            yield heapq.heappop(heap)[2]

    def add(self, sequence: LiveSequence, order: tuple[int, ...], *, preempted: bool = False) -> None:
        """Add a sequence.

        Args:
            sequence: It waits from now on.
            order: Its place among those with equally long answers; no two sequences have the same.
            preempted: Whether it goes before all that were not preempted.
        """
        heapq.heappush(self._heap, (_BEFORE_ALL if preempted else -sequence.remaining, order, sequence))

    @property
    def first(self) -> LiveSequence:
        """The sequence whose turn it is next."""
        return self._heap[0][2]

    def pop(self) -> LiveSequence:
        """The first sequence, which no longer waits."""
        return heapq.heappop(self._heap)[2]

    def clear(self) -> None:
        self._heap.clear()


@dataclass(slots=True)
class Quota:
    """Prompt tokens that passes may admit: a bucket that `per_pass` refills, so that long prompts average out."""

    per_pass: int
    credit: int = 0

    def refill(self) -> None:
        self.credit = min(self.credit + self.per_pass, self.per_pass)


Admit = Callable[[LiveSequence], bool]  # takes pages and makes it live, or says no


def diagonal(waiting: Iterable[LiveSequence], num_live: int, policy: Policy, quota: Quota, admit: Admit) -> int:
    """Admit as others finish: prompts within the quota of the pass, as long as the projected KV fits.

    Args:
        waiting: The candidates, best first.
        num_live: The sequences that are live before the pass.
        policy: How many sequences may be live.
        quota: It is refilled, and the admitted prompts are taken off it.
        admit: Called with one candidate after the other until it refuses one.

    Returns:
        The number of admitted sequences.
    """
    quota.refill()
    count = 0
    for sequence in waiting:
        if num_live + count >= policy.max_num_seqs or quota.credit <= 0 or not admit(sequence):
            break
        quota.credit -= sequence.num_new
        count += 1
    return count


def zigzag(waiting: Iterable[LiveSequence], num_live: int, policy: Policy, quota: Quota, admit: Admit) -> int:
    """The paper's Algorithm 1: a new block only once the old one is empty.  Arguments as for `diagonal`."""
    del quota
    if num_live:
        return 0
    count = 0
    for sequence in waiting:
        if count >= policy.max_num_seqs or not admit(sequence):
            break
        count += 1
    return count


def row(waiting: Iterable[LiveSequence], num_live: int, policy: Policy, quota: Quota, admit: Admit) -> int:
    """One micro-batch at a time, as systems without blocks do.  Arguments as for `diagonal`."""
    del quota
    if num_live:
        return 0
    count = tokens = 0
    for sequence in waiting:
        if count and (tokens + sequence.num_own > policy.micro_batch_tokens or count >= policy.max_num_seqs):
            break
        if not admit(sequence):
            break
        tokens += sequence.num_new
        count += 1
    return count


SCHEDULES = {"diagonal": diagonal, "zigzag": zigzag, "row": row}
