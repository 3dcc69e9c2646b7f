"""What compiled decoders share: bytes and halves read by bare pointers, small integers made float32 in the width of a float32.

Functions that take vectors are written as such, so that no compiler has to find them: loops of 16 short steps are unrolled by LLVM
before it could make vectors of them, and are then ten times slower.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import register_jitable

from flexgen.base.compiled import intrinsic
from flexgen.kernels.cpu.formats import FLOAT, INT16, INT32, narrowed, widen
from flexgen.kernels.cpu.rows import LANES
from flexgen.kernels.cpu.vectors import broadcast, transposed, vector_of

_INT8 = ir.IntType(8)


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
    subtracts = not isinstance(least, types.NoneType)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source_pointer, shift_value, mask_value, less_value, scale_value, least_value, target_pointer = arguments
        loaded = builder.load(builder.bitcast(source_pointer, vector_of(_INT8).as_pointer()), align=1)
        fields = builder.and_(
            builder.lshr(loaded, broadcast(builder, builder.trunc(shift_value, _INT8))),
            broadcast(builder, builder.trunc(mask_value, _INT8)),
        )
        integers = builder.sub(builder.zext(fields, vector_of(INT32)), broadcast(builder, builder.trunc(less_value, INT32)))
        numbers = builder.fmul(builder.sitofp(integers, vector_of(FLOAT)), broadcast(builder, scale_value))
        if subtracts:
            numbers = builder.fsub(numbers, broadcast(builder, least_value))
        stored = narrowed(builder, numbers, target.dtype)
        builder.store(stored, builder.bitcast(target_pointer, stored.type.as_pointer()), align=2 if stored.type.element == INT16 else 4)
        return context.get_dummy_value()

    offset = types.float32 if subtracts else least
    return types.none(source, types.int64, types.int64, types.int64, types.float32, offset, target), generate


@intrinsic
def store_codes(typing_context: Any, codes: Any, zero: Any, scale: Any, target: Any) -> Any:
    """Compile `store_codes(codes, zero, scale, target)`: (code - zero) * scale of LANES bytes, to adjacent places of any format."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, zero_value, factor, place = arguments
        loaded = builder.load(builder.bitcast(source, vector_of(_INT8).as_pointer()), align=1)
        numbers = builder.sitofp(builder.zext(loaded, vector_of(INT32)), vector_of(FLOAT))
        numbers = builder.fmul(builder.fsub(numbers, broadcast(builder, zero_value)), broadcast(builder, factor))
        stored = narrowed(builder, numbers, target.dtype)
        builder.store(stored, builder.bitcast(place, stored.type.as_pointer()), align=context.get_abi_sizeof(place.type.pointee))
        return context.get_dummy_value()

    return types.void(codes, types.float32, types.float32, target), generate


@intrinsic
def split_halves(typing_context: Any, packed: Any, codes: Any) -> Any:
    """Compile `split_halves(packed, codes)`: the low and the high half of each of 16 bytes, as 32 bytes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bytes_of_16, words, bytes_of_32 = vector_of(_INT8), vector_of(INT16), ir.VectorType(_INT8, 2 * LANES)
        loaded = builder.zext(builder.load(builder.bitcast(arguments[0], bytes_of_16.as_pointer()), align=1), words)
        spread = builder.or_(loaded, builder.shl(loaded, ir.Constant(words, [4] * LANES)))
        halves = builder.and_(spread, ir.Constant(words, [0x0F0F] * LANES))
        builder.store(builder.bitcast(halves, bytes_of_32), builder.bitcast(arguments[1], bytes_of_32.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(packed, codes), generate


@intrinsic
def look_up_halves(typing_context: Any, packed: Any, shift: Any, magnitudes: Any, unit: Any, numbers: Any) -> Any:
    """Compile `look_up_halves(packed, shift, magnitudes, unit, numbers)`: the values of both halves of 16 bytes, as 32 float32 numbers.

    `magnitudes` are those of the codes 0 to 7, as 8 integers of 8 bits in multiples of `unit`; the highest bit of a code is the sign.
    `shift` is that of the half that comes first, 0 or 4.  A magnitude is chosen by one bit of its code after the other, in vectors of
    bytes: that takes no instruction that only some processors have.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, shift_value, table, unit_value, target = arguments
        loaded = builder.load(builder.bitcast(source, vector_of(_INT8).as_pointer()), align=1)
        first = broadcast(builder, builder.trunc(shift_value, _INT8))
        other = builder.sub(ir.Constant(first.type, [4] * LANES), first)
        halves = (builder.lshr(loaded, by) for by in (first, other))
        in_turn = ir.Constant(ir.VectorType(INT32, 2 * LANES), [i // 2 + (LANES if i % 2 else 0) for i in range(2 * LANES)])
        codes = builder.shuffle_vector(*halves, in_turn)
        chosen = _chosen(builder, codes, [builder.load(builder.gep(table, [ir.Constant(INT32, code)])) for code in range(8)])
        of_code, of_number = ir.Constant(vector_of(INT32), [8] * LANES), ir.Constant(vector_of(INT32), [28] * LANES)
        for part in range(2):
            places = ir.Constant(vector_of(INT32), [part * LANES + i for i in range(LANES)])
            wide, integers = (builder.zext(builder.shuffle_vector(each, each, places), vector_of(INT32)) for each in (codes, chosen))
            found = builder.fmul(builder.sitofp(integers, vector_of(FLOAT)), broadcast(builder, unit_value))
            sign = builder.shl(builder.and_(wide, of_code), of_number)
            signed = builder.or_(builder.bitcast(found, vector_of(INT32)), sign)
            place = builder.gep(builder.bitcast(target, INT32.as_pointer()), [ir.Constant(INT32, part * LANES)])
            builder.store(signed, builder.bitcast(place, signed.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(packed, types.int64, magnitudes, types.float32, numbers), generate


def _chosen(builder: Any, codes: Any, values: list[Any]) -> Any:
    """Generate the choice of each code among values, by as many of its lowest bits as tell these apart."""
    kind, bit = codes.type, 1
    start = ir.Constant(ir.VectorType(INT32, kind.count), [0] * kind.count)
    empty = ir.Constant(kind, ir.Undefined)
    choices = [builder.shuffle_vector(builder.insert_element(empty, value, ir.Constant(INT32, 0)), empty, start) for value in values]
    while len(choices) > 1:
        masked = builder.and_(codes, ir.Constant(kind, [bit] * kind.count))
        is_set = builder.icmp_unsigned("!=", masked, ir.Constant(kind, [0] * kind.count))
        choices = [builder.select(is_set, odd, even) for even, odd in zip(choices[::2], choices[1::2], strict=True)]
        bit *= 2
    return choices[0]


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
