"""The plan of one pass, as plain values without references to live objects, so that a plan can be sent to another process.

The engine's schedule makes a `PassPlan` from its live sequences.  The code that executes it knows no sequences: it returns logits
for the wanted positions of the plan, and the engine finds the sequences by their ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Consecutive tokens of one sequence that are computed together.

    Attributes:
        sequence: The id of the sequence.
        token_ids: The tokens to compute.
        start: The position of the first token in the sequence; the KV of all tokens before it is stored, or will be by earlier slices.
        wanted: The positions in the sequence whose logits are wanted; an empty range for none.
        scored: The positions in the sequence at which the log probability of a known token is wanted, ascending; a position may be there
            several times, for tokens that are alternatives of each other.
        targets: The known token for each of them.
        num_likeliest: The number of likeliest tokens that are wanted beside it at these positions; -1 for all.
        prompt_len: The length of the sequence's prompt.
        total: The number of tokens that the sequence has now, those of later chunks included.
        tables: For each layer group, the page ids of the sequence's pages, up to the last token of the slice at least.
    """

    sequence: int
    token_ids: tuple[int, ...]
    start: int
    prompt_len: int
    total: int
    wanted: range = range(0)
    scored: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()
    num_likeliest: int = 0
    tables: tuple[tuple[int, ...], ...] = ()

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def stop(self) -> int:
        """The position after the last token."""
        return self.start + len(self.token_ids)

    @property
    def is_decode(self) -> bool:
        """Whether the slice is a single token that continues a sequence."""
        return self.start > 0 and len(self.token_ids) == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Slices that go through the model together.

    Attributes:
        home: The tier on which the KV of all its sequences lives.
        slices: The slices; single tokens that continue a sequence come first.
        after: Indices of the micro-batches of the pass whose attention must come first in every layer, because they store what these
            slices continue: the previous chunk of a prompt, or a shared prefix.
        filler: The number of rows (0 or 1) that repeat the last token and are discarded: CPU matrix kernels lose up to a quarter of their
            rate at odd row counts (docs/log.md).
    """

    home: str
    slices: tuple[Slice, ...]
    after: tuple[int, ...] = ()
    filler: int = 0

    @property
    def wanted(self) -> Iterator[tuple[int, int]]:
        """The (sequence id, position) of each row of the logits, in order."""
        return ((each.sequence, position) for each in self.slices for position in each.wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassPlan:
    """Everything that one pass over the model's layers computes.

    Attributes:
        micro_batches: The micro-batches, in the order in which they should go first.
    """

    micro_batches: tuple[MicroBatch, ...] = ()
