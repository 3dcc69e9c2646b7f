"""Compiled kernels of table look-ups, on NumPy arrays.

Codes are looked up into a buffer that stays in the first-level cache, and leave it in vectors, multiplied by the scale of their block.
Codes of 4 bits are looked up in vectors if they are small multiples of a half and have a sign, as those of E2M1, otherwise two at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from flexgen.base.compiled import entry
from flexgen.kernels.cpu.formats import narrow
from flexgen.kernels.cpu.rows import LANES, moved, pointer
from flexgen.kernels.dequantize.loops import look_up_halves, store_scaled

CHUNK = 2048  # bytes whose codes are looked up before they are multiplied
UNIT = 0.5  # of magnitudes that are given as small integers


@entry
def decode_rows(
    begin: int,
    end: int,
    codes: Any,
    shift: int,
    table: Any,
    scales: Any,
    scale_values: Any,
    block_rows: int,
    block_columns: int,
    skipped: int,
    out: Any,
) -> None:
    """Decode rows begin <= row < end.

    Args:
        begin: The first row.
        end: The row after the last one.
        codes: The codes, uint8 (rows, bytes of a row).
        shift: The shift of the first of two codes that a byte has, 0 or 4; for an int8 table.
        table: The value of each code, float32 (256,).  Where a byte has two codes the two values of each byte, as the bits of two float32,
            uint64 (256,); or the magnitudes of codes 0 to 7 in units of UNIT, int8 (8,), if codes 8 to 15 are their negatives.
        scales: The scales, (rows of blocks, columns of blocks): float32, or uint8 codes of `scale_values`.
        scale_values: For each code of a scale its value, float32 (256,).
        block_rows: The rows that share a scale.
        block_columns: The columns that share a scale.
        skipped: The rows of the first block that come before row 0.
        out: The decoded numbers, (rows, columns), in the form of kernels/cpu/formats.py.
    """
    row_bytes, columns = codes.shape[1], out.shape[1]
    numbers = np.empty(2 * CHUNK, np.float32)
    for row in range(begin, end):
        block_row = (skipped + row) // block_rows
        for first in range(0, row_bytes, CHUNK):
            size = min(CHUNK, row_bytes - first)
            per_byte = look_up(pointer(codes, row * row_bytes + first), shift, table, numbers, size)
            column, stop = first * per_byte, (first + size) * per_byte
            offset, block = column, column // block_columns
            while column < stop:
                count = min((block + 1) * block_columns, stop) - column
                scale = scale_of(scales[block_row, block], scale_values)
                store(pointer(numbers, column - offset), scale, pointer(out, row * columns + column), count, out[row, 0])
                column += count
                block += 1


def look_up(codes: Any, shift: int, table: Any, numbers: Any, size: int) -> int:
    """Look up the codes of `size` adjacent bytes, and return how many codes a byte has; arguments as for `decode_rows`."""
    raise NotImplementedError


@overload(look_up, strict=False)
def _look_up(codes: Any, shift: Any, table: Any, numbers: Any, size: Any) -> Any:
    return {types.float32: _look_up_bytes, types.uint64: _look_up_pairs, types.int8: _look_up_halves}[table.dtype]


def _look_up_bytes(codes: Any, shift: Any, table: Any, numbers: Any, size: Any) -> int:
    for i in range(size):
        numbers[i] = table[codes[i]]
    return 1


def _look_up_pairs(codes: Any, shift: Any, table: Any, numbers: Any, size: Any) -> int:
    pairs = numbers.view(np.uint64)
    for i in range(size):
        pairs[i] = table[codes[i]]
    return 2


def _look_up_halves(codes: Any, shift: Any, table: Any, numbers: Any, size: Any) -> int:
    whole, magnitudes, unit = size // LANES * LANES, pointer(table, 0), np.float32(UNIT)
    for i in range(0, whole, LANES):
        look_up_halves(moved(codes, i), shift, magnitudes, unit, pointer(numbers, 2 * i))
    for i in range(2 * whole, 2 * size):
        code = codes[i // 2] >> (4 - shift if i % 2 else shift)
        magnitude = np.float32(table[code & 7]) * unit
        numbers[i] = -magnitude if code & 8 else magnitude
    return 2


@njit
def store(numbers: Any, scale: Any, target: Any, count: int, like: Any) -> None:
    """Store adjacent numbers times a scale, in the format of the element `like`."""
    i = 0
    while count - i >= LANES:
        store_scaled(moved(numbers, i), scale, moved(target, i))
        i += LANES
    while i < count:
        target[i] = narrow(numbers[i] * scale, like)
        i += 1


def scale_of(stored: Any, values: Any) -> Any:
    """Return a scale: a float32, or the value of a code."""
    return values[stored] if stored.dtype == np.uint8 else stored


@overload(scale_of, strict=False)  # strict compares annotations, which lambdas have none of
def _scale_of(stored: Any, values: Any) -> Any:
    if isinstance(stored, types.Integer):
        return lambda stored, values: values[stored]
    return lambda stored, values: stored
