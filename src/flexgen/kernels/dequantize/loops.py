"""What compiled decoders share: bytes and halves read by bare pointers, small integers made float32 in the width of a float32.

`sixteen` is written in vectors: loops of 16 short steps are unrolled by LLVM before it could make vectors of them, and are then ten times
slower.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import register_jitable

from flexgen.base.compiled import intrinsic
from flexgen.kernels.cpu.formats import BFLOAT16, FLOAT16, widen

INT8, INT16, INT32, HALF, FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.HalfType(), ir.FloatType()
LANES = 16


@intrinsic
def small(typing_context: Any, value: Any) -> Any:
    """Compile `small(value)`: an integer below 2**24 as float32.

    It goes through 32 bits: Numba computes in 64, in which vectors would hold half as many.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.sitofp(builder.trunc(arguments[0], INT32), FLOAT)

    return types.float32(types.int64), generate


@intrinsic
def bits_as_float(typing_context: Any, value: Any) -> Any:
    """Compile `bits_as_float(value)`: the float32 with these bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.trunc(arguments[0], INT32), FLOAT)

    return types.float32(types.int64), generate


@register_jitable
def half(source: Any, at: int) -> Any:
    """Return the little-endian float16 at byte `at` as float32."""
    return widen(np.int16(source[at] | (source[at + 1] << 8)))


@register_jitable
def byte(source: Any, at: int) -> Any:
    """Return the byte at `at` as an integer from -128 to 127."""
    return np.int8(source[at])


@intrinsic
def sixteen(typing_context: Any, source: Any, shift: Any, mask: Any, less: Any, scale: Any, least: Any, target: Any) -> Any:
    """Compile `sixteen(source, shift, mask, less, scale, least, target)`: decode fields of 16 adjacent bytes.

    `target[i] = scale * (((source[i] >> shift) & mask) - less) - least`, in float32, rounded once; with `least` None nothing is subtracted.
    """
    subtracts = not isinstance(least, types.NoneType)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source_pointer, shift_value, mask_value, less_value, scale_value, least_value, target_pointer = arguments
        loaded = builder.load(builder.bitcast(source_pointer, ir.VectorType(INT8, LANES).as_pointer()), align=1)
        fields = builder.and_(
            builder.lshr(loaded, _splat(builder, builder.trunc(shift_value, INT8))), _splat(builder, builder.trunc(mask_value, INT8))
        )
        integers = builder.sub(builder.zext(fields, ir.VectorType(INT32, LANES)), _splat(builder, builder.trunc(less_value, INT32)))
        numbers = builder.fmul(builder.sitofp(integers, ir.VectorType(FLOAT, LANES)), _splat(builder, scale_value))
        if subtracts:
            numbers = builder.fsub(numbers, _splat(builder, least_value))
        stored = _narrowed(builder, numbers, target.dtype)
        builder.store(stored, builder.bitcast(target_pointer, stored.type.as_pointer()), align=2 if stored.type.element == INT16 else 4)
        return context.get_dummy_value()

    offset = types.float32 if subtracts else least
    return types.none(source, types.int64, types.int64, types.int64, types.float32, offset, target), generate


def _splat(builder: Any, value: Any) -> Any:
    """Generate a vector of 16 equal elements."""
    kind = ir.VectorType(value.type, LANES)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(INT32, 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(INT32, LANES), [0] * LANES))


def _narrowed(builder: Any, numbers: Any, carrier: Any) -> Any:
    """Generate the float32 vector in the format that a carrier stands for (kernels/cpu/formats.py), rounded to nearest even."""
    if carrier == FLOAT16:
        return builder.bitcast(builder.fptrunc(numbers, ir.VectorType(HALF, LANES)), ir.VectorType(INT16, LANES))
    if carrier != BFLOAT16:
        return numbers
    wide = ir.VectorType(INT32, LANES)

    def constant(value: int) -> Any:
        return ir.Constant(wide, [value] * LANES)

    bits = builder.bitcast(numbers, wide)
    bias = builder.add(builder.and_(builder.lshr(bits, constant(16)), constant(1)), constant(0x7FFF))
    rounded = builder.lshr(builder.add(bits, bias), constant(16))
    is_nan = builder.fcmp_unordered("uno", numbers, numbers)
    return builder.trunc(builder.select(is_nan, constant(0x7FC0), rounded), ir.VectorType(INT16, LANES))
