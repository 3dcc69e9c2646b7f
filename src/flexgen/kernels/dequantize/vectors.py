"""A vector of numbers times a scale, rounded once as it is stored.  It is written as LLVM code, so that no compiler has to find it."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from flexgen.base.compiled import intrinsic
from flexgen.kernels.cpu.formats import BFLOAT16, FLOAT, FLOAT16, HALF, INT16, INT32
from flexgen.kernels.cpu.rows import LANES


@intrinsic
def store_scaled(typing_context: Any, numbers: Any, scale: Any, out: Any) -> Any:
    """Compile `store_scaled(numbers, scale, out)`: LANES float32 numbers times a float32, to adjacent places of any format (pointers)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, factor, target = arguments
        vector = builder.load(builder.bitcast(source, _vector(FLOAT).as_pointer()), align=4)
        stored = _rounded(builder, builder.fmul(vector, _broadcast(builder, factor)), out.dtype)
        place = builder.bitcast(target, stored.type.as_pointer())
        builder.store(stored, place, align=context.get_abi_sizeof(target.type.pointee))
        return context.get_dummy_value()

    return types.void(numbers, types.float32, out), generate


def _rounded(builder: Any, value: Any, carrier: types.Type) -> Any:
    """Round a vector of float32 to nearest, ties to even, into the integers that carry the format (kernels/cpu/formats.py)."""
    if carrier == FLOAT16:
        return builder.bitcast(builder.fptrunc(value, _vector(HALF)), _vector(INT16))
    if carrier != BFLOAT16:
        return value
    bits = builder.bitcast(value, _vector(INT32))
    odd = builder.and_(builder.lshr(bits, _constant(16)), _constant(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, _constant(0x7FFF))), _constant(16))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(is_nan, _constant(0x7FC0), rounded), _vector(INT16))


def _vector(element: ir.Type) -> ir.VectorType:
    return ir.VectorType(element, LANES)


def _constant(value: int) -> ir.Constant:
    return ir.Constant(_vector(INT32), [value] * LANES)


def _broadcast(builder: Any, scalar: Any) -> Any:
    empty = ir.Constant(_vector(scalar.type), ir.Undefined)
    first = builder.insert_element(empty, scalar, ir.Constant(INT32, 0))
    return builder.shuffle_vector(first, empty, ir.Constant(_vector(INT32), [0] * LANES))
