"""Number formats as the kernels see them: NumPy arrays in, floating-point registers out.

NumPy knows no bfloat16 and Numba no float16, so 2-byte floats are carried as integers: bfloat16 as uint16, float16 as
int16.  They are widened to float32 as they are loaded and rounded to nearest, ties to even, as they are stored.  Integers of one byte
are codes, which are widened, too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types

from flexgen.base.compiled import intrinsic

INT16, INT32 = ir.IntType(16), ir.IntType(32)
HALF, FLOAT = ir.HalfType(), ir.FloatType()

CARRIERS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16, torch.float32: torch.float32, torch.float64: torch.float64}
INTEGERS = {2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
BFLOAT16, FLOAT16, CODE = types.uint16, types.int16, types.int8


def carried(tensor: torch.Tensor) -> np.ndarray:
    """Return a view of a contiguous tensor's memory, in a type that Numba knows."""
    return tensor.detach().view(CARRIERS[tensor.dtype]).numpy()


def bits(tensor: torch.Tensor) -> np.ndarray:
    """Return a view of a contiguous tensor's memory as integers."""
    return tensor.detach().view(INTEGERS[tensor.itemsize]).numpy()


def widened(builder: Any, raw: Any, carrier: types.Type) -> Any:
    """Generate code that makes a loaded scalar or vector a floating-point one."""
    if carrier == BFLOAT16:  # the upper half of a float32
        bits = builder.zext(raw, _like(raw.type, INT32))
        return builder.bitcast(builder.shl(bits, _constant(bits.type, 16)), _like(raw.type, FLOAT))
    if carrier == FLOAT16:
        return builder.fpext(builder.bitcast(raw, _like(raw.type, HALF)), _like(raw.type, FLOAT))
    if carrier == CODE:
        return builder.sitofp(raw, _like(raw.type, FLOAT))
    return raw


def narrowed(builder: Any, value: Any, carrier: types.Type) -> Any:
    """Generate code that rounds a floating-point scalar or vector to nearest, ties to even, into the format that a carrier stands for."""
    if carrier == FLOAT16:
        return builder.bitcast(builder.fptrunc(value, _like(value.type, HALF)), _like(value.type, INT16))
    if carrier != BFLOAT16:
        return value
    wide = _like(value.type, INT32)
    bits = builder.bitcast(value, wide)
    odd = builder.and_(builder.lshr(bits, _constant(wide, 16)), _constant(wide, 1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, _constant(wide, 0x7FFF))), _constant(wide, 16))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(is_nan, _constant(wide, 0x7FC0), rounded), _like(value.type, INT16))


def _like(kind: ir.Type, element: ir.Type) -> ir.Type:
    """Return a type for as many elements as `kind` has."""
    return ir.VectorType(element, kind.count) if isinstance(kind, ir.VectorType) else element


def _constant(kind: ir.Type, value: int) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


@intrinsic
def widen(typing_context: Any, stored: Any) -> Any:
    """Compile `widen(stored)`: an element as float32 (float64 stays), exactly."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return widened(builder, arguments[0], stored)

    return (stored if isinstance(stored, types.Float) else types.float32)(stored), generate


@intrinsic
def narrow(typing_context: Any, value: Any, like: Any) -> Any:
    """Compile `narrow(value, like)`: a float32 or float64 in the format of the element `like`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return narrowed(builder, arguments[0], like)

    return like(value, like), generate
