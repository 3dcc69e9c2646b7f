"""Sealed pages on a CPU: rounding numbers to codes, and bringing them back.  The codes are bit for bit those of kernels/codes.py.

A work item is a page.  Keys are coded across the page, values along the token; see `SealedPages` for the layout.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types

from flexgen.base.compiled import entry, intrinsic
from flexgen.errors import EngineError
from flexgen.kernels.codes import GROUP, HALF_GROUP, LARGEST_HALF
from flexgen.kernels.cpu.formats import FLOAT, INT32, narrow, widen
from flexgen.kernels.cpu.rows import LANES, moved, page_and_next, pointer, widen_row
from flexgen.kernels.cpu.vectors import vector_of

BY_127, BY_15, LARGEST = np.float32(1 / 127), np.float32(1 / 15), np.float32(LARGEST_HALF)
TO_NEAREST = np.float32(1.5 * 2**23)  # adding and subtracting it rounds to the nearest integer, ties to even
ZERO, ONE = np.float32(0), np.float32(1)


@intrinsic
def rotate_vector(typing_context: Any, row: Any) -> Any:
    """Compile `rotate_vector(row)`: the first steps of the transform, within LANES adjacent float32 numbers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        floats, integers = vector_of(FLOAT), vector_of(INT32)
        place = builder.bitcast(arguments[0], floats.as_pointer())
        numbers, half = builder.load(place, align=4), 1
        while half < LANES:
            partners = builder.shuffle_vector(numbers, numbers, ir.Constant(integers, [lane ^ half for lane in range(LANES)]))
            signs = ir.Constant(floats, [-1.0 if lane & half else 1.0 for lane in range(LANES)])
            numbers = builder.fadd(builder.fmul(numbers, signs), partners)
            half *= 2
        builder.store(numbers, place, align=4)
        return context.get_dummy_value()

    return types.void(row), generate


@njit
def rotate(row: Any, dim: int) -> None:
    """Multiply float32 numbers by the block-diagonal Hadamard matrix, in place (`codes.rotated`)."""
    first = 0
    while first < dim:
        size = 1
        while 2 * size <= dim - first:
            size *= 2
        half = 1
        if size >= LANES:
            for begin in range(first, first + size, LANES):
                rotate_vector(moved(row, begin))
            half = LANES
        while half < size:
            for begin in range(first, first + size, 2 * half):
                for i in range(begin, begin + half):
                    one, other = row[i], row[i + half]
                    row[i] = one + other
                    row[i + half] = one - other
            half *= 2
        if size > 1:
            factor = np.float32(1 / math.sqrt(size))
            for i in range(first, first + size):
                row[i] = row[i] * factor
        first += size


@njit
def code_bytes_of(dim: int, bits: int) -> int:
    """Return the bytes of a head's codes."""
    return dim if bits == 8 else dim // GROUP * HALF_GROUP + (dim % GROUP + 1) // 2


@njit
def encode_head(row: Any, dim: int, bits: int, codes: Any, code_stride: int, parameters: Any, stride: int) -> None:
    """Round a head's float32 numbers to codes, `code_stride` apart, with float16 parameters `stride` apart."""
    groups, begin = (dim + GROUP - 1) // GROUP, 0
    for group in range(groups):
        first, size = group * GROUP, min(GROUP, dim - group * GROUP)
        least, largest, poison = row[first], row[first], ZERO
        for i in range(first, first + size):
            least, largest, poison = min(least, row[i]), max(largest, row[i]), poison + row[i] * ZERO
        if bits == 8:
            largest, least = max(largest, -least), ZERO
            scale = largest * BY_127
        else:
            scale = (largest - least) * BY_15
            least = min(max(least, -LARGEST), LARGEST)
        parameters[group * stride] = narrow(min(scale, LARGEST) + poison, parameters[0])
        scale = widen(parameters[group * stride])
        if bits == 4:
            parameters[(groups + group) * stride] = narrow(least, parameters[0])
            least = widen(parameters[(groups + group) * stride])
        step = scale if scale > 0 else ONE
        half = size if bits == 8 else (size + 1) // 2
        for i in range(half):
            low = round_code((row[first + i] - least) / step, bits)
            if bits == 4 and half + i < size:
                low |= round_code((row[first + half + i] - least) / step, bits) << 4
            codes[(begin + i) * code_stride] = np.uint8(low)
        begin += half


@njit
def round_code(number: Any, bits: int) -> Any:
    """Return the code of a number in steps, as the bits of a byte."""
    lowest, highest = (np.float32(-127), np.float32(127)) if bits == 8 else (ZERO, np.float32(15))
    inside = min(max(number, lowest), highest) if number == number else ZERO
    return np.int32((inside + TO_NEAREST) - TO_NEAREST) & 255


@njit
def decode_head(codes: Any, code_stride: int, parameters: Any, stride: int, dim: int, bits: int, row: Any) -> None:
    """Bring a head's numbers back; the arguments are those of `encode_head`."""
    groups, begin = (dim + GROUP - 1) // GROUP, 0
    for group in range(groups):
        first, size = group * GROUP, min(GROUP, dim - group * GROUP)
        scale = widen(parameters[group * stride])
        if bits == 8:
            for i in range(size):
                row[first + i] = np.float32(np.int8(codes[(begin + i) * code_stride])) * scale
            begin += size
        else:
            least, half = widen(parameters[(groups + group) * stride]), (size + 1) // 2
            for i in range(half):
                byte = codes[(begin + i) * code_stride]
                row[first + i] = np.float32(byte & 15) * scale + least
                if half + i < size:
                    row[first + half + i] = np.float32((byte >> 4) & 15) * scale + least
            begin += half


@entry
def seal(
    begin: int, end: int, numbers: Any, memory: Any, parameters: Any, page_ids: Any,
    page_tokens: int, bits: int, turns: bool, by_token: bool, workspace: Any,
) -> None:  # fmt: skip
    """Store pages begin <= page < end of keys, or of values (`by_token`).

    Args:
        begin: The first page.
        end: The page after the last.
        numbers: (pages * page_tokens, heads, dim).
        memory: uint8 (pages of the pool, heads, bytes of a head).
        parameters: The same memory as int16.
        page_ids: Where the pages are stored.
        page_tokens: The number of tokens of a page.
        bits: The bits of a code.
        turns: Whether numbers are rotated first.
        by_token: Whether the codes of a token are adjacent, as for values.
        workspace: float32 (dim,).
    """
    _, heads, dim = numbers.shape
    num_pages, head_bytes = memory.shape[0], memory.shape[2]
    row, code_bytes = pointer(workspace, 0), code_bytes_of(dim, bits)
    for page in range(begin, end):
        place = page_ids[page]
        if place < 0 or place >= num_pages:
            raise EngineError("a sealed page's place is not in the pool")
        for head in range(heads):
            start = (place * heads + head) * head_bytes
            codes = pointer(memory, start)
            halves = pointer(parameters, (start + code_bytes * page_tokens) // 2)
            for token in range(page_tokens):
                widen_row(pointer(numbers, ((page * page_tokens + token) * heads + head) * dim), row, dim)
                if turns:
                    rotate(row, dim)
                if by_token:
                    encode_head(row, dim, bits, moved(codes, token * code_bytes), 1, moved(halves, token), page_tokens)
                else:
                    encode_head(row, dim, bits, moved(codes, token), page_tokens, moved(halves, token), page_tokens)


@entry
def unseal(
    begin: int, end: int, memory: Any, parameters: Any, page_table: Any, start: int,
    page_tokens: int, bits: int, turns: bool, by_token: bool, out: Any, workspace: Any,
) -> None:  # fmt: skip
    """Bring positions start + begin <= position < start + end back to rows begin <= row < end of `out`, (rows, heads, dim)."""
    _, heads, dim = out.shape
    num_pages, head_bytes = memory.shape[0], memory.shape[2]
    numbers, code_bytes = pointer(workspace, 0), code_bytes_of(dim, bits)
    for row in range(begin, end):
        index, token = (start + row) // page_tokens, (start + row) % page_tokens
        page, _ = page_and_next(pointer(page_table, 0), index, index, num_pages)
        for head in range(heads):
            place = (page * heads + head) * head_bytes
            codes = pointer(memory, place)
            halves = pointer(parameters, (place + code_bytes * page_tokens) // 2)
            if by_token:
                decode_head(moved(codes, token * code_bytes), 1, moved(halves, token), page_tokens, dim, bits, numbers)
            else:
                decode_head(moved(codes, token), page_tokens, moved(halves, token), page_tokens, dim, bits, numbers)
            if turns:
                rotate(numbers, dim)
            target = pointer(out, (row * heads + head) * dim)
            for i in range(dim):
                target[i] = narrow(numbers[i], target[0])
