"""What lies between the matrix products of a decoder layer, each in one sweep over memory: norms and rotations.

Numbers are computed in float32 and rounded wherever transformers rounds them, so that results can be equal to the last bit.  Whether they
are, the caller finds out: a sum of squares depends on its order, which here is torch's (ATen's SumKernel.cpp) in registers of 8 numbers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils

from flexgen.base.compiled import entry, intrinsic
from flexgen.kernels.cpu.formats import FLOAT, narrow, widen, widened
from flexgen.kernels.cpu.rows import clear, moved, pointer, widen_row
from flexgen.kernels.cpu.tile import INT64

REGISTER = 8  # numbers of a register in torch's sums
BLOCK = 4 * REGISTER  # numbers that are added at once, each to a sum of its own
LEVELS, LEVEL_BITS = 4, 4  # a sum of a level is added to the next level's after 16 numbers
WEIGHT_LAST, WEIGHT_BEFORE_ROUNDING, ONE_MORE = range(3)  # how a norm applies its weight
ONE = np.float32(1)


@entry
def rms_norm(begin: int, end: int, x: Any, weight: Any, size: Any, epsilon: Any, style: int, out: Any) -> None:
    """Divide rows begin <= row < end by their root mean square, and multiply them by a weight.

    Args:
        begin: The first row.
        end: The row after the last one.
        x: The numbers, (rows, columns), in the form of kernels/cpu/formats.py.
        weight: The weight, (columns,).
        size: The number of columns as float32.
        epsilon: What is added to the mean of squares, float32.
        style: WEIGHT_LAST rounds before the weight is applied, and again; WEIGHT_BEFORE_ROUNDING rounds once; ONE_MORE does so, too, and
            the factor is 1 + weight.
        out: The results, (rows, columns).
    """
    columns = x.shape[1]
    sums = np.empty(LEVELS * BLOCK, np.float32)
    for row in range(begin, end):
        source, target, factors = pointer(x, row * columns), pointer(out, row * columns), pointer(weight, 0)
        scale = ONE / np.float32(math.sqrt(_sum_of_squares(source, columns, pointer(sums, 0)) / size + epsilon))
        if style == WEIGHT_LAST:
            _weigh_rounded(source, factors, scale, columns, target)
        elif style == WEIGHT_BEFORE_ROUNDING:
            _weigh(source, factors, scale, columns, target)
        else:
            _weigh_one_more(source, factors, scale, columns, target)


@entry
def rotate(begin: int, end: int, query: Any, key: Any, cosines: Any, sines: Any, new_query: Any, new_key: Any) -> None:
    """Rotate the heads of tokens begin <= token < end; numbers beyond the angles are copied.

    Args:
        begin: The first token.
        end: The token after the last one.
        query: The queries: an array that begins with the first number, and the numbers from one token to the next and from head to head.
        key: The keys, likewise.
        cosines: The cosines, (tokens, angles).
        sines: The sines, (tokens, angles).
        new_query: The rotated queries, (tokens, heads, head_dim).
        new_key: The rotated keys, (tokens, kv_heads, head_dim).
    """
    angles = cosines.shape[1]
    wide = np.empty((2, angles), np.float32)
    cosine, sine = pointer(wide, 0), pointer(wide, angles)
    for token in range(begin, end):
        widen_row(pointer(cosines, token * angles), cosine, angles)
        widen_row(pointer(sines, token * angles), sine, angles)
        _rotate_heads(query, token, cosine, sine, angles, new_query)
        _rotate_heads(key, token, cosine, sine, angles, new_key)


@njit
def _sum_of_squares(x: Any, size: int, sums: Any) -> Any:
    """Return the sum of the squares of adjacent numbers, as torch adds them."""
    steps = size // BLOCK
    clear(sums, LEVELS * BLOCK)
    step = 0
    while step + (1 << LEVEL_BITS) <= steps:
        _add_squares(moved(x, step * BLOCK), 1 << LEVEL_BITS, sums)
        step += 1 << LEVEL_BITS
        level = 1
        while level < LEVELS:
            below, above = moved(sums, (level - 1) * BLOCK), moved(sums, level * BLOCK)
            _add(below, above, BLOCK)
            clear(below, BLOCK)
            if step & (((1 << LEVEL_BITS) - 1) << (level * LEVEL_BITS)):
                break
            level += 1
    _add_squares(moved(x, step * BLOCK), steps - step, sums)
    for level in range(1, LEVELS):
        _add(moved(sums, level * BLOCK), sums, BLOCK)
    whole = size // REGISTER * REGISTER
    for i in range(steps * BLOCK, whole):
        sums[i % REGISTER] += widen(x[i]) * widen(x[i])
    for part in range(1, BLOCK // REGISTER):
        _add(moved(sums, part * REGISTER), sums, REGISTER)
    total = np.float32(0)
    for i in range(whole, size):
        total += widen(x[i]) * widen(x[i])
    for i in range(REGISTER):
        total += sums[i]
    return total


@intrinsic
def _add_squares(typing_context: Any, x: Any, steps: Any, sums: Any) -> Any:
    """Compile `_add_squares(x, steps, sums)`: add the squares of so many blocks of numbers to BLOCK sums, which stay in registers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start, count, totals = arguments
        place = builder.bitcast(totals, ir.VectorType(FLOAT, BLOCK).as_pointer())
        total = cgutils.alloca_once_value(builder, builder.load(place, align=4))
        stored = ir.VectorType(start.type.pointee, BLOCK)
        with cgutils.for_range(builder, count) as loop:
            at = builder.gep(start, [builder.mul(loop.index, ir.Constant(INT64, BLOCK))])
            raw = builder.load(builder.bitcast(at, stored.as_pointer()), align=context.get_abi_sizeof(stored.element))
            numbers = widened(builder, raw, x.dtype)
            builder.store(builder.fadd(builder.load(total), builder.fmul(numbers, numbers)), total)
        builder.store(builder.load(total), place, align=4)
        return context.get_dummy_value()

    return types.void(x, types.int64, sums), generate


@njit
def _add(numbers: Any, sums: Any, size: int) -> None:
    for i in range(size):
        sums[i] += numbers[i]


@njit
def _weigh_rounded(x: Any, weight: Any, scale: Any, size: int, out: Any) -> None:
    for i in range(size):
        out[i] = narrow(widen(weight[i]) * widen(narrow(widen(x[i]) * scale, x[i])), x[i])


@njit
def _weigh(x: Any, weight: Any, scale: Any, size: int, out: Any) -> None:
    for i in range(size):
        out[i] = narrow(widen(weight[i]) * (widen(x[i]) * scale), x[i])


@njit
def _weigh_one_more(x: Any, weight: Any, scale: Any, size: int, out: Any) -> None:
    for i in range(size):
        out[i] = narrow((widen(x[i]) * scale) * (ONE + widen(weight[i])), x[i])


@njit
def _rotate_heads(heads: Any, token: int, cosine: Any, sine: Any, angles: int, out: Any) -> None:
    """Rotate all heads of a token: the number `half` before or behind is the other coordinate."""
    start, token_stride, head_stride = heads
    _, num_heads, dim = out.shape
    half = angles // 2
    for head in range(num_heads):
        low = pointer(start, token * token_stride + head * head_stride)
        new_low = pointer(out, (token * num_heads + head) * dim)
        high, new_high = moved(low, half), moved(new_low, half)
        for i in range(half):
            turned = widen(narrow(-widen(high[i]) * sine[i], high[i]))
            new_low[i] = narrow(widen(narrow(widen(low[i]) * cosine[i], low[i])) + turned, low[i])
        for i in range(half):
            turned = widen(narrow(widen(low[i]) * sine[half + i], low[i]))
            new_high[i] = narrow(widen(narrow(widen(high[i]) * cosine[half + i], high[i])) + turned, high[i])
        for i in range(angles, dim):
            new_low[i] = low[i]
