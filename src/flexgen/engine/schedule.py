"""The waiting sequences, and the rules by which a pass admits them.  Pure functions without tensors or clocks.

Each of the three schedules is a function.  Every pass carries the next token of each live sequence; the schedules differ in when
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
    """A queue of waiting sequences: preempted ones first, then those with the longest expected answers, then by their `order`."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, tuple[int, ...], LiveSequence]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[LiveSequence]:
        """Yield the sequences in the order of the queue, sorting only as many as are requested."""
        heap = self._heap.copy()
        while heap:
            yield heapq.heappop(heap)[2]

    def add(self, sequence: LiveSequence, order: tuple[int, ...], *, preempted: bool = False) -> None:
        """Add a sequence to the queue.

        Args:
            sequence: The sequence.
            order: The sort key among sequences with equally long expected answers; no two sequences have the same.
            preempted: Whether the sequence goes before all that were not preempted.
        """
        heapq.heappush(self._heap, (_BEFORE_ALL if preempted else -sequence.remaining, order, sequence))

    @property
    def first(self) -> LiveSequence:
        """The sequence at the head of the queue."""
        return self._heap[0][2]

    def pop(self) -> LiveSequence:
        """Remove the first sequence from the queue and return it."""
        return heapq.heappop(self._heap)[2]

    def clear(self) -> None:
        self._heap.clear()


@dataclass(slots=True)
class Quota:
    """The prompt tokens that passes may admit: a bucket that `per_pass` refills, so that long prompts average out."""

    per_pass: int
    credit: int = 0

    def refill(self) -> None:
        self.credit = min(self.credit + self.per_pass, self.per_pass)


Admit = Callable[[LiveSequence], bool]  # takes pages and makes the sequence live, or returns False


def diagonal(waiting: Iterable[LiveSequence], num_live: int, policy: Policy, quota: Quota, admit: Admit) -> int:
    """Admit prompts within the quota of the pass as others finish, as long as the projected KV fits.

    Args:
        waiting: The candidates, best first.
        num_live: The number of sequences that are live before the pass.
        policy: The policy, which limits the number of live sequences.
        quota: The quota; it is refilled, and the admitted prompts are subtracted.
        admit: A function that is called with one candidate after the other until it refuses one.

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
    """Admit a new block only when the old one is empty: the paper's Algorithm 1.  The arguments are those of `diagonal`."""
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
    """Admit one micro-batch at a time, as systems without blocks do.  The arguments are those of `diagonal`."""
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
