"""Compiled kernels of table look-ups, on NumPy arrays.

Codes are looked up into a buffer that stays in the first-level cache, and leave it in vectors, multiplied by the scale of their block.
A byte of two codes is looked up at once, in a table of pairs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from flexgen.base.compiled import entry
from flexgen.kernels.cpu.formats import narrow
from flexgen.kernels.cpu.rows import LANES, moved, pointer
from flexgen.kernels.dequantize.loops import store_scaled, turn_sixteen

CHUNK = 2048  # codes that are looked up before they are multiplied
STRIP_CODES = 64  # of one row, where rows become columns: a line of the cache
STRIP_ROWS = 32


@entry
def decode_rows(
    begin: int,
    end: int,
    codes: Any,
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
        codes: The codes, uint8 (rows, codes of a row).
        table: For each code its value as float32 bits, (256,): uint32, or uint64 for two values.
        scales: The scales, (rows of blocks, columns of blocks): float32, or uint8 codes of `scale_values`.
        scale_values: For each code of a scale its value, float32 (256,).
        block_rows: The rows that share a scale.
        block_columns: The columns that share a scale.
        skipped: The rows of the first block that come before row 0.
        out: The decoded numbers, (rows, columns), in the form of kernels/cpu/formats.py.
    """
    row_codes, columns = codes.shape[1], out.shape[1]
    buffer = np.empty(CHUNK, table.dtype)
    numbers = buffer.view(np.float32)
    per_code = len(numbers) // CHUNK
    for row in range(begin, end):
        block_row = (skipped + row) // block_rows
        for first in range(0, row_codes, CHUNK):
            size = min(CHUNK, row_codes - first)
            look_up(pointer(codes, row * row_codes + first), table, buffer, size)
            column, stop = first * per_code, (first + size) * per_code
            offset = column
            while column < stop:
                block = column // block_columns
                count = min((block + 1) * block_columns, stop) - column
                scale = scale_of(scales[block_row, block], scale_values)
                store(pointer(numbers, column - offset), scale, pointer(out, row * columns + column), count, out[row, 0])
                column += count


@entry
def decode_transposed(begin: int, end: int, codes: Any, table: Any, scales: Any, scale_values: Any, block: int, out: Any) -> None:
    """Decode matrices whose rows become columns, work items begin <= matrix * strips + strip < end.

    Args:
        begin: The first work item.
        end: The work item after the last one.
        codes: The codes, uint8 (matrices, rows, codes of a row); a strip is a range of STRIP_CODES of each row.
        table: As for `decode_rows`.
        scales: The scales, (matrices, rows, blocks of a row), as for `decode_rows`.
        scale_values: As for `decode_rows`.
        block: The numbers of a row that share a scale; a strip has a whole number of blocks, apart from its end.
        out: The decoded numbers, (matrices, columns, rows).
    """
    _, rows, row_codes = codes.shape
    columns = out.shape[1]
    buffer = np.empty(STRIP_CODES, table.dtype)
    numbers = buffer.view(np.float32)
    per_code = len(numbers) // STRIP_CODES
    width = STRIP_CODES * per_code
    tile = np.empty((STRIP_ROWS, width), out.dtype)
    strips = (row_codes + STRIP_CODES - 1) // STRIP_CODES
    for item in range(begin, end):
        matrix, first = item // strips, item % strips * STRIP_CODES
        size = min(STRIP_CODES, row_codes - first)
        for row in range(0, rows, STRIP_ROWS):
            height = min(STRIP_ROWS, rows - row)
            for i in range(height):
                look_up(pointer(codes, (matrix * rows + row + i) * row_codes + first), table, buffer, size)
                for start in range(0, size * per_code, block):
                    count = min(block, size * per_code - start)
                    scale = scale_of(scales[matrix, row + i, (first * per_code + start) // block], scale_values)
                    store(pointer(numbers, start), scale, pointer(tile, i * width + start), count, tile[0, 0])
            turn(tile, height, size * per_code, pointer(out, (matrix * columns + first * per_code) * rows + row), rows)


@njit
def turn(tile: Any, height: int, width: int, target: Any, stride: int) -> None:
    """Store the columns of a tile as rows, `stride` apart."""
    whole_rows, whole_columns = height // LANES * LANES, width // LANES * LANES
    for row in range(0, whole_rows, LANES):
        for column in range(0, whole_columns, LANES):
            source = pointer(tile, row * tile.shape[1] + column)
            turn_sixteen(source, tile.shape[1], moved(target, column * stride + row), stride)
    for column in range(width):
        for row in range(whole_rows if column < whole_columns else 0, height):
            target[column * stride + row] = tile[row, column]


@njit
def look_up(codes: Any, table: Any, buffer: Any, size: int) -> None:
    """Look up adjacent codes."""
    for i in range(size):
        buffer[i] = table[codes[i]]


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
