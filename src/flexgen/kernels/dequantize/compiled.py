"""Compiled kernels of table look-ups, on NumPy arrays.

Codes are looked up into a buffer that stays in the first-level cache, and leave it in vectors, multiplied by the scale of their block.
Codes of 4 bits and those of E4M3 are looked up in vectors where the processor has instructions for it, all others one by one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from flexgen.base.compiled import entry
from flexgen.kernels.cpu.formats import narrow
from flexgen.kernels.cpu.rows import LANES, moved, pointer
from flexgen.kernels.dequantize.halves import look_up_halves, store_values
from flexgen.kernels.dequantize.loops import store_scaled, widen_e4m3

CHUNK = 2048  # bytes whose codes are looked up before they are multiplied


@entry
def decode_rows(
    begin: int,
    end: int,
    codes: Any,
    shift: int,
    table: Any,
    in_vectors: bool,
    in_wide_vectors: bool,
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
        shift: The shift of the first of two codes that a byte has, 0 or 4.
        table: The value of each code, float32 (256,), or (16,) where a byte has two codes.
        in_vectors: Whether codes are looked up in vectors; a table of 256 values is then that of E4M3 without infinities.
        in_wide_vectors: Whether codes of 4 bits are looked up among products with their scale: `out` has 16 bits, blocks are whole, and
            their size is a multiple of 2 * LANES.
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
        if in_wide_vectors:
            of_row, target = pointer(scales, block_row * scales.shape[1]), pointer(out, row * columns)
            store_halves_of_blocks(
                pointer(codes, row * row_bytes), shift, pointer(table, 0), of_row, scale_values, block_columns, columns, target
            )
            continue
        for first in range(0, row_bytes, CHUNK):
            size = min(CHUNK, row_bytes - first)
            per_byte = look_up(pointer(codes, row * row_bytes + first), shift, table, in_vectors, numbers, size)
            column, stop = first * per_byte, (first + size) * per_byte
            offset, block = column, column // block_columns
            if block_columns % LANES == 0 and column % block_columns == 0:
                whole = (stop - column) // block_columns
                of_blocks = pointer(scales, block_row * scales.shape[1] + block)
                store_blocks(pointer(numbers, 0), of_blocks, scale_values, block_columns, whole, pointer(out, row * columns + column))
                column += whole * block_columns
                block += whole
            while column < stop:
                count = min((block + 1) * block_columns, stop) - column
                scale = scale_of(scales[block_row, block], scale_values)
                store(pointer(numbers, column - offset), scale, pointer(out, row * columns + column), count, out[row, 0])
                column += count
                block += 1


@njit
def look_up(codes: Any, shift: int, table: Any, in_vectors: bool, numbers: Any, size: int) -> int:
    """Look up the codes of `size` adjacent bytes, and return how many codes a byte has; arguments as for `decode_rows`."""
    whole, values, target = size // LANES * LANES if in_vectors else 0, pointer(table, 0), pointer(numbers, 0)
    if len(table) == 16:
        for i in range(0, whole, LANES):
            look_up_halves(moved(codes, i), shift, values, moved(target, 2 * i))
        for i in range(whole, size):
            target[2 * i] = values[(codes[i] >> shift) & 15]
            target[2 * i + 1] = values[(codes[i] >> (4 - shift)) & 15]
        return 2
    for i in range(0, whole, LANES):
        widen_e4m3(moved(codes, i), moved(target, i))
    for i in range(whole, size):
        target[i] = values[codes[i]]
    return 1


@njit
def store_halves_of_blocks(
    codes: Any, shift: int, values: Any, scales: Any, scale_values: Any, size: int, columns: int, target: Any
) -> None:
    """Store the numbers of a row of blocks of `size` codes of 4 bits; arguments as for `decode_rows`."""
    for block in range(columns // size):
        scale = scale_of(scales[block], scale_values)
        for i in range(block * size, (block + 1) * size, 2 * LANES):
            store_values(moved(codes, i // 2), shift, values, scale, moved(target, i))


@njit
def store_blocks(numbers: Any, scales: Any, scale_values: Any, size: int, count: int, target: Any) -> None:
    """Store adjacent blocks, each times its scale; their size is a multiple of LANES.  Without rests this is faster for small blocks."""
    for block in range(count):
        scale = scale_of(scales[block], scale_values)
        for i in range(block * size, (block + 1) * size, LANES):
            store_scaled(moved(numbers, i), scale, moved(target, i))


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
