"""Rounds groups of weights to integers with a scale and a zero point that a search finds, compiled by Numba.

A group is rounded to codes q in [0, top] that stand for scale * (q - zero).  The search begins at the scale and zero point of the smallest
and the largest weight, tries narrower and wider ranges, and fits the scale of the best one to its codes by least squares.  It keeps the
least squared error with weights |w| + mean |w|, because errors of large weights do more harm (docs/log.md), among those whose plain squared
error is not larger than at the beginning.  Scales are those that will be stored, rounded to their dtype before errors are taken.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from flexgen.base.compiled import entry
from flexgen.kernels.cpu.formats import widen
from flexgen.kernels.cpu.rows import LANES, moved, pointer
from flexgen.kernels.dequantize.loops import turn_sixteen
from flexgen.quantize.lanes import pack_4, pack_8, search_lanes, widen_vectors

_VECTOR_BYTES = 4 * LANES


class _Room(NamedTuple):
    """Memory to work in.  Numba frees an array after its last use, which pointers to it are not, so it belongs to the caller.

    Attributes:
        floats: Two turned groups of LANES in float32, and a vector more.
        turned: A turned group of LANES, as it is stored.
        edge: As large; zeros, in which the last groups are put that are fewer than LANES.
        scales: A vector of scales, as they are stored.
        zeros: A vector of zero points, float32.
    """

    floats: Any
    turned: Any
    edge: Any
    scales: Any
    zeros: Any


@njit
def _on_boundary(floats: Any) -> Any:
    """Return a pointer to the first float32 on a vector's boundary."""
    return pointer(floats, (_VECTOR_BYTES - np.int64(floats.ctypes.data) % _VECTOR_BYTES) // 4)


@njit
def _search_groups(source: Any, size: Any, shares: Any, top: Any, least: Any, room: Any) -> None:
    """Find scales and zero points of LANES groups, one behind the other."""
    turned, floats = pointer(room.turned, 0), _on_boundary(room.floats)
    for column in range(0, size, LANES):
        turn_sixteen(moved(source, column), size, moved(turned, column * LANES), LANES)
    widen_vectors(turned, size, floats)
    search_lanes(floats, size, pointer(shares, 0), shares.size, top, least, pointer(room.scales, 0), pointer(room.zeros, 0))


@njit
def _round_in(
    room: Any, weights: Any, bits: Any, size: Any, shares: Any, least: Any, packed: Any, scales: Any, zeros: Any, begin: Any, end: Any
) -> bool:
    """Round rows as `round_rows` does."""
    per_word, top, groups, group_bytes = 32 // bits, np.float32((1 << bits) - 1), scales.shape[1], size * bits // 8
    row, index, finite = begin * per_word, 0, True
    first, last = row * groups, min(end * per_word, weights.shape[0]) * groups
    for start in range(first, last, LANES):
        count, source = min(LANES, last - start), pointer(weights, start * size)
        if count < LANES:  # what follows belongs to others, or to nobody
            for i in range(count * size):
                room.edge[i] = source[i]
            source = pointer(room.edge, 0)
        _search_groups(source, size, shares, top, least, room)
        for lane in range(count):
            scale, zero = np.float32(widen(room.scales[lane])), room.zeros[lane]
            finite = finite and np.isfinite(scale)
            scales[row, index] = room.scales[lane]
            zeros[row // per_word, index] |= np.uint32(zero) << np.uint32(bits * (row % per_word))
            group, target = moved(source, lane * size), pointer(packed, (start + lane) * group_bytes)
            if bits == 4:
                pack_4(group, size, scale, zero, top, target)
            else:
                pack_8(group, size, scale, zero, top, target)
            index += 1
            if index == groups:
                row, index = row + 1, 0
    return finite


@entry
def round_rows(
    weights: Any, bits: Any, group_size: Any, shares: Any, least: Any, packed: Any, scales: Any, zeros: Any, begin: Any, end: Any
) -> bool:
    """Round the rows whose zero points lie in the words [begin, end), and return whether all scales are finite.

    Args:
        weights: (rows, columns), contiguous, in the kernels' type of their dtype; columns are a multiple of the group size.
        bits: 4 or 8.
        group_size: The weights of a group, a multiple of LANES.
        shares: For each range to try, its width as a share of that from the smallest to the largest weight, float32.
        least: The smallest scale, float32.
        packed: The codes as bytes, uint8 (rows, columns * bits / 8); they are written.
        scales: The scales, (rows, groups), in the kernels' type of their dtype; they are written.  That of a group with a number that is
            not finite is not a number.
        zeros: The zero points, packed along the rows from the low bits on, uint32 (words, groups); they are written.
        begin: The first word.
        end: The word after the last one.
    """
    vectors = group_size * LANES
    turned, edge = np.empty(vectors, weights.dtype), np.zeros(vectors, weights.dtype)
    room = _Room(np.empty(2 * vectors + LANES, np.float32), turned, edge, np.empty(LANES, scales.dtype), np.empty(LANES, np.float32))
    zeros[begin:end] = 0
    return _round_in(room, weights, bits, group_size, shares, least, packed, scales, zeros, begin, end)
