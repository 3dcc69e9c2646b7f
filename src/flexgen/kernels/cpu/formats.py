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
    lanes = raw.type.count if isinstance(raw.type, ir.VectorType) else 0

    def shaped(element: ir.Type) -> ir.Type:
        return ir.VectorType(element, lanes) if lanes else element

    if carrier == BFLOAT16:  # the upper half of a float32
        bits = builder.zext(raw, shaped(INT32))
        return builder.bitcast(builder.shl(bits, ir.Constant(bits.type, [16] * lanes if lanes else 16)), shaped(FLOAT))
    if carrier == FLOAT16:
        return builder.fpext(builder.bitcast(raw, shaped(HALF)), shaped(FLOAT))
    if carrier == CODE:
        return builder.sitofp(raw, shaped(FLOAT))
    return raw


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
        if like == BFLOAT16:
            return _rounded_to_bfloat16(builder, arguments[0])
        if like == FLOAT16:
            return builder.bitcast(builder.fptrunc(arguments[0], HALF), INT16)
        return arguments[0]

    return like(value, like), generate


def _rounded_to_bfloat16(builder: Any, value: Any) -> Any:
    bits = builder.bitcast(value, INT32)
    upper = builder.lshr(bits, ir.Constant(INT32, 16))
    bias = builder.add(builder.and_(upper, ir.Constant(INT32, 1)), ir.Constant(INT32, 0x7FFF))
    rounded = builder.lshr(builder.add(bits, bias), ir.Constant(INT32, 16))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(is_nan, ir.Constant(INT32, 0x7FC0), rounded), INT16)
