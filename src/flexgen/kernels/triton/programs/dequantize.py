"""Decoding of matrices: a program writes a tile of numbers, each the value of a code times the scale of its block.

The bits are those of kernels/dequantize/reference.py.  Codes and zero points are integers until one is subtracted from the other, which
float32 holds exactly; the values of E2M1, E4M3 and E8M0 are made of their bits, exactly.  All else is one operation of float32 after the
other, in the reference's order, each rounded to nearest: a scale is multiplied or divided by its factor, a value is multiplied by its
scale, and the product is rounded once more, into the numbers that are written.  Divisions are those that round correctly (div_rn).  A
product is followed by a sum only in scales of scales; launches say enable_fp_fusion=False, so that the two are not fused there.  Nothing
here is a function of a library for which subnormal numbers are zero.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def packed_codes(words, lines, index, stride, mask, BITS: tl.constexpr, WORD_BITS: tl.constexpr, PADDED: tl.constexpr, ORDER: tl.constexpr):
    """Return codes as int32.

    Args:
        words: The words of WORD_BITS each, unsigned.
        lines: Where the first word of each line of codes is.
        index: The number of each code in its line.
        stride: The distance of two words of a line.
        mask: Which codes there are.
        BITS: The bits of a code.
        WORD_BITS: The bits of a word.
        PADDED: Whether a word holds whole codes only; otherwise codes may cross the borders of words.
        ORDER: The order of the codes of a word: "low first", "high first" or "awq".
    """
    if PADDED or WORD_BITS % BITS == 0:
        per_word: tl.constexpr = WORD_BITS // BITS
        place = index % per_word
        if ORDER == "awq":
            place = place // 2 + place % 2 * 4
        elif ORDER == "high first":
            place = per_word - 1 - place
        found = tl.load(words + lines + (index // per_word).to(tl.int64) * stride, mask=mask, other=0) >> (place * BITS)
    else:
        shift = index * BITS % WORD_BITS
        places = lines + (index * BITS // WORD_BITS).to(tl.int64) * stride
        low = tl.load(words + places, mask=mask, other=0) >> shift
        crosses = mask & (shift + BITS > WORD_BITS)
        following = tl.load(words + places + stride, mask=crosses, other=0)
        found = low | (following << ((WORD_BITS - shift) % WORD_BITS))
    return (found & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def small_floats(codes, BITS: tl.constexpr):
    """Return the values of codes of E2M1 (4 bits) or of E4M3 without infinities (8 bits), as float32.

    All bits but the sign are those of a float16 that is smaller by a power of two, so that float16's subnormal numbers are theirs.
    """
    if BITS == 4:
        magnitudes, sign = (codes & 7) << 9, (codes & 8) << 28
        wide = magnitudes.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
    else:
        magnitudes, sign = (codes & 127) << 7, (codes & 128) << 24
        wide = magnitudes.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        wide = tl.where((codes & 127) == 127, float("nan"), wide)
    return (wide.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def scale_values(stored, KIND: tl.constexpr):
    """Return stored scales as float32: floating-point numbers, or codes of "e4m3", "e8m0", or "power" (E8M0 in plain bytes)."""
    if KIND == "float":
        scales = stored.to(tl.float32)
    elif KIND == "e4m3":
        scales = small_floats(stored.to(tl.int32), 8)
    else:
        codes = stored.to(tl.int32)
        scales = tl.where(codes == 0, 0x00400000, codes << 23).to(tl.float32, bitcast=True)  # 2**-127 is subnormal
        if KIND == "e8m0":
            scales = tl.where(codes == 255, float("nan"), scales)
    return scales


@triton.jit
def spread(numbers, ROWS: tl.constexpr, RUNS: tl.constexpr, SHARED: tl.constexpr):
    """Return numbers (ROWS, RUNS), each for SHARED columns."""
    if RUNS > 1 and SHARED > 1:
        numbers = tl.reshape(tl.broadcast_to(numbers[:, :, None], [ROWS, RUNS, SHARED]), [ROWS, RUNS * SHARED])
    return numbers


@triton.jit
def block_scales(
    scales, factors, nested, nested_values, matrix, block, group, first_scale, offset, scale_matrix_stride, scale_row_stride, scale_stride,
    factor_stride, mask, SCALES: tl.constexpr, DIVIDED: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """Return the scales of blocks (rows, runs of columns) as float32."""
    places = block[:, None].to(tl.int64) * scale_row_stride + group[None, :].to(tl.int64) * scale_stride
    stored = tl.load(scales + matrix * scale_matrix_stride + places, mask=mask, other=0)
    if SCALES == "nested":
        of = (first_scale + block)[:, None] // NESTED + group[None, :] * 0
        found = tl.load(nested_values + stored.to(tl.int32), mask=mask, other=0.0)
        found = found * tl.load(nested + of, mask=mask, other=0.0).to(tl.float32) + offset
    else:
        found = scale_values(stored, SCALES)
    if factors is not None:
        factor = tl.load(factors + matrix * factor_stride).to(tl.float32)
        if DIVIDED:
            found = tl.div_rn(found, factor)
        else:
            found = found * factor
    return found


@triton.jit
def zero_codes(
    zeros, block, group, first_zero, zero_row_stride, zero_stride, mask, ZERO: tl.constexpr, ZERO_BITS: tl.constexpr,
    ZERO_PADDED: tl.constexpr, ZERO_ORDER: tl.constexpr, LACKS: tl.constexpr,
):  # fmt: skip
    """Return the codes (rows, runs of columns) that stand for zero; without ZERO_BITS they are stored one by one, and lack ZERO."""
    lines = group[None, :].to(tl.int64) * zero_stride
    if ZERO_BITS == 0:
        found = tl.load(zeros + block[:, None].to(tl.int64) * zero_row_stride + lines, mask=mask, other=0).to(tl.int32) + ZERO
    else:
        index = first_zero + block[:, None]
        codes = packed_codes(zeros, lines, index, zero_row_stride, mask, ZERO_BITS, 32, ZERO_PADDED, ZERO_ORDER)
        found = (codes + LACKS) & ((1 << ZERO_BITS) - 1)
    return found


@triton.jit(do_not_specialize=["numbers", "groups", "skipped", "first_zero", "first_scale"])
def decode_matrices(
    codes, values, scales, factors, nested, nested_values, zeros, order, out, rows, columns, row_tiles, column_tiles, numbers, groups,
    skipped, first_zero, first_scale, offset, code_matrix_stride, line_stride, code_stride, scale_matrix_stride, scale_row_stride,
    scale_stride, factor_stride, zero_row_stride, zero_stride,
    VALUES: tl.constexpr, BITS: tl.constexpr, WORD_BITS: tl.constexpr, PADDED: tl.constexpr, ORDER: tl.constexpr, SIGNED: tl.constexpr,
    ALONG_ROWS: tl.constexpr, FLAT: tl.constexpr, SCALES: tl.constexpr, DIVIDED: tl.constexpr, NESTED: tl.constexpr, ZERO: tl.constexpr,
    ZERO_BITS: tl.constexpr, ZERO_PADDED: tl.constexpr, ZERO_ORDER: tl.constexpr, LACKS: tl.constexpr, GROUP: tl.constexpr,
    SHARED: tl.constexpr, BLOCK_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Decode a tile of ROWS by COLUMNS numbers of a matrix.

    Args:
        codes: The words of codes: a line of them is a row or, where codes are packed ALONG_ROWS, a column.
        values: The values of codes, float32, for the VALUES "table"; others are "integer" and "small float".
        scales: The scales of all blocks.
        factors: A number by which the scales of each matrix are multiplied, or DIVIDED; None for none.
        nested: The scales of scales, for the SCALES "nested", of which NESTED share one; `nested_values` are those of their codes.
        zeros: The zero points of blocks, packed if there are ZERO_BITS; None if all are ZERO.
        order: The group of each column; None if GROUP columns share a scale (all if it is 0).
        out: The numbers, (matrices, rows, columns).
        numbers: Of a FLAT matrix, which may end within its last row, the number of its numbers.
        SHARED: The columns of a tile that share a scale, wherever the tile is.
        BLOCK_ROWS: The rows that share a scale; 0 for all.
    """
    runs: tl.constexpr = COLUMNS // SHARED
    program = tl.program_id(0)
    matrix = (program // (row_tiles * column_tiles)).to(tl.int64)
    row = program // column_tiles % row_tiles * ROWS + tl.arange(0, ROWS)
    first_column = program % column_tiles * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    is_row = row[:, None] < rows
    mask = is_row & (column[None, :] < columns)
    places = row[:, None].to(tl.int64) * columns + column[None, :]
    if FLAT:
        mask = mask & (places < numbers)
    words = codes + matrix * code_matrix_stride
    if ALONG_ROWS:
        found = packed_codes(
            words, column[None, :].to(tl.int64) * line_stride, row[:, None], code_stride, mask, BITS, WORD_BITS, PADDED, ORDER
        )
    else:
        found = packed_codes(
            words, row[:, None].to(tl.int64) * line_stride, column[None, :], code_stride, mask, BITS, WORD_BITS, PADDED, ORDER
        )

    start = first_column + tl.arange(0, runs) * SHARED  # the first of the columns that share a scale
    is_group = start < columns
    block = row * 0 if BLOCK_ROWS == 0 else (skipped + row) // BLOCK_ROWS
    if order is not None:
        group = tl.load(order + start, mask=is_group, other=0)
        exists = (group >= 0) & (group < groups)
        is_group = is_group & exists
    else:
        group = start * 0 if GROUP == 0 else start // GROUP
    known = is_row & is_group[None, :]
    scale = block_scales(
        scales, factors, nested, nested_values, matrix, block, group, first_scale, offset, scale_matrix_stride, scale_row_stride,
        scale_stride, factor_stride, known, SCALES, DIVIDED, NESTED,
    )  # fmt: skip
    if order is not None:  # to check it on the host would be to wait for it
        scale = tl.where(exists[None, :], scale, float("nan"))

    if VALUES == "table":
        number = tl.load(values + found)
    elif VALUES == "small float":
        number = small_floats(found, BITS)
    else:
        if SIGNED:
            found = found ^ 128
        if zeros is None:
            number = (found - ZERO).to(tl.float32)
        else:
            zero = zero_codes(
                zeros, block, group, first_zero, zero_row_stride, zero_stride, known, ZERO, ZERO_BITS, ZERO_PADDED, ZERO_ORDER, LACKS
            )
            number = (found - spread(zero, ROWS, runs, SHARED)).to(tl.float32)
    result = number * spread(scale, ROWS, runs, SHARED)
    tl.store(out + matrix * rows * columns + places, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["start"])
def decode_ranges(codes, ranges, out, rows, columns, start, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Decode a tile of rows of 4-bit codes, of which SIZE rows of a column share a range: code / scale + least.

    program_id(0) of the tiles of columns, program_id(1) of those of rows.
    """
    row, column = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row[:, None] < rows) & (column[None, :] < columns)
    pairs = (start + row) // 2 - start // 2
    stored = tl.load(codes + pairs[:, None].to(tl.int64) * columns + column[None, :], mask=mask, other=0).to(tl.int32)
    number = ((stored >> (4 - (start + row) % 2 * 4)[:, None]) & 15).to(tl.float32)
    places = ((start + row) // SIZE - start // SIZE)[:, None].to(tl.int64) * 2 * columns + column[None, :]
    scale = tl.load(ranges + places, mask=mask, other=1.0).to(tl.float32)
    least = tl.load(ranges + places + columns, mask=mask, other=0.0).to(tl.float32)
    result = tl.div_rn(number, scale) + least
    tl.store(out + row[:, None].to(tl.int64) * columns + column[None, :], result.to(out.dtype.element_ty), mask=mask)
