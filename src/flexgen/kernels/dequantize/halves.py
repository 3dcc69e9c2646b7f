"""Codes of 4 bits, two in a byte, decoded 16 bytes at a time: split, looked up, or scaled with a zero point.

Where a processor looks 32 numbers of 16 bits up in a vector, the results of all 16 codes of a group are computed and looked up.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types

from flexgen.base.compiled import intrinsic
from flexgen.kernels.cpu.formats import FLOAT, INT16, INT32, narrowed
from flexgen.kernels.cpu.rows import LANES
from flexgen.kernels.cpu.vectors import broadcast, permuted, vector_of
from flexgen.kernels.dequantize.loops import scaled

_INT8 = ir.IntType(8)
_EIGHT = 8  # elements of a table of which vectors are looked up at once


@functools.cache
def has_wide_vectors() -> bool:
    """Return whether the processor looks 32 numbers of 16 bits up in a vector (AVX-512BW)."""
    return bool(get_host_cpu_features().get("avx512bw"))


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
            table = scaled(builder, ir.Constant(vector_of(FLOAT), [float(code) for code in range(LANES)]), zero, scale, target.dtype)
            _store_found(builder, table, source, ir.Constant(INT32, 0), place)
            return context.get_dummy_value()
        codes = _halves(builder, source)
        for first in (0, LANES):
            lanes = ir.Constant(vector_of(INT32), [*range(first, first + LANES)])
            integers = builder.zext(builder.shuffle_vector(codes, codes, lanes), vector_of(INT32))
            stored = scaled(builder, builder.sitofp(integers, vector_of(FLOAT)), zero, scale, target.dtype)
            to = builder.bitcast(builder.gep(place, [ir.Constant(INT32, first)]), stored.type.as_pointer())
            builder.store(stored, to, align=align)
        return context.get_dummy_value()

    return types.void(packed, types.float32, types.float32, target), generate


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
