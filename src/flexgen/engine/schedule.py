"""Which prompts the next pass admits, and how its slices are packed.  Pure: no tensors, no clocks.

Three schedules are three functions.  Every pass carries the next token of each live sequence; they differ in when
new sequences may join.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from flexgen.engine.sequence import Sequence

Pages = Callable[[np.ndarray], np.ndarray]
MAX_PROJECTED_TIMES = 256
SMALL_REMAINDER = 0.375  # of a micro-batch


@dataclass(slots=True)
class Quota:
    """Prompt tokens that passes may admit: a bucket that `per_pass` refills, so that long prompts average out."""

    per_pass: int
    credit: int = 0

    def refill(self) -> None:
        self.credit = min(self.credit + self.per_pass, self.per_pass)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What bounds the block.

    Attributes:
        max_num_seqs: live sequences. micro_batch_tokens: the "row" schedule's batch.
    """

    max_num_seqs: int
    micro_batch_tokens: int


Admit = Callable[[Sequence], bool]  # takes pages and makes it live, or says no


def diagonal(waiting: Iterable[Sequence], live: SequenceOf[Sequence], limits: Limits, quota: Quota, admit: Admit) -> int:
    """Admit as others finish: prompts within the quota of the pass, as long as the projected KV fits.

    Args:
        waiting: candidates, best first.

    Returns:
        the number of admitted sequences.
    """
    quota.refill()
    count = 0
    for sequence in waiting:
        if len(live) + count >= limits.max_num_seqs or quota.credit <= 0 or not admit(sequence):
            break
        quota.credit -= sequence.num_new
        count += 1
    return count


def zigzag(waiting: Iterable[Sequence], live: SequenceOf[Sequence], limits: Limits, quota: Quota, admit: Admit) -> int:
    """The paper's Algorithm 1: a new block only once the old one is empty."""
    del quota
    if live:
        return 0
    count = 0
    for sequence in waiting:
        if count >= limits.max_num_seqs or not admit(sequence):
            break
        count += 1
    return count


def row(waiting: Iterable[Sequence], live: SequenceOf[Sequence], limits: Limits, quota: Quota, admit: Admit) -> int:
    """One micro-batch at a time, as systems without blocks do."""
    del quota
    if live:
        return 0
    count = tokens = 0
    for sequence in waiting:
        if count and (tokens + sequence.num_own > limits.micro_batch_tokens or count >= limits.max_num_seqs):
            break
        if not admit(sequence):
            break
        tokens += sequence.num_new
        count += 1
    return count


SCHEDULES = {"diagonal": diagonal, "zigzag": zigzag, "row": row}


def fits_projected(
    stored: np.ndarray, remaining: np.ndarray, candidate: tuple[int, int], pages: SequenceOf[Pages], capacity: SequenceOf[int],
    elsewhere: SequenceOf[np.ndarray | int],
) -> bool:  # fmt: skip
    """Whether a candidate's KV fits beside the live ones' at every future pass.

    Args:
        stored: tokens each live sequence has stored after this pass. remaining: passes it still takes after it.
        candidate: (stored, remaining) of the one that would join.
        pages: per layer group, pages held at given lengths. capacity: pages per group.
        elsewhere: per group, how many of each sequence's pages (the candidate's last) are counted elsewhere.

    A sequence holds stored + t tokens t passes from now, while t <= remaining; the sum peaks where one ends.
    """
    lengths = np.append(stored, candidate[0])
    ends = np.append(remaining, candidate[1])
    times = np.unique(ends)
    if len(times) > MAX_PROJECTED_TIMES:
        times = times[np.linspace(0, len(times) - 1, MAX_PROJECTED_TIMES).astype(int)]
    future = lengths[None, :] + np.minimum(times[:, None], ends[None, :])  # (times, sequences)
    alive = np.append(-1, times[:-1])[:, None] < ends[None, :]  # those that end since the last of the times looked at, too
    return all(
        ((held(future) - others) * alive).sum(axis=1).max() <= room for held, room, others in zip(pages, capacity, elsewhere, strict=True)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """What one sequence contributes to one micro-batch: tokens [start, start + length); `last` samples."""

    sequence: Sequence
    start: int
    length: int
    last: bool


def defer_remainder(sequences: SequenceOf[Sequence], rows: int) -> None:
    """Bring a pass to a multiple of `rows`: a small remainder of prompt tokens is left to the next pass.

    A micro-batch of few rows is computed at a fraction of the rate of a full one (docs/log.md).  The youngest
    prompts give way; a pass never ends up below `rows`.

    Args:
        sequences: of one KV home, oldest first, nothing deferred yet; their `deferred` is set.
    """
    total = sum(sequence.num_new for sequence in sequences)
    of_prompts = sum(sequence.num_new for sequence in sequences if sequence.num_new > 1)
    excess = total % rows
    if total < rows or excess > min(SMALL_REMAINDER * rows, of_prompts):
        return
    for sequence in reversed(sequences):
        if excess and sequence.num_new > 1:
            sequence.deferred = min(excess, sequence.num_new)
            excess -= sequence.deferred


def defer_behind(sequences: SequenceOf[Sequence], *, within_pass: bool) -> None:
    """Leave to the next pass what begins with a prefix that is not stored by then.

    Args:
        sequences: of one KV home, oldest first; their `deferred` is set. within_pass: whether a prefix that this pass
            computes is there for the micro-batches behind it.
    """
    for sequence in sequences:
        writer, source = sequence.behind, sequence.source
        if writer is not None and source is not None and (not within_pass or len(writer.tokens) - writer.deferred < source.length):
            sequence.deferred = sequence.num_new


def pack(sequences: SequenceOf[Sequence], micro_batch_tokens: int, *, mix: bool, chunk: bool = True) -> list[list[Slice]]:
    """Micro-batches of one pass: next tokens first, prompts after, long prompts in consecutive chunks.

    Micro-batches that mix are filled to the last row, whatever prompt that cuts; others cut only what is longer.
    Next tokens of sequences that run behind a prompt of this pass come last.

    Args:
        sequences: of one KV home and one position regime. mix: whether next tokens and prompts may share a micro-batch.
        chunk: whether a prompt may be cut; otherwise a long one is a micro-batch of its own, however large.
    """
    steps = [s for s in sequences if s.num_new == 1 and s.num_stored > 0]
    prompts = [s for s in sequences if not (s.num_new == 1 and s.num_stored > 0)]
    batches = _next_tokens([s for s in steps if s.behind is None], micro_batch_tokens)
    room = micro_batch_tokens - len(batches[-1]) if batches and mix else 0
    for sequence in prompts:
        start, stop = sequence.num_stored, len(sequence.tokens) - sequence.deferred
        if not (mix and chunk) and stop - start > room and room < micro_batch_tokens:
            batches.append([])
            room = micro_batch_tokens
        while start < stop:
            if room == 0:
                batches.append([])
                room = micro_batch_tokens
            length = min(stop - start, room) if chunk else stop - start
            batches[-1].append(Slice(sequence=sequence, start=start, length=length, last=start + length == len(sequence.tokens)))
            start, room = start + length, max(room - length, 0)
            if length == 1 and batches[-1][-1].start > 0 and not mix:
                room = 0  # a last chunk of one token is computed as a next token is
    return batches + _next_tokens([s for s in steps if s.behind is not None and not s.deferred], micro_batch_tokens)


def _next_tokens(sequences: SequenceOf[Sequence], micro_batch_tokens: int) -> list[list[Slice]]:
    """Micro-batches of sequences that compute one token each."""
    slices = [Slice(sequence=s, start=s.num_stored, length=1, last=True) for s in sequences]
    return [slices[start : start + micro_batch_tokens] for start in range(0, len(slices), micro_batch_tokens)]
