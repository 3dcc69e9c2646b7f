"""Log probabilities of known tokens, from logits that arrive in ranges of rows and of the vocabulary.

The logits of all positions of a micro-batch are never held together: each range is reduced as soon as it is computed.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from flexgen.base.quantities import MIB
from flexgen.plan.policy import SCORED_SLICE_BYTES

BLOCK_BYTES = 4 * MIB  # of logits in float32 that are reduced at a time, so that copies of them stay small


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The scores of the targets of a micro-batch.

    Attributes:
        logprobs: The log probability of each target, float64 (targets,); not finite if the logits of its row are not.
        likeliest: The ids of the likeliest tokens of its row, the likeliest first and the lower id first among equals, int64 (targets, k).
        likeliest_logprobs: Their log probabilities, float64 (targets, k).
    """

    logprobs: torch.Tensor
    likeliest: torch.Tensor
    likeliest_logprobs: torch.Tensor


class Scorer:
    """Scores rows of logits against target tokens.

    Args:
        targets: The token ids whose log probabilities are wanted, int64 (targets,), where computing happens.
        num_likeliest: The number of likeliest tokens that are wanted for each row; -1 for all.
        rows: The row of each target, ascending; None if each has one of its own.
        rows_there: The same, int64 (targets,), where computing happens; None to copy them there.

    Attributes:
        num_rows: The number of rows.
    """

    def __init__(
        self, targets: torch.Tensor, num_likeliest: int, rows: Sequence[int] | None = None, rows_there: torch.Tensor | None = None
    ) -> None:
        self._rows = range(len(targets)) if rows is None else rows
        self.num_rows = self._rows[-1] + 1 if self._rows else 0
        self._targets, self._num_likeliest = targets, sys.maxsize if num_likeliest == -1 else num_likeliest
        self._row_of = torch.tensor(self._rows, dtype=torch.int64, device=targets.device) if rows_there is None else rows_there
        new = {"dtype": torch.float64, "device": targets.device}
        self._log_sums = torch.full((self.num_rows,), -torch.inf, **new)
        self._logits = torch.full((len(targets),), torch.nan, **new)
        self._likeliest = torch.empty((self.num_rows, 0), dtype=torch.int64, device=targets.device)
        self._largest = torch.empty((self.num_rows, 0), **new)

    def slices(self, width: int, itemsize: int) -> Iterator[slice]:
        """Yield ranges of rows whose logits take SCORED_SLICE_BYTES or less.

        Args:
            width: The number of logits of a row.
            itemsize: The bytes of one logit.
        """
        step = max(SCORED_SLICE_BYTES // (width * itemsize), 1)
        return (slice(start, min(start + step, self.num_rows)) for start in range(0, self.num_rows, step))

    def add(self, logits: Iterable[tuple[slice, torch.Tensor]], first_id: int) -> None:
        """Take the logits of all rows for the next range of token ids; ranges come in ascending order.

        Args:
            logits: For ranges of rows, in ascending order, their logits, (rows, ids).
            first_id: The first token id of the range.
        """
        likeliest: list[torch.Tensor] = []
        largest: list[torch.Tensor] = []
        for rows, block in _blocks(logits):
            numbers = block if block.dtype == torch.float64 else block.float()
            self._log_sums[rows] = torch.logaddexp(self._log_sums[rows], torch.logsumexp(numbers, dim=-1).double())
            self._take_targets(rows, numbers, first_id)
            if self._num_likeliest:
                ids = likeliest_ids(numbers, min(self._num_likeliest, numbers.shape[1]))
                likeliest.append(ids + first_id)
                largest.append(numbers.gather(1, ids).double())
        if self._num_likeliest:
            self._merge(torch.cat(likeliest), torch.cat(largest))

    def _take_targets(self, rows: slice, numbers: torch.Tensor, first_id: int) -> None:
        """Keep the logits of the targets that are in these rows and in this range of token ids."""
        own = slice(bisect_left(self._rows, rows.start), bisect_left(self._rows, rows.stop))
        at = self._targets[own] - first_id
        found = numbers[self._row_of[own] - rows.start, at.clamp(0, numbers.shape[1] - 1)].double()
        self._logits[own] = torch.where((at >= 0) & (at < numbers.shape[1]), found, self._logits[own])

    def _merge(self, ids: torch.Tensor, numbers: torch.Tensor) -> None:
        """Keep the likeliest of the tokens so far and of those of another range, whose ids are higher."""
        both, all_ids = torch.cat((self._largest, numbers), dim=1), torch.cat((self._likeliest, ids), dim=1)
        order = both.sort(dim=1, descending=True, stable=True).indices[:, : self._num_likeliest]
        self._largest, self._likeliest = both.gather(1, order), all_ids.gather(1, order)

    def result(self) -> Scores:
        """Return the scores, once all logits have been added."""
        log_sums = self._log_sums[self._row_of]
        return Scores(
            logprobs=self._logits - log_sums,
            likeliest=self._likeliest[self._row_of],
            likeliest_logprobs=self._largest[self._row_of] - log_sums[:, None],
        )


def _blocks(logits: Iterable[tuple[slice, torch.Tensor]]) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield the same rows in ranges of BLOCK_BYTES or less, as float32."""
    for rows, each in logits:
        step = max(BLOCK_BYTES // (4 * each.shape[1]), 1)
        for start in range(0, len(each), step):
            block = each[start : start + step]
            yield slice(rows.start + start, rows.start + start + len(block)), block


def likeliest_ids(numbers: torch.Tensor, count: int) -> torch.Tensor:
    """Return the indices of the `count` largest numbers of each row, (rows, count): the largest first, and the lower index among equals.

    On a device whole rows are sorted, because to ask whether any numbers are equal would be to wait for it.
    """
    if numbers.device.type != "cpu":
        return numbers.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    if count == 1:
        return numbers.argmax(dim=-1, keepdim=True)
    values, ids = numbers.topk(count, dim=-1)
    ambiguous = (numbers >= values[:, -1:]).sum(dim=-1) > count
    for row in ambiguous.nonzero()[:, 0].tolist():  # topk takes any of the numbers that equal the last one
        at = (numbers[row] >= values[row, -1]).nonzero()[:, 0]
        ids[row] = at[numbers[row, at].sort(descending=True, stable=True).indices[:count]]
    ids = ids.sort(dim=-1).values
    order = numbers.gather(1, ids).sort(dim=-1, descending=True, stable=True).indices
    return ids.gather(1, order)
