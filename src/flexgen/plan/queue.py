"""A job's requests in the order in which they enter, equal neighbours together."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from flexgen.plan.workload import Workload


@dataclass(frozen=True, slots=True)
class Run:
    """`count` equal neighbours.

    Attributes:
        prompt_len, output_len: tokens. reserved_len: of the answer, for which room is kept. most: that each may generate.
        found_len: leading tokens of the prompt that it finds computed.
    """

    prompt_len: int
    output_len: int
    reserved_len: int
    most: int
    found_len: int
    count: int

    @property
    def own_len(self) -> int:
        """Prompt tokens that it computes."""
        return self.prompt_len - self.found_len


Queue = tuple[Run, ...]


def queue_of(workload: Workload) -> Queue:
    """Longest reserved answer first, in input order among equals."""
    most = [max(n, 1) for n in workload.output_lens]
    expected = workload.answer_lens
    reserved = [max(kept, n) for kept, n in zip(workload.reserved_lens or most, expected, strict=True)]
    first = workload.reserved_lens or reserved
    order = sorted(range(len(most)), key=lambda place: -first[place])
    found = workload.found_lens
    lengths = [(workload.prompt_lens[place], expected[place], reserved[place], most[place], found[place]) for place in order]
    return tuple(Run(*each, len(list(equal))) for each, equal in itertools.groupby(lengths))
