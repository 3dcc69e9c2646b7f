"""Products in which each row meets the matrix of its own expert, and their sums: where an expert's rows lie is read on the device."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def window_begin(offsets, first, skipped):
    """Return the place of a window's first pair."""
    return tl.load(offsets + first).to(tl.int32) + skipped


@triton.jit
def tile_of(offsets, begin, first, count, num_rows, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """Return this program's expert, counted from `first`, and its places start <= p < end; none if start >= end.

    Each expert's pairs in the window are cut into tiles of ROWS.  There are more programs than tiles, since the host does not know
    how many there are.
    """
    program, groups = tl.program_id(0), tl.arange(0, GROUPS)
    some = groups < count
    starts = tl.maximum(tl.load(offsets + first + groups, mask=some, other=0).to(tl.int32), begin)
    ends = tl.minimum(tl.load(offsets + first + groups + 1, mask=some, other=0).to(tl.int32), begin + num_rows)
    tiles = (tl.maximum(ends - starts, 0) + ROWS - 1) // ROWS
    group = tl.sum((tl.cumsum(tiles, 0) <= program).to(tl.int32), 0)  # the number of those whose tiles all come before
    earlier = tl.sum(tl.where(groups < group, tiles, 0), 0)
    start = tl.sum(tl.where(groups == group, starts, 0), 0) + (program - earlier) * ROWS
    return group, start, tl.sum(tl.where(groups == group, ends, 0), 0)


@triton.jit
def rows_of_tile(order, begin, start, end, CHOICES: tl.constexpr, ROWS: tl.constexpr):
    """Return which rows a tile has, their places in the window, and the rows of the inputs that they are made of."""
    places = start + tl.arange(0, ROWS)
    mask = places < end
    rows = tl.where(mask, places - begin, 0).to(tl.int64)
    taken = rows if CHOICES == 0 else tl.load(order + places, mask=mask, other=0) // CHOICES
    return mask, rows, taken


@triton.jit
def store_tile(sums, bias, expert, rows, columns, mask, known, out, OUTPUTS: tl.constexpr):
    """Write the products of a tile's rows and columns, to which the expert's bias is added, if there is one."""
    if bias is not None:
        sums += tl.load(bias + expert * OUTPUTS + columns, mask=known, other=0.0).to(tl.float32)[None, :]
    tl.store(out + rows[:, None] * OUTPUTS + columns[None, :], sums.to(out.dtype.element_ty), mask=mask[:, None] & known[None, :])


@triton.jit(do_not_specialize=["first", "count", "skipped", "num_rows"])
def grouped_product(
    x, weight, bias, order, offsets, out, first, count, skipped, num_rows, x_stride, expert_stride, input_stride, output_stride,
    CHOICES: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Multiply a tile of one expert's rows: program_id(0) of the tiles, program_id(1) of the columns.

    Rows of `x` are those of the window, or, if CHOICES is not 0, those of which each has that many pairs.
    """
    begin = window_begin(offsets, first, skipped)
    expert, start, end = tile_of(offsets, begin, first, count, num_rows, GROUPS, ROWS)
    if start >= end:
        return
    mask, rows, taken = rows_of_tile(order, begin, start, end, CHOICES, ROWS)
    depth, columns = tl.arange(0, DEPTH), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    known = columns < OUTPUTS
    numbers = x + taken[:, None] * x_stride + depth[None, :]
    matrix = weight + expert.to(tl.int64) * expert_stride + depth[:, None] * input_stride + columns[None, :] * output_stride
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for done in range(0, INPUTS, DEPTH):
        if INPUTS % DEPTH == 0:
            left = tl.load(numbers)  # rows behind the end are other ones: their sums are dropped
            right = tl.load(matrix, mask=known[None, :], other=0.0)
        else:
            inside = done + depth < INPUTS
            left = tl.load(numbers, mask=inside[None, :], other=0.0)
            right = tl.load(matrix, mask=inside[:, None] & known[None, :], other=0.0)
        sums = tl.dot(left, right, sums, input_precision="ieee")
        numbers += DEPTH
        matrix += DEPTH * input_stride
    store_tile(sums, bias, expert.to(tl.int64), rows, columns, mask, known, out, OUTPUTS)


@triton.jit(do_not_specialize=["first", "count", "skipped", "num_rows"])
def add_rows(
    rows, weights, places, offsets, total, first, count, skipped, num_rows,
    CHOICES: tl.constexpr, CHOICE_COLUMNS: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add to one row the results of its pairs in a window, in the order of its choices: program_id(0) of the rows, (1) of the columns."""
    row, choices = tl.program_id(0).to(tl.int64), tl.arange(0, CHOICE_COLUMNS)
    begin = window_begin(offsets, first, skipped)
    end = tl.minimum(tl.load(offsets + first + count).to(tl.int32), begin + num_rows)
    found = tl.load(places + row * CHOICES + choices, mask=choices < CHOICES, other=-1)
    if tl.sum(((found >= begin) & (found < end)).to(tl.int32), 0) == 0:
        return
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    known = columns < DIM
    sums = tl.load(total + row * DIM + columns, mask=known, other=0.0)
    for choice in range(CHOICES):
        pair = row * CHOICES + choice
        place = tl.load(places + pair)
        inside = (place >= begin) & (place < end)
        numbers = tl.load(rows + (place - begin) * DIM + columns, mask=inside & known, other=0.0).to(tl.float32)
        if weights is not None:
            numbers *= tl.load(weights + pair, mask=inside, other=0.0).to(tl.float32)
        sums += numbers
    tl.store(total + row * DIM + columns, sums, mask=known)
