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
_EIGHT = 8  # elements of a table of which vectors are looked up at once


@functools.cache
def has_vectors() -> bool:
    """Return whether the processor looks numbers up in a vector (AVX2), and widens float16 (F16C)."""
    features = get_host_cpu_features()
    return bool(features.get("avx2") and features.get("f16c"))


@functools.cache
def has_wide_vectors() -> bool:
    """Return whether the processor looks 32 numbers of 16 bits up in a vector (AVX-512BW)."""
    return bool(get_host_cpu_features().get("avx512bw"))


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
        stored = _scaled(builder, numbers, zero_value, factor, target.dtype)
        builder.store(stored, builder.bitcast(place, stored.type.as_pointer()), align=context.get_abi_sizeof(place.type.pointee))
        return context.get_dummy_value()

    return types.void(codes, types.float32, types.float32, target), generate


@intrinsic
def split_halves(typing_context: Any, packed: Any, codes: Any) -> Any:
    """Compile `split_halves(packed, codes)`: the low and the high half of each of 16 bytes, as 32 bytes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        halves = _halves(builder, arguments[0])
        builder.store(halves, builder.bitcast(arguments[1], halves.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(packed, codes), generate


@intrinsic
def store_halves(typing_context: Any, packed: Any, zero: Any, scale: Any, target: Any) -> Any:
    """Compile `store_halves(packed, zero, scale, target)`: (code - zero) * scale of the halves of 16 bytes, to 32 adjacent places.

    Where that is fast, the results of all 16 codes are computed, and looked up: compilers do so once for adjacent calls with one scale.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, zero, scale, place = arguments
        align = context.get_abi_sizeof(place.type.pointee)
        if place.type.pointee == INT16 and has_wide_vectors():
            table = _scaled(builder, ir.Constant(vector_of(FLOAT), [float(code) for code in range(LANES)]), zero, scale, target.dtype)
            _store_found(builder, table, source, ir.Constant(INT32, 0), place)
            return context.get_dummy_value()
        codes = _halves(builder, source)
        for first in (0, LANES):
            lanes = ir.Constant(vector_of(INT32), [*range(first, first + LANES)])
            integers = builder.zext(builder.shuffle_vector(codes, codes, lanes), vector_of(INT32))
            stored = _scaled(builder, builder.sitofp(integers, vector_of(FLOAT)), zero, scale, target.dtype)
            to = builder.bitcast(builder.gep(place, [ir.Constant(INT32, first)]), stored.type.as_pointer())
            builder.store(stored, to, align=align)
        return context.get_dummy_value()

    return types.void(packed, types.float32, types.float32, target), generate


def _scaled(builder: Any, codes: Any, zero: Any, scale: Any, carrier: Any) -> Any:
    """Generate `(codes - zero) * scale` of a vector of float32, rounded once."""
    numbers = builder.fmul(builder.fsub(codes, broadcast(builder, zero)), broadcast(builder, scale))
    return narrowed(builder, numbers, carrier)


@intrinsic
def store_values(typing_context: Any, packed: Any, shift: Any, values: Any, scale: Any, target: Any) -> Any:
    """Compile `store_values(packed, shift, values, scale, target)`: of 16 bytes the values of both halves, times the scale, to 32 places.

    `values` has the 16 float32 values, `shift` is that of the half that comes first, and a place has 16 bits; otherwise nothing is stored.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, first, table, factor, place = arguments
        if place.type.pointee == INT16 and has_wide_vectors():
            values = builder.load(builder.bitcast(table, vector_of(FLOAT).as_pointer()), align=4)
            numbers = narrowed(builder, builder.fmul(values, broadcast(builder, factor)), target.dtype)
            _store_found(builder, numbers, source, builder.trunc(first, INT32), place)
        return context.get_dummy_value()

    return types.void(packed, types.int64, values, types.float32, target), generate


def _store_found(builder: Any, table: Any, packed: Any, shift: Any, place: Any) -> None:
    """Generate the store of the elements of a table of 16, of 16 bits each, that the halves of 16 bytes are the places of."""
    wide = vector_of(INT32)
    loaded = builder.zext(builder.load(builder.bitcast(packed, vector_of(_INT8).as_pointer()), align=1), wide)
    mask = ir.Constant(wide, [15] * LANES)
    shifts = (shift, builder.sub(ir.Constant(INT32, 4), shift))
    first, second = (builder.and_(builder.lshr(loaded, broadcast(builder, each)), mask) for each in shifts)
    places = builder.or_(first, builder.shl(second, ir.Constant(wide, [16] * LANES)))
    twice = builder.shuffle_vector(table, table, ir.Constant(ir.VectorType(INT32, 2 * LANES), [*range(LANES)] * 2))
    found = permuted(builder, twice, builder.bitcast(places, ir.VectorType(INT16, 2 * LANES)))
    builder.store(found, builder.bitcast(place, found.type.as_pointer()), align=2)


def _halves(builder: Any, packed: Any) -> Any:
    """Generate the low and the high half of each of 16 bytes, as a vector of 32 bytes."""
    bytes_of_16, words, bytes_of_32 = vector_of(_INT8), vector_of(INT16), ir.VectorType(_INT8, 2 * LANES)
    loaded = builder.zext(builder.load(builder.bitcast(packed, bytes_of_16.as_pointer()), align=1), words)
    spread = builder.or_(loaded, builder.shl(loaded, ir.Constant(words, [4] * LANES)))
    return builder.bitcast(builder.and_(spread, ir.Constant(words, [0x0F0F] * LANES)), bytes_of_32)


@intrinsic
def look_up_halves(typing_context: Any, packed: Any, shift: Any, table: Any, numbers: Any) -> Any:
    """Compile `look_up_halves(packed, shift, table, numbers)`: the values of both halves of 16 bytes, as 32 float32 numbers.

    `table` has the 16 float32 values; `shift` is that of the half that comes first, 0 or 4.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, shift_value, values, target = arguments
        loaded = builder.load(builder.bitcast(source, vector_of(_INT8).as_pointer()), align=1)
        first = broadcast(builder, builder.trunc(shift_value, _INT8))
        other = builder.sub(ir.Constant(first.type, [4] * LANES), first)
        halves = (builder.lshr(loaded, by) for by in (first, other))
        in_turn = ir.Constant(ir.VectorType(INT32, 2 * LANES), [i // 2 + (LANES if i % 2 else 0) for i in range(2 * LANES)])
        codes = builder.shuffle_vector(*halves, in_turn)
        eight, integers = ir.VectorType(FLOAT, _EIGHT), ir.VectorType(INT32, _EIGHT)
        tables = [_vector_at(builder, values, eight, part * _EIGHT) for part in range(2)]
        for part in range(2 * LANES // _EIGHT):
            places = ir.Constant(integers, [part * _EIGHT + i for i in range(_EIGHT)])
            wide = builder.zext(builder.shuffle_vector(codes, codes, places), integers)
            place = builder.and_(wide, ir.Constant(integers, [_EIGHT - 1] * _EIGHT))
            low, high = (permuted(builder, each, place) for each in tables)
            upper = builder.and_(wide, ir.Constant(integers, [_EIGHT] * _EIGHT))
            is_upper = builder.icmp_unsigned("!=", upper, ir.Constant(integers, [0] * _EIGHT))
            to = builder.bitcast(builder.gep(target, [ir.Constant(INT32, part * _EIGHT)]), eight.as_pointer())
            builder.store(builder.select(is_upper, high, low), to, align=4)
        return context.get_dummy_value()

    return types.void(packed, types.int64, table, numbers), generate


def _vector_at(builder: Any, start: Any, kind: ir.VectorType, index: int) -> Any:
    """Generate the load of a vector of 4-byte elements that begins at element `index`."""
    return builder.load(builder.bitcast(builder.gep(start, [ir.Constant(INT32, index)]), kind.as_pointer()), align=4)


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
