"""Compiled loops around products of int8 numbers: rounding rows to codes with a scale, and scaling the sums of products.

No sum is taken here, and each number is computed by itself, so that results do not depend on how rows and columns are divided.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from flexgen.base.compiled import entry, intrinsic
from flexgen.kernels.cpu.formats import FLOAT, INT32, narrowed, widen

_LEAST = np.float32(1e-30)  # a row without a larger number counts as zeros
_TOP, _ZERO = np.float32(127), np.float32(0)
_INT8 = ir.IntType(8)


@intrinsic
def _magnitude_bits(typing_context: Any, value: Any) -> Any:
    """Compile `_magnitude_bits(value)`: the bits of |value| as an integer; they are ordered as the numbers are, infinities and NaN last."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.and_(builder.bitcast(arguments[0], INT32), ir.Constant(INT32, 0x7FFFFFFF))

    return types.int32(types.float32), generate


@intrinsic
def _larger(typing_context: Any, one: Any, other: Any) -> Any:
    """Compile `_larger(one, other)`: the larger of two integers of 32 bits, which Numba would compare in 64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(builder.icmp_signed(">", *arguments), *arguments)

    return types.int32(types.int32, types.int32), generate


@intrinsic
def _float_of_bits(typing_context: Any, bits: Any) -> Any:
    """Compile `_float_of_bits(bits)`: the float32 with these bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], FLOAT)

    return types.float32(types.int32), generate


@intrinsic
def _nearest(typing_context: Any, value: Any) -> Any:
    """Compile `_nearest(value)`: the nearest integer, ties to even, of a float32 between -127 and 127."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rounded = builder.call(builder.module.declare_intrinsic("llvm.rint", [FLOAT]), arguments)
        return builder.trunc(builder.fptosi(rounded, INT32), _INT8)

    return types.int8(types.float32), generate


@intrinsic
def _as_float(typing_context: Any, value: Any) -> Any:
    """Compile `_as_float(value)`: an integer of 32 bits as the nearest float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.sitofp(arguments[0], FLOAT)

    return types.float32(types.int32), generate


@intrinsic
def _stored(typing_context: Any, value: Any, like: Any) -> Any:
    """Compile `_stored(value, like)`: a float32 in the format of the element `like`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if like == types.float64:
            return builder.fpext(arguments[0], ir.DoubleType())
        return narrowed(builder, arguments[0], like)

    return like(types.float32, like), generate


@entry
def round_rows(begin: int, end: int, numbers: Any, codes: Any, scales: Any) -> None:
    """Round rows begin <= row < end to codes from -127 to 127 with a scale each: number = code * scale.

    A row with an infinity or a NaN has that as its scale, so that no product with it is finite.

    Args:
        begin: The first row.
        end: The row after the last one.
        numbers: The rows, (rows, columns), in the form of kernels/cpu/formats.py; they are computed with in float32.
        codes: The codes, int8 (rows, columns); they are written.
        scales: The scales, float32 (rows,); they are written.
    """
    columns = numbers.shape[1]
    for row in range(begin, end):
        largest = np.int32(0)
        for column in range(columns):
            largest = _larger(largest, _magnitude_bits(np.float32(widen(numbers[row, column]))))
        most = _float_of_bits(largest)
        inverse = _ZERO if most < _LEAST else _TOP / most
        scales[row] = _ZERO if most < _LEAST else most / _TOP
        for column in range(columns):
            codes[row, column] = _nearest(np.float32(widen(numbers[row, column])) * inverse)


@entry
def scale_sums(begin: int, end: int, sums: Any, row_scales: Any, column_scales: Any, bias: Any, first: int, out: Any) -> None:
    """Make numbers of the sums of products of codes, rows begin <= row < end: sum * (scale of the row * scale of the column) + bias.

    Args:
        begin: The first row.
        end: The row after the last one.
        sums: The sums, int32 (rows, columns).
        row_scales: The scales of the rows, float32 (rows,).
        column_scales: The scales of the columns, float32 (columns,).
        bias: What is added to each column, float32 (columns,), or nothing, (0,).
        first: The column of `out` that the first column becomes.
        out: The numbers, (rows, columns or more), in the form of kernels/cpu/formats.py.
    """
    columns = sums.shape[1]
    for row in range(begin, end):
        scale = row_scales[row]
        if len(bias):
            for column in range(columns):
                value = _as_float(sums[row, column]) * (scale * column_scales[column]) + bias[column]
                out[row, first + column] = _stored(value, out[0, 0])
        else:
            for column in range(columns):
                value = _as_float(sums[row, column]) * (scale * column_scales[column])
                out[row, first + column] = _stored(value, out[0, 0])
