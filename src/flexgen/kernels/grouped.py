"""Products in which each row meets the matrix of its own expert: which rows these are, and what kernels for them do.

Letters of shapes: R rows, k experts that each row chose, P = R * k pairs of a row and an expert, W pairs of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flexgen.kernels.encoded import EncodedMatrices


@dataclass(frozen=True, slots=True, kw_only=True)
class SortedPairs:
    """The pairs of a row and an expert that it chose, sorted by expert; pair p is choice p % k of row p // k.

    Attributes:
        order: The pairs, int64 (P,): those of a lower expert first, those of one expert in the order of rows.
        places: The place of each pair in `order`, int64 (P,).
        offsets: The place of the first pair of each expert, and the end of the last one's, int64 (experts + 1,).
    """

    order: Tensor
    places: Tensor
    offsets: Tensor

    @property
    def num_experts(self) -> int:
        """The number of experts."""
        return len(self.offsets) - 1


def even_offsets(pairs: SortedPairs) -> Sequence[int]:
    """Return the offsets that pairs would have if all experts were chosen alike often, where nothing is known of them."""
    return [expert * len(pairs.order) // pairs.num_experts for expert in range(pairs.num_experts + 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Neighbouring places among the sorted pairs of consecutive experts.  Where they begin is known on the device only.

    Attributes:
        first: The first of the experts.
        count: The number of experts.
        skipped: How many pairs of these experts lie before the window.
        num_rows: The number of places.  There may be fewer pairs than that: the rows behind them are neither computed nor used.
    """

    first: int
    count: int
    skipped: int
    num_rows: int


class GroupedKernels(Protocol):
    """Kernels for products in which each row meets the matrix of its own expert.  None of them waits for the device."""

    def covers(self, dtype: torch.dtype) -> bool:
        """Whether there are kernels for numbers of this format."""
        ...

    def reads_encoded(self, mean_rows: int) -> bool:
        """Whether to multiply by matrices as they are stored where an expert has so many rows on average, rather than to decode them first.

        Results are the same; it pays where rows are few, since for these a matrix is read once, or a few times.
        """
        ...

    def offsets_on_host(self, pairs: SortedPairs) -> Sequence[int]:
        """Return the offsets of pairs; the host waits for them."""
        ...

    def product(
        self, x: Tensor, weight: Tensor | EncodedMatrices, bias: Tensor | None, pairs: SortedPairs, window: Window, *, gathers: bool
    ) -> Tensor:
        """Return the products, (W, outputs), of a window's pairs.

        Args:
            x: The inputs: (R, inputs) of all rows if they are gathered, otherwise (W, inputs) of the window.
            weight: The matrices of the window's experts, (count, inputs, outputs), in any order in memory, or as they are stored.
            bias: Their biases, (count, outputs), if any.
            pairs: All pairs.
            window: Which of them are computed.
            gathers: Whether the inputs are those of all rows.
        """
        ...

    def add(self, rows: Tensor, weights: Tensor | None, pairs: SortedPairs, window: Window, total: Tensor) -> None:
        """Add the results of a window's pairs to those of the rows that they belong to, one pair of a row after the other.

        Args:
            rows: The results, (W, dim).
            weights: The weight of each choice, (R, k); None for 1.
            pairs: All pairs.
            window: Which of them are added.
            total: The sums, float32 (R, dim).
        """
        ...


def sorted_pairs(experts: Tensor, num_experts: int) -> SortedPairs:
    """Return the pairs of rows and the experts that they chose, sorted; nothing waits for the device.

    Args:
        experts: The chosen experts, int64 (R, k).  Those outside of 0 to num_experts - 1 belong to no expert.
        num_experts: The number of experts.
    """
    order, offsets = sorted_by_expert(experts, num_experts)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return SortedPairs(order=order, places=places, offsets=offsets)


def sorted_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return `order` and `offsets` of `SortedPairs`; the arguments are those of `sorted_pairs`."""
    found, order = experts.reshape(-1).sort(stable=True)
    return order, torch.searchsorted(found, torch.arange(num_experts + 1, dtype=found.dtype, device=order.device))
