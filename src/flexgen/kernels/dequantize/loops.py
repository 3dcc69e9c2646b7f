"""What compiled decoders share: bytes and halves read by bare pointers, small integers made float32 in the width of a float32.

Functions that take vectors are written as such, so that no compiler has to find them: loops of 16 short steps are unrolled by LLVM
before it could make vectors of them, and are then ten times slower.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.extending import register_jitable

from flexgen.base.compiled import intrinsic
from flexgen.kernels.cpu.formats import FLOAT, HALF, INT16, INT32, narrowed, widen
from flexgen.kernels.cpu.rows import LANES
from flexgen.kernels.cpu.vectors import broadcast, permuted, transposed, vector_of

_INT8 = ir.IntType(8)


@functools.cache
def has_vectors() -> bool:
    """Return whether the processor looks numbers up in a vector (AVX2), and widens float16 (F16C)."""
    features = get_host_cpu_features()
    return bool(features.get("avx2") and features.get("f16c"))


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
def store_scaled(typing_context: Any, numbers: Any, scale: Any, out: Any) -> Any:
    """Compile `store_scaled(numbers, scale, out)`: LANES float32 numbers times a float32, to adjacent places of any format (pointers)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, factor, target = arguments
        vector = builder.load(builder.bitcast(source, vector_of(FLOAT).as_pointer()), align=4)
        stored = narrowed(builder, builder.fmul(vector, broadcast(builder, factor)), out.dtype)
        place = builder.bitcast(target, stored.type.as_pointer())
        builder.store(stored, place, align=context.get_abi_sizeof(target.type.pointee))
        return context.get_dummy_value()

    return types.void(numbers, types.float32, out), generate


@intrinsic
def sixteen(typing_context: Any, source: Any, shift: Any, mask: Any, less: Any, scale: Any, least: Any, target: Any) -> Any:
    """Compile `sixteen(source, shift, mask, less, scale, least, target)`: decode fields of 16 adjacent bytes.

    `target[i] = scale * (((source[i] >> shift) & mask) - less) - least`, in float32, rounded once; with `least` None nothing is subtracted.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source_pointer, shift_value, mask_value, less_value, scale_value, least_value, place = arguments
        fields = _fields(builder, source_pointer, shift_value, mask_value)
        integers = builder.sub(builder.zext(fields, vector_of(INT32)), broadcast(builder, builder.trunc(less_value, INT32)))
        _store_affine(builder, integers, scale_value, None if least == types.none else least_value, place, target.dtype)
        return context.get_dummy_value()

    return types.none(source, types.int64, types.int64, types.int64, types.float32, _offset(least), target), generate


@intrinsic
def sixteen_joined(
    typing_context: Any, low: Any, low_shift: Any, low_mask: Any, high: Any, high_shift: Any, high_mask: Any, less: Any,
    scale: Any, least: Any, target: Any,
) -> Any:  # fmt: skip
    """Compile `sixteen_joined(low, low_shift, low_mask, high, high_shift, high_mask, less, scale, least, target)`.

    As `sixteen`, of fields whose high bits stand in other bytes: `(low[i] >> low_shift) & low_mask`, and above these bits
    `(high[i] >> high_shift) & high_mask`.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *fields, less_value, scale_value, least_value, place = arguments
        lows, highs = _fields(builder, *fields[:3]), _fields(builder, *fields[3:])
        unit = builder.add(builder.trunc(fields[2], _INT8), ir.Constant(_INT8, 1))
        joined = builder.or_(lows, builder.mul(highs, broadcast(builder, unit)))
        integers = builder.sub(builder.zext(joined, vector_of(INT32)), broadcast(builder, builder.trunc(less_value, INT32)))
        _store_affine(builder, integers, scale_value, None if least == types.none else least_value, place, target.dtype)
        return context.get_dummy_value()

    integers = (types.int64, types.int64)
    return types.none(low, *integers, high, *integers, types.int64, types.float32, _offset(least), target), generate


@intrinsic
def sixteen_looked_up(typing_context: Any, source: Any, shift: Any, values: Any, scale: Any, target: Any) -> Any:
    """Compile `sixteen_looked_up(source, shift, values, scale, target)`: as `sixteen`, of one of 16 integers, int8, for each 4 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source_pointer, shift_value, values_pointer, scale_value, place = arguments
        codes = _fields(builder, source_pointer, shift_value, ir.Constant(INT32, 15))
        table = builder.load(builder.bitcast(values_pointer, codes.type.as_pointer()), align=1)
        integers = builder.sext(permuted(builder, table, codes), vector_of(INT32))
        _store_affine(builder, integers, scale_value, None, place, target.dtype)
        return context.get_dummy_value()

    return types.none(source, types.int64, values, types.float32, target), generate


def _offset(least: Any) -> Any:
    return least if isinstance(least, types.NoneType) else types.float32


def _fields(builder: Any, source: Any, shift: Any, mask: Any) -> Any:
    """Generate `(source[i] >> shift) & mask` of LANES bytes."""
    loaded = builder.load(builder.bitcast(source, vector_of(_INT8).as_pointer()), align=1)
    shifted = builder.lshr(loaded, broadcast(builder, builder.trunc(shift, _INT8)))
    return builder.and_(shifted, broadcast(builder, builder.trunc(mask, _INT8)))


def _store_affine(builder: Any, integers: Any, scale: Any, least: Any, place: Any, carrier: Any) -> None:
    """Generate the store of `scale * integers - least`, rounded once; with `least` None nothing is subtracted."""
    numbers = builder.fmul(builder.sitofp(integers, vector_of(FLOAT)), broadcast(builder, scale))
    if least is not None:
        numbers = builder.fsub(numbers, broadcast(builder, least))
    stored = narrowed(builder, numbers, carrier)
    builder.store(stored, builder.bitcast(place, stored.type.as_pointer()), align=2 if stored.type.element == INT16 else 4)


@intrinsic
def store_codes(typing_context: Any, codes: Any, zero: Any, scale: Any, target: Any) -> Any:
    """Compile `store_codes(codes, zero, scale, target)`: (code - zero) * scale of LANES bytes, to adjacent places of any format."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, zero_value, factor, place = arguments
        loaded = builder.load(builder.bitcast(source, vector_of(_INT8).as_pointer()), align=1)
        numbers = builder.sitofp(builder.zext(loaded, vector_of(INT32)), vector_of(FLOAT))
        stored = scaled(builder, numbers, zero_value, factor, target.dtype)
        builder.store(stored, builder.bitcast(place, stored.type.as_pointer()), align=context.get_abi_sizeof(place.type.pointee))
        return context.get_dummy_value()

    return types.void(codes, types.float32, types.float32, target), generate


def scaled(builder: Any, codes: Any, zero: Any, scale: Any, carrier: Any) -> Any:
    """Generate `(codes - zero) * scale` of a vector of float32, rounded once."""
    numbers = builder.fmul(builder.fsub(codes, broadcast(builder, zero)), broadcast(builder, scale))
    return narrowed(builder, numbers, carrier)


@intrinsic
def widen_e4m3(typing_context: Any, codes: Any, numbers: Any) -> Any:
    """Compile `widen_e4m3(codes, numbers)`: the values of 16 codes of E4M3 without infinities, as float32.

    The lower seven bits are those of a float16 of 2**-8 times the value.  So no float32 is subnormal, which some processors are slow with.
    Without `has_vectors` it must not be called, and is empty: LLVM would widen float16 by a function that is not there.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if not has_vectors():
            return context.get_dummy_value()
        source, target = arguments
        short, wide, floats = vector_of(INT16), vector_of(INT32), vector_of(FLOAT)
        code = builder.zext(builder.load(builder.bitcast(source, vector_of(_INT8).as_pointer()), align=1), short)
        magnitude = builder.and_(code, ir.Constant(short, [0x7F] * LANES))
        halves = builder.bitcast(builder.shl(magnitude, ir.Constant(short, [7] * LANES)), vector_of(HALF))
        values = builder.fmul(builder.fpext(halves, floats), ir.Constant(floats, [256.0] * LANES))
        is_nan = builder.icmp_unsigned("==", magnitude, ir.Constant(short, [0x7F] * LANES))
        bits = builder.select(is_nan, ir.Constant(wide, [0x7FC00000] * LANES), builder.bitcast(values, wide))
        sign = builder.and_(builder.shl(builder.zext(code, wide), ir.Constant(wide, [24] * LANES)), ir.Constant(wide, [1 << 31] * LANES))
        builder.store(builder.or_(bits, sign), builder.bitcast(target, wide.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(codes, numbers), generate


@intrinsic
def turn_sixteen(typing_context: Any, source: Any, stride: Any, target: Any, target_stride: Any) -> Any:
    """Compile `turn_sixteen(source, stride, target, target_stride)`: transpose LANES rows, `stride` apart, of LANES elements."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start, stride_value, place, target_stride_value = arguments
        kind = vector_of(start.type.pointee)
        size = context.get_abi_sizeof(start.type.pointee)

        def at(begin: Any, row: int, by: Any) -> Any:
            return builder.bitcast(builder.gep(begin, [builder.mul(by, ir.Constant(by.type, row))]), kind.as_pointer())

        rows = transposed(builder, [builder.load(at(start, row, stride_value), align=size) for row in range(LANES)])
        for row, vector in enumerate(rows):
            builder.store(vector, at(place, row, target_stride_value), align=size)
        return context.get_dummy_value()

    return types.void(source, types.int64, target, types.int64), generate
