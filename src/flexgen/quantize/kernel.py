"""Rounds groups of weights to integers with a scale and a zero point that a search finds, compiled by Numba.

A group is rounded to codes q in [0, top] that stand for scale * (q - zero).  The search begins at the scale and zero point of the smallest
and the largest weight, tries narrower and wider ranges, and fits the scale of the best one to its codes by least squares.  It keeps the
least squared error with weights |w| + mean |w|, because errors of large weights do more harm (docs/log.md), among those whose plain squared
error is not larger than at the beginning.  Scales are those that will be stored, rounded to their dtype before errors are taken.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from flexgen.base.compiled import entry
from flexgen.kernels.cpu.formats import narrow, widen

# Sums may be taken in any order, which lets them be computed in vectors.
_IN_ANY_ORDER: Any = {"error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
# Errors have to be smaller by more than the rounding of their sums, so that no group gets worse by being searched.
_CLEARLY = np.float32(1 - 1e-4)


@njit(**_IN_ANY_ORDER)
def _code(weight: Any, inverse: Any, offset: Any, limit: Any) -> Any:
    """Return the nearest code, as float32; `offset` is the zero point plus a half, `limit` the largest code plus a half."""
    return np.float32(np.int32(min(max(weight * inverse + offset, _ZERO), limit)))


@njit(**_IN_ANY_ORDER)
def _squared_errors(group: Any, scale: Any, zero: Any, top: Any, mean: Any) -> Any:
    """Return the squared error with weights |w| + mean |w|, and the plain one."""
    inverse, offset, limit, weighted, plain = _ONE / scale, zero + _HALF, top + _HALF, _ZERO, _ZERO
    for i in range(group.size):
        difference = group[i] - scale * (_code(group[i], inverse, offset, limit) - zero)
        square = difference * difference
        plain += square
        weighted += square * (abs(group[i]) + mean)
    return weighted, plain


@njit(**_IN_ANY_ORDER)
def _fitted_scale(group: Any, scale: Any, zero: Any, top: Any, mean: Any) -> Any:
    """Return the scale with the least weighted error for the codes that `scale` gives; `scale` itself where all codes stand for 0."""
    inverse, offset, limit, products, squares = _ONE / scale, zero + _HALF, top + _HALF, _ZERO, _ZERO
    for i in range(group.size):
        steps = _code(group[i], inverse, offset, limit) - zero
        weighted = steps * (abs(group[i]) + mean)
        products += group[i] * weighted
        squares += steps * weighted
    return products / squares if squares > _ZERO and products > _ZERO else scale


@njit(**_IN_ANY_ORDER)
def _as_stored(scale: Any, least: Any, like: Any) -> Any:
    return np.float32(widen(narrow(max(scale, least), like)))


@njit(**_IN_ANY_ORDER)
def _zero_of(low: Any, scale: Any, top: Any) -> Any:
    return min(np.float32(np.int32(-low / scale + _HALF)), top)


@njit(**_IN_ANY_ORDER)
def _search(group: Any, shares: Any, top: Any, least: Any, like: Any) -> Any:
    """Return the scale and the zero point of a group."""
    low, high, mean = _ZERO, _ZERO, _ZERO  # zero is always in the range, because a zero point is one of the codes
    for i in range(group.size):
        low, high = min(low, group[i]), max(high, group[i])
        mean += abs(group[i])
    if low == high:
        return _ONE, _ZERO
    mean /= np.float32(group.size)
    best_scale = _as_stored((high - low) / top, least, like)
    best_zero = _zero_of(low, best_scale, top)
    best, most = _squared_errors(group, best_scale, best_zero, top, mean)
    most *= _CLEARLY
    for share in shares:
        scale = _as_stored((high - low) * share / top, least, like)
        zero = _zero_of(low * share, scale, top)
        weighted, plain = _squared_errors(group, scale, zero, top, mean)
        if weighted < best and plain <= most:
            best, best_scale, best_zero = weighted, scale, zero
    scale = _as_stored(_fitted_scale(group, best_scale, best_zero, top, mean), least, like)
    weighted, plain = _squared_errors(group, scale, best_zero, top, mean)
    if weighted < best and plain <= most:
        best_scale = scale
    return best_scale, best_zero


@njit(**_IN_ANY_ORDER)
def _pack(group: Any, scale: Any, zero: Any, top: Any, bits: Any, packed: Any) -> None:
    """Write the codes of a group as bytes: one each, or two in a byte, the first in the low half."""
    inverse, offset, limit = _ONE / scale, zero + _HALF, top + _HALF
    if bits == 8:
        for i in range(group.size):
            packed[i] = np.uint8(_code(group[i], inverse, offset, limit))
        return
    for i in range(group.size // 2):
        first = np.uint8(_code(group[2 * i], inverse, offset, limit))
        second = np.uint8(_code(group[2 * i + 1], inverse, offset, limit))
        packed[i] = first | (second << 4)


@entry
def round_rows(
    weights: Any, bits: Any, group_size: Any, shares: Any, least: Any, packed: Any, scales: Any, zeros: Any, begin: Any, end: Any
) -> None:
    """Round the rows whose zero points lie in the words [begin, end).

    Args:
        weights: Finite float32, (rows, columns); columns are a multiple of the group size.
        bits: 4 or 8.
        group_size: The weights of a group, a multiple of 8.
        shares: For each range to try, its width as a share of that from the smallest to the largest weight, float32.
        least: The smallest scale, float32.
        packed: The codes as bytes, uint8 (rows, columns * bits / 8); they are written.
        scales: The scales, (rows, groups), in the kernels' type of their dtype; they are written.
        zeros: The zero points, packed along the rows from the low bits on, uint32 (words, groups); they are written.
        begin: The first word.
        end: The word after the last one.
    """
    per_word, top = 32 // bits, np.float32((1 << bits) - 1)
    group_bytes = group_size * bits // 8
    for word in range(begin, end):
        zeros[word, :] = 0
        for row in range(word * per_word, min((word + 1) * per_word, weights.shape[0])):
            shift = np.uint32(bits * (row - word * per_word))
            for index in range(scales.shape[1]):
                group = weights[row, index * group_size : (index + 1) * group_size]
                scale, zero = _search(group, shares, top, least, scales[row, index])
                scales[row, index] = narrow(scale, scales[row, index])
                zeros[word, index] |= np.uint32(zero) << shift
                _pack(group, scale, zero, top, bits, packed[row, index * group_bytes : (index + 1) * group_bytes])
