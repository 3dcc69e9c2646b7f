"""Arguments of compiled kernels: checked, and made arrays that Numba knows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flexgen.kernels.checks import check_positions, check_shapes

ITEM_TOKENS = 16  # what beginning a work item costs, in tokens read

Where = tuple[np.ndarray, np.ndarray, np.ndarray]  # page tables (S, max_pages), starts (S,), lengths (S,)


def where_seen(
    num_sequences: int, page_tables: Tensor, starts: Tensor, lengths: Tensor, page_tokens: int, *, last_page_apart: bool = False
) -> Where:
    """Return where the visible positions are, with starts before the first position moved to it.

    Args:
        num_sequences: The number of sequences.
        page_tables: (S, max_pages).
        starts: The first visible position of each sequence, (S,).
        lengths: The end of its visible positions, (S,).
        page_tokens: The tokens of a page.
        last_page_apart: Whether the page of the last position is kept apart, so that page tables need not have it.

    Raises:
        EngineError: A sequence sees nothing, or positions that its page table does not hold.
    """
    check_shapes(page_tables=(page_tables, (num_sequences, None)), starts=(starts, (num_sequences,)), lengths=(lengths, (num_sequences,)))
    where = integers(page_tables), np.maximum(integers(starts), 0), integers(lengths)
    num_apart = page_tokens if last_page_apart else 0
    check_positions(*where[1:], page_tables.shape[1] * page_tokens + num_apart)
    return where


def costs(where: Where, items_per_sequence: int) -> np.ndarray:
    """Return the cost of every work item, in tokens read."""
    _, starts, lengths = where
    return np.repeat(lengths - starts + ITEM_TOKENS, items_per_sequence)


def accumulator(dtype: torch.dtype) -> type[np.floating]:
    """Return the type of sums over numbers of a dtype."""
    return np.float64 if dtype == torch.float64 else np.float32


def integers(tensor: Tensor) -> np.ndarray:
    """Return a tensor of integers as contiguous int64."""
    return np.ascontiguousarray(tensor.numpy(), np.int64)


def sinks_array(sinks: Tensor | None, heads: int, number: type[np.floating]) -> np.ndarray:
    """Return sinks as (heads,), or (0,) for none."""
    if sinks is None:
        return np.zeros(0, number)
    check_shapes(sinks=(sinks, (heads,)))
    return sinks.detach().double().numpy().astype(number)


def workspace(size: int, number: type[np.number]) -> np.ndarray:
    """Return memory for one call on one thread; it begins on a cache line, so that vectors do not straddle two."""
    line = 64 // np.dtype(number).itemsize
    memory = np.empty(size + line, number)
    skipped = -memory.ctypes.data % 64 // memory.itemsize
    return memory[skipped : skipped + size]
