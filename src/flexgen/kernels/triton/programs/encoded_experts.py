"""Products in which each row meets the matrix of its own expert, whose codes of 4 bits are decoded tile by tile, in registers.

A tile has the bits that dequantize.py gives (the same operations of float32, rounded once), and tiles and their order are those of
experts.py: results are those of decoding first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flexgen.kernels.triton.programs.dequantize import scale_values, small_floats
from flexgen.kernels.triton.programs.experts import rows_of_tile, store_tile, tile_of, window_begin


@triton.jit
def spread_down(numbers, RUNS: tl.constexpr, SHARED: tl.constexpr, COLUMNS: tl.constexpr):
    """Return numbers (RUNS, COLUMNS), each for SHARED rows."""
    if RUNS > 1 and SHARED > 1:
        numbers = tl.reshape(tl.broadcast_to(numbers[:, None, :], [RUNS, SHARED, COLUMNS]), [RUNS * SHARED, COLUMNS])
    return numbers


@triton.jit
def decoded_tile(
    codes, scales, zeros, shifts, known, done, INPUTS: tl.constexpr, E2M1: tl.constexpr, ZERO: tl.constexpr, PACKED: tl.constexpr,
    SCALES: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Return the numbers of the inputs done <= input < done + DEPTH, float32 (DEPTH, COLUMNS), and 0 behind the last.

    Args:
        codes: Where the codes of each column's output are, (1, COLUMNS); `scales` and `zeros` likewise.
        shifts: By how many bits the zero points of the columns are shifted in their words, if these are PACKED.
        known: Which columns there are.
        done: The number of the first input.
    """
    runs: tl.constexpr = DEPTH // SHARED
    pair, start = done // 2 + tl.arange(0, DEPTH // 2), done + tl.arange(0, runs) * SHARED
    mask, is_group = known[None, :], known[None, :]
    if INPUTS % DEPTH != 0:
        mask, is_group = mask & (pair < (INPUTS + 1) // 2)[:, None], is_group & (start < INPUTS)[:, None]
    stored = tl.load(codes + pair[:, None], mask=mask, other=0).to(tl.int32)  # (DEPTH / 2, COLUMNS)
    found = tl.reshape(tl.permute(tl.join(stored & 15, stored >> 4), (0, 2, 1)), [DEPTH, COLUMNS])
    group = start * 0 if GROUP == 0 else start // GROUP
    scale = scale_values(tl.load(scales + group[:, None], mask=is_group, other=0), SCALES)  # (runs, COLUMNS)
    if E2M1:
        number = small_floats(found, 4)
    elif zeros is None:
        number = (found - ZERO).to(tl.float32)
    else:
        zero = tl.load(zeros + group[:, None], mask=is_group, other=0).to(tl.int32)
        zero = (zero >> shifts) & 15 if PACKED else zero + ZERO
        number = (found - spread_down(zero, runs, SHARED, COLUMNS)).to(tl.float32)
    number = number * spread_down(scale, runs, SHARED, COLUMNS)
    if INPUTS % DEPTH != 0:
        number = tl.where((done + tl.arange(0, DEPTH) < INPUTS)[:, None], number, 0.0)
    return number


@triton.jit(do_not_specialize=["first", "count", "skipped", "num_rows"])
def encoded_product(
    x, codes, scales, zeros, bias, order, offsets, out, first, count, skipped, num_rows, x_stride, code_expert_stride, code_block_stride,
    scale_expert_stride, scale_block_stride, zero_expert_stride, zero_block_stride,
    CHOICES: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr, LINE: tl.constexpr, LINE_GROUPS: tl.constexpr,
    E2M1: tl.constexpr, ZERO: tl.constexpr, PACKED: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Multiply a tile of one expert's rows: program_id(0) of the tiles, program_id(1) of the columns.

    Args:
        x: The inputs, as in grouped_product.
        codes: The codes, LINE bytes for each output; there are BLOCK outputs in a block.
        scales: The scales, LINE_GROUPS for each output.
        zeros: The zero points: PACKED words of eight outputs, or a number for each scale, to which ZERO is added; None if all are ZERO.
        E2M1: Whether codes are floating-point numbers; otherwise they are integers.
        SCALES: How scales are stored, see scale_values.
        GROUP: The inputs that share a scale; 0 for all.
        SHARED: The inputs of a tile that share a scale, wherever the tile is.
    """
    begin = window_begin(offsets, first, skipped)
    expert, start, end = tile_of(offsets, begin, first, count, num_rows, GROUPS, ROWS)
    if start >= end:
        return
    mask, rows, taken = rows_of_tile(order, begin, start, end, CHOICES, ROWS)
    depth, columns = tl.arange(0, DEPTH), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    known = columns < OUTPUTS
    which, block, output = expert.to(tl.int64), columns // BLOCK, columns % BLOCK
    numbers = x + taken[:, None] * x_stride + depth[None, :]
    codes += (which * code_expert_stride + block * code_block_stride + output * LINE)[None, :]
    scales += (which * scale_expert_stride + block * scale_block_stride + output * LINE_GROUPS)[None, :]
    shifts = (output % 8 * 4)[None, :]
    if zeros is not None:
        line = output // 8 if PACKED else output
        zeros += (which * zero_expert_stride + block * zero_block_stride + line * LINE_GROUPS)[None, :]
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for done in range(0, INPUTS, DEPTH):
        if INPUTS % DEPTH == 0:
            left = tl.load(numbers)  # rows behind the end are other ones: their sums are dropped
        else:
            left = tl.load(numbers, mask=(done + depth < INPUTS)[None, :], other=0.0)
        right = decoded_tile(codes, scales, zeros, shifts, known, done, INPUTS, E2M1, ZERO, PACKED, SCALES, GROUP, SHARED, COLUMNS, DEPTH)
        sums = tl.dot(left, right.to(left.dtype), sums, input_precision="ieee")
        numbers += DEPTH
    store_tile(sums, bias, which, rows, columns, mask, known, out, OUTPUTS)
