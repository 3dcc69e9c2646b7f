"""What compiled decoders share: bytes and halves read by bare pointers, small integers made float32 in the width of a float32."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import register_jitable

from flexgen.base.compiled import intrinsic
from flexgen.kernels.cpu.formats import widen

INT32, FLOAT = ir.IntType(32), ir.FloatType()


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
