"""A job's requests in the order in which they enter, equal neighbours together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flexgen.plan.workload import Workload

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Queue:
    """Runs of equal neighbours: each attribute has a number per run.

    Attributes:
        prompt_len, output_len: tokens. reserved_len: of the answer, for which room is kept. most: that each may generate.
        found_len: leading tokens of the prompt that it finds computed. count: of requests.
    """

    prompt_len: Ints
    output_len: Ints
    reserved_len: Ints
    most: Ints
    found_len: Ints
    count: Ints

    @property
    def num_requests(self) -> int:
        return int(self.count.sum())

    def only(self, chosen: npt.NDArray[np.bool_]) -> Queue:
        """Without the runs that are not chosen."""
        return Queue(*(getattr(self, name)[chosen] for name in Queue.__slots__))


def queue_of(workload: Workload) -> Queue:
    """Longest reserved answer first, in input order among equals."""
    most = np.maximum(np.array(workload.output_lens, dtype=np.int64), 1)
    expected = np.array(workload.answer_lens, dtype=np.int64)
    kept = np.array(workload.reserved_lens, dtype=np.int64) if workload.reserved_lens else most
    reserved = np.maximum(kept, expected)
    order = np.argsort(-(kept if workload.reserved_lens else reserved), kind="stable")
    prompts, found = (np.array(lengths, dtype=np.int64) for lengths in (workload.prompt_lens, workload.found_lens))
    columns = [lengths[order] for lengths in (prompts, expected, reserved, most, found)]
    begins = np.ones(len(order), dtype=bool)
    if len(order) > 1:
        begins[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    first = np.flatnonzero(begins)
    prompt_len, output_len, reserved_len, may_have, found_len = (column[first] for column in columns)
    return Queue(prompt_len, output_len, reserved_len, may_have, found_len, count=np.diff(first, append=len(order)))
