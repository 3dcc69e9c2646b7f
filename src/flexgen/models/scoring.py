"""Log probabilities of known tokens, from logits that arrive in ranges of rows and of the vocabulary.

The logits of all positions of a micro-batch are never held together: each range is reduced as soon as it is computed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from flexgen.base.quantities import MIB

SLICE_BYTES = 32 * MIB  # of logits that are held at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The scores of the rows of a micro-batch.

    Attributes:
        logprobs: The log probability of each row's target, float64 (rows,); not finite if the row's logits are not.
        likeliest: The ids of the likeliest tokens, the likeliest first and the lower id first among equals, int64 (rows, k).
        likeliest_logprobs: Their log probabilities, float64 (rows, k).
    """

    logprobs: torch.Tensor
    likeliest: torch.Tensor
    likeliest_logprobs: torch.Tensor


class Scorer:
    """Scores rows of logits against one target token each.

    Args:
        targets: The token ids whose log probabilities are wanted, int64 (rows,), where computing happens.
        num_likeliest: The number of likeliest tokens that are wanted for each row; -1 for all.

    Attributes:
        num_rows: The number of rows.
    """

    def __init__(self, targets: torch.Tensor, num_likeliest: int) -> None:
        self.num_rows = len(targets)
        self._targets, self._num_likeliest = targets, sys.maxsize if num_likeliest == -1 else num_likeliest
        new = {"dtype": torch.float64, "device": targets.device}
        self._log_sums = torch.full((self.num_rows,), -torch.inf, **new)
        self._logits = torch.full((self.num_rows,), torch.nan, **new)
        self._likeliest = torch.empty((self.num_rows, 0), dtype=torch.int64, device=targets.device)
        self._largest = torch.empty((self.num_rows, 0), **new)

    def slices(self, width: int, itemsize: int) -> Iterator[slice]:
        """Yield ranges of rows whose logits take SLICE_BYTES or less.

        Args:
            width: The number of logits of a row.
            itemsize: The bytes of one logit.
        """
        step = max(SLICE_BYTES // (width * itemsize), 1)
        return (slice(start, min(start + step, self.num_rows)) for start in range(0, self.num_rows, step))

    def add(self, logits: Iterable[tuple[slice, torch.Tensor]], first_id: int) -> None:
        """Take the logits of all rows for the next range of token ids; ranges come in ascending order.

        Args:
            logits: For ranges of rows, in ascending order, their logits, (rows, ids).
            first_id: The first token id of the range.
        """
        likeliest: list[torch.Tensor] = []
        largest: list[torch.Tensor] = []
        for rows, each in logits:
            numbers = each if each.dtype == torch.float64 else each.float()
            self._log_sums[rows] = torch.logaddexp(self._log_sums[rows], torch.logsumexp(numbers, dim=-1).double())
            at = self._targets[rows] - first_id
            found = numbers.gather(1, at.clamp(0, numbers.shape[1] - 1)[:, None])[:, 0].double()
            self._logits[rows] = torch.where((at >= 0) & (at < numbers.shape[1]), found, self._logits[rows])
            if self._num_likeliest:
                ids = likeliest_ids(numbers, min(self._num_likeliest, numbers.shape[1]))
                likeliest.append(ids + first_id)
                largest.append(numbers.gather(1, ids).double())
        if self._num_likeliest:
            self._merge(torch.cat(likeliest), torch.cat(largest))

    def _merge(self, ids: torch.Tensor, numbers: torch.Tensor) -> None:
        """Keep the likeliest of the tokens so far and of those of another range, whose ids are higher."""
        both, all_ids = torch.cat((self._largest, numbers), dim=1), torch.cat((self._likeliest, ids), dim=1)
        order = both.sort(dim=1, descending=True, stable=True).indices[:, : self._num_likeliest]
        self._largest, self._likeliest = both.gather(1, order), all_ids.gather(1, order)

    def result(self) -> Scores:
        """Return the scores, once all logits have been added."""
        return Scores(
            logprobs=self._logits - self._log_sums,
            likeliest=self._likeliest,
            likeliest_logprobs=self._largest - self._log_sums[:, None],
        )


def likeliest_ids(numbers: torch.Tensor, count: int) -> torch.Tensor:
    """Return the indices of the `count` largest numbers of each row, (rows, count): the largest first, and the lower index among equals."""
    if count == 1:
        return numbers.argmax(dim=-1, keepdim=True)
    values, ids = numbers.topk(count, dim=-1)
    ambiguous = (numbers >= values[:, -1:]).sum(dim=-1) > count
    for row in ambiguous.nonzero()[:, 0].tolist():  # topk takes any of the numbers that equal the last one
        ids[row] = numbers[row].sort(descending=True, stable=True).indices[:count]
    ids = ids.sort(dim=-1).values
    order = numbers.gather(1, ids).sort(dim=-1, descending=True, stable=True).indices
    return ids.gather(1, order)
