"""Compiled kernels of packed integers, on NumPy arrays.

The codes of a row are unpacked into bytes that stay in the first-level cache, and leave it in vectors: minus the zero point and times the
scale of their group.  Words that are stored transposed are brought into rows first, some outputs and CHUNK inputs at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from flexgen.base.compiled import entry
from flexgen.kernels.cpu.formats import narrow
from flexgen.kernels.cpu.rows import LANES, moved, pointer
from flexgen.kernels.dequantize.compiled import store
from flexgen.kernels.dequantize.halves import split_halves, store_halves
from flexgen.kernels.dequantize.loops import small, store_codes
from flexgen.kernels.dequantize.turning import turn, turn_eight

CHUNK = 2048  # columns that are unpacked before they are scaled; 32 codes of any width fill whole words
GPTQ_ROWS = 32  # outputs whose words are brought into rows together: two lines of the cache
AWQ_WORDS = 16  # words, of 8 outputs each: a line of the cache
_PAD = 16  # words between rows, so that rows do not compete for the same places of the cache


@entry
def decode_packed(
    begin: int,
    end: int,
    packed: Any,
    bits: int,
    per_word: int,
    flip: int,
    scales: Any,
    zeros: Any,
    zero: Any,
    block_rows: int,
    skipped: int,
    group: int,
    groups: Any,
    out: Any,
) -> None:
    """Decode rows begin <= row < end.

    Args:
        begin: The first row.
        end: The row after the last one.
        packed: The stored bytes, uint8 (rows, bytes of a row).
        bits: The bits of a code.
        per_word: The codes of a 32-bit word, whose other bits are not used; 0 if codes follow each other without gaps.
        flip: The bits that are inverted in each code: 128 makes codes of signed bytes.
        scales: The scales, float32 (rows of blocks, groups).
        zeros: The codes that stand for zero, float32 of the same shape; without elements if all are `zero`.
        zero: The code that stands for zero.
        block_rows: The rows that share a scale.
        skipped: The rows of the first block that come before row 0.
        group: The columns that share a scale.
        groups: The group of each column, int32; without elements if groups are adjacent columns.
        out: The decoded numbers, (rows, columns), in the form of kernels/cpu/formats.py.
    """
    columns, row_bytes = out.shape[1], packed.shape[1]
    codes, numbers = np.empty(CHUNK, np.uint8), np.empty(CHUNK, np.float32)
    halves = per_word == 0 and in_halves(bits, group, groups)
    for row in range(begin, end):
        block = (skipped + row) // block_rows
        if halves:
            source, target = pointer(packed, row * row_bytes), pointer(out, row * columns)
            scale_halves(source, 0, columns, block, scales, zeros, zero, group, target, out[row, 0])
            continue
        for first in range(0, columns, CHUNK):
            count = min(CHUNK, columns - first)
            if per_word > 0:
                unpack_padded(pointer(packed, row * row_bytes), first, count, bits, per_word, codes)
            else:
                unpack(pointer(packed, row * row_bytes + first * bits // 8), count, bits, flip, codes)
            target = pointer(out, row * columns + first)
            scale_codes(codes, first, count, block, scales, zeros, zero, group, groups, numbers, target, out[row, 0])


@entry
def decode_gptq(begin: int, end: int, words: Any, bits: int, scales: Any, zeros: Any, group: int, groups: Any, out: Any) -> None:
    """Decode blocks of GPTQ_ROWS outputs, begin <= block < end, of a matrix whose codes are packed along the inputs.

    Args:
        begin: The first block.
        end: The block after the last one.
        words: The words, uint32 (words of an output, outputs).
        bits: The bits of a code.
        scales: The scales, float32 (outputs, groups).
        zeros: The codes that stand for zero, float32 of the same shape.
        group: The inputs that share a scale.
        groups: The group of each input, int32; without elements if groups are adjacent inputs.
        out: The decoded numbers, (outputs, inputs), in the form of kernels/cpu/formats.py.
    """
    outputs, columns = out.shape
    stride, halves = CHUNK * bits // 32 + _PAD, in_halves(bits, group, groups)
    lines = np.empty(GPTQ_ROWS * stride, np.uint32)
    packed, codes, numbers = lines.view(np.uint8), np.empty(CHUNK, np.uint8), np.empty(CHUNK, np.float32)
    for block in range(begin, end):
        first_row = block * GPTQ_ROWS
        rows = min(GPTQ_ROWS, outputs - first_row)
        for first in range(0, columns, CHUNK):
            count = min(CHUNK, columns - first)
            of_chunk = pointer(words, first * bits // 32 * outputs + first_row)
            turn(of_chunk, outputs, (count * bits + 31) // 32, rows, pointer(lines, 0), stride)
            for i in range(rows):
                row, source = first_row + i, pointer(packed, 4 * i * stride)
                target = pointer(out, row * columns + first)
                if halves:
                    scale_halves(source, first, count, row, scales, zeros, np.float32(0), group, target, out[row, 0])
                    continue
                unpack(source, count, bits, 0, codes)
                scale_codes(codes, first, count, row, scales, zeros, np.float32(0), group, groups, numbers, target, out[row, 0])


@entry
def decode_awq(begin: int, end: int, words: Any, scales: Any, zeros: Any, group: int, groups: Any, out: Any) -> None:
    """Decode blocks of 8 * AWQ_WORDS outputs, begin <= block < end, of a matrix of 4-bit codes that are packed along the outputs.

    Args:
        begin: The first block.
        end: The block after the last one.
        words: The words, uint32 (inputs, outputs / 8).
        scales: The scales, float32 (outputs, groups).
        zeros: The codes that stand for zero, float32 of the same shape.
        group: The inputs that share a scale.
        groups: The group of each input, int32; without elements if groups are adjacent inputs.
        out: The decoded numbers, (outputs, inputs), in the form of kernels/cpu/formats.py.
    """
    columns, row_words = out.shape[1], words.shape[1]
    stride, halves = CHUNK // 8 + _PAD, in_halves(4, group, groups)
    lines = np.empty(8 * AWQ_WORDS * stride, np.uint32)
    packed, codes, numbers = lines.view(np.uint8), np.empty(CHUNK, np.uint8), np.empty(CHUNK, np.float32)
    for block in range(begin, end):
        first_word = block * AWQ_WORDS
        num_words = min(AWQ_WORDS, row_words - first_word)
        for first in range(0, columns, CHUNK):
            count = min(CHUNK, columns - first)
            for eight in range((count + 7) // 8):
                inputs = min(8, count - 8 * eight)
                for i in range(num_words):
                    source = pointer(words, (first + 8 * eight) * row_words + first_word + i)
                    turn_eight(source, row_words, inputs, pointer(lines, 8 * i * stride + eight), stride)
            for i in range(8 * num_words):
                row, source = 8 * first_word + i, pointer(packed, 4 * i * stride)
                target = pointer(out, row * columns + first)
                if halves:
                    scale_halves(source, first, count, row, scales, zeros, np.float32(0), group, target, out[row, 0])
                    continue
                unpack(source, count, 4, 0, codes)
                scale_codes(codes, first, count, row, scales, zeros, np.float32(0), group, groups, numbers, target, out[row, 0])


@entry
def unpack_zeros(begin: int, end: int, words: Any, shifts: Any, mask: int, lacks: int, first: int, zeros: Any) -> None:
    """Write the zero points of rows begin <= row < end.

    Args:
        begin: The first row.
        end: The row after the last one.
        words: The words, uint32 (words, groups), of which each has zero points of adjacent rows.
        shifts: The bits below each zero point of a word, int64 (zero points of a word,).
        mask: The bits of a zero point.
        lacks: What a stored zero point lacks.
        first: The zero points before that of row 0.
        zeros: The zero points, float32 (rows, groups); they are written.
    """
    for row in range(begin, end):
        word, place = (first + row) // len(shifts), (first + row) % len(shifts)
        shift = shifts[place]
        for group in range(zeros.shape[1]):
            zeros[row, group] = small(((np.int64(words[word, group]) >> shift) + lacks) & mask)


@njit
def unpack(packed: Any, count: int, bits: int, flip: int, codes: Any) -> None:
    """Write codes that follow each other without gaps, low bits first, as bytes."""
    if bits == 8:
        for i in range(count):
            codes[i] = packed[i] ^ flip
    elif bits == 4:
        whole = count // (2 * LANES) * LANES
        for i in range(0, whole, LANES):
            split_halves(moved(packed, i), pointer(codes, 2 * i))
        for i in range(whole, count // 2):
            codes[2 * i] = packed[i] & 15
            codes[2 * i + 1] = packed[i] >> 4
    elif bits == 2:
        for i in range(count // 4):
            codes[4 * i] = packed[i] & 3
            codes[4 * i + 1] = (packed[i] >> 2) & 3
            codes[4 * i + 2] = (packed[i] >> 4) & 3
            codes[4 * i + 3] = packed[i] >> 6
    else:
        for i in range(count // 8):
            eight = 0
            for k in range(bits):
                eight |= np.int64(packed[bits * i + k]) << (8 * k)
            for k in range(8):
                codes[8 * i + k] = (eight >> (bits * k)) & ((1 << bits) - 1)
    _unpack_one_by_one(packed, count - count % 8, count, bits, flip, codes)


@njit
def _unpack_one_by_one(packed: Any, start: int, stop: int, bits: int, flip: int, codes: Any) -> None:
    for i in range(start, stop):
        byte, shift = i * bits // 8, i * bits % 8
        code = np.int64(packed[byte]) >> shift
        if shift + bits > 8:
            code |= np.int64(packed[byte + 1]) << (8 - shift)
        codes[i] = (code & ((1 << bits) - 1)) ^ flip


@njit
def unpack_padded(packed: Any, first: int, count: int, bits: int, per_word: int, codes: Any) -> None:
    """Write codes of which whole ones are in each word, as bytes."""
    for i in range(count):
        word, place = (first + i) // per_word, (first + i) % per_word
        value = np.int64(0)
        for k in range(4):
            value |= np.int64(packed[4 * word + k]) << (8 * k)
        codes[i] = (value >> (bits * place)) & ((1 << bits) - 1)


@njit
def in_halves(bits: int, group: int, groups: Any) -> bool:
    """Return whether codes are those that `scale_halves` decodes: of 4 bits, in groups of adjacent columns that fill vectors and chunks."""
    return bits == 4 and len(groups) == 0 and group % (2 * LANES) == 0 and (CHUNK % group == 0 or group % CHUNK == 0)


@njit
def scale_halves(
    packed: Any, first: int, count: int, row: int, scales: Any, zeros: Any, zero: Any, group: int, target: Any, like: Any
) -> None:
    """Store the numbers that packed codes of 4 bits of the columns from `first` stand for, with row `row` of scales and zeros.

    `first` is a multiple of CHUNK, and `in_halves` is true.
    """
    i = 0
    of = first // group
    while i < count:
        stop = min((of + 1) * group - first, count)
        minus, scale = zeros[row, of] if zeros.size > 0 else zero, scales[row, of]
        while i + 2 * LANES <= stop:
            store_halves(moved(packed, i // 2), minus, scale, moved(target, i))
            i += 2 * LANES
        while i < stop:
            target[i] = narrow((small((packed[i // 2] >> (4 * (i % 2))) & 15) - minus) * scale, like)
            i += 1
        of += 1


@njit
def scale_codes(
    codes: Any,
    first: int,
    count: int,
    row: int,
    scales: Any,
    zeros: Any,
    zero: Any,
    group: int,
    groups: Any,
    numbers: Any,
    target: Any,
    like: Any,
) -> None:
    """Store the numbers that codes of the columns from `first` stand for, with row `row` of scales and zeros."""
    if len(groups) > 0:
        of_row, of_column = row * scales.shape[1], pointer(groups, first)
        factors, middles = pointer(scales, of_row), pointer(zeros, of_row if zeros.size > 0 else 0)
        if zeros.size > 0:
            for i in range(count):
                numbers[i] = (np.float32(codes[i]) - middles[of_column[i]]) * factors[of_column[i]]
        else:
            for i in range(count):
                numbers[i] = (np.float32(codes[i]) - zero) * factors[of_column[i]]
        store(pointer(numbers, 0), np.float32(1), target, count, like)
        return
    i = 0
    while i < count:
        of = (first + i) // group
        size = min((of + 1) * group - first, count) - i
        minus, scale = zeros[row, of] if zeros.size > 0 else zero, scales[row, of]
        whole = i + size // LANES * LANES
        for k in range(i, whole, LANES):
            store_codes(pointer(codes, k), minus, scale, moved(target, k))
        for k in range(whole, i + size):
            target[k] = narrow((np.float32(codes[k]) - minus) * scale, like)
        i += size
