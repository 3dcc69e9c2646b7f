"""Slices as arrays, so that what is made of them for each token needs no loop over tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flexgen.passes.plan import Slice


def starts_of(slices: Sequence[Slice]) -> np.ndarray:
    """Return the position of the first token of each slice, int64 (slices,)."""
    return np.fromiter((each.start for each in slices), dtype=np.int64, count=len(slices))


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the numbers start <= n < start + length of every pair, one range behind the other, int64."""
    return np.arange(lengths.sum()) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
