"""Words that are stored transposed, brought into rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from flexgen.kernels.cpu.rows import LANES, moved
from flexgen.kernels.dequantize.loops import turn_sixteen


@njit
def turn(source: Any, source_stride: int, height: int, width: int, target: Any, stride: int) -> None:
    """Store the columns of a matrix, (height, width) and `source_stride` elements from row to row, as rows, `stride` apart."""
    whole_rows, whole_columns = height // LANES * LANES, width // LANES * LANES
    for row in range(0, whole_rows, LANES):
        for column in range(0, whole_columns, LANES):
            turn_sixteen(moved(source, row * source_stride + column), source_stride, moved(target, column * stride + row), stride)
    for row in range(height):
        for column in range(whole_columns if row < whole_rows else 0, width):
            target[column * stride + row] = source[row * source_stride + column]


@njit
def turn_eight(words: Any, row_words: int, inputs: int, lines: Any, stride: int) -> None:
    """Turn the words of 8 inputs, with a code for each of 8 outputs, into words of 8 outputs with a code for each input.

    A word's codes are those of outputs 0, 2, 4, 6, 1, 3, 5, 7.
    """
    a = words[0]
    b = words[row_words] if inputs > 1 else np.uint32(0)
    c = words[2 * row_words] if inputs > 2 else np.uint32(0)
    d = words[3 * row_words] if inputs > 3 else np.uint32(0)
    e = words[4 * row_words] if inputs > 4 else np.uint32(0)
    f = words[5 * row_words] if inputs > 5 else np.uint32(0)
    g = words[6 * row_words] if inputs > 6 else np.uint32(0)
    h = words[7 * row_words] if inputs > 7 else np.uint32(0)
    a, e = _exchanged(a, e, 16, 0x0000FFFF)
    b, f = _exchanged(b, f, 16, 0x0000FFFF)
    c, g = _exchanged(c, g, 16, 0x0000FFFF)
    d, h = _exchanged(d, h, 16, 0x0000FFFF)
    a, c = _exchanged(a, c, 8, 0x00FF00FF)
    b, d = _exchanged(b, d, 8, 0x00FF00FF)
    e, g = _exchanged(e, g, 8, 0x00FF00FF)
    f, h = _exchanged(f, h, 8, 0x00FF00FF)
    a, b = _exchanged(a, b, 4, 0x0F0F0F0F)
    c, d = _exchanged(c, d, 4, 0x0F0F0F0F)
    e, f = _exchanged(e, f, 4, 0x0F0F0F0F)
    g, h = _exchanged(g, h, 4, 0x0F0F0F0F)
    lines[0], lines[2 * stride], lines[4 * stride], lines[6 * stride] = a, b, c, d
    lines[stride], lines[3 * stride], lines[5 * stride], lines[7 * stride] = e, f, g, h


@njit
def _exchanged(low: Any, high: Any, shift: int, mask: int) -> Any:
    """Exchange the upper halves of the fields of `low` with the lower halves of those of `high`."""
    changed = ((low >> np.uint32(shift)) ^ high) & np.uint32(mask)
    return np.uint32(low ^ (changed << np.uint32(shift))), np.uint32(high ^ changed)
