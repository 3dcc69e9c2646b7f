"""The blocks of GGUF with 32 numbers, decoded by compiled loops; those with 256 stand in gguf_k.py.  On a device its own kernels decode.

The layouts are those of ggml (ggml-common.h), the arithmetic is that of `gguf.quants`, in float32 and in the same order, rounded once to
the numbers that are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from flexgen.base.compiled import entry
from flexgen.base.parallel import Parallel
from flexgen.errors import EngineError
from flexgen.hub.gguf_file import BY_NAME
from flexgen.kernels.cpu.formats import carried, narrow
from flexgen.kernels.cpu.rows import moved, pointer
from flexgen.kernels.dequantize.choice import dequantize_kernels
from flexgen.kernels.dequantize.gguf_k import K_KERNELS
from flexgen.kernels.dequantize.loops import bits_as_float, byte, half, sixteen, sixteen_looked_up, small

_FEW = 1 << 15  # numbers for which other threads are not worth waking
_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)  # twice the E2M1 number of each code
_WRITTEN = (torch.float32, torch.bfloat16, torch.float16)


def decode_blocks(name: str, raw: torch.Tensor, out: torch.Tensor, parallel: Parallel) -> None:
    """Decode blocks of one type.

    Args:
        name: The type.
        raw: The blocks, uint8, contiguous.
        out: The numbers, contiguous, on the same device; they are written.
        parallel: Runs a function over ranges of blocks in host memory.

    Raises:
        EngineError: There is no such type.
    """
    if name not in KERNELS:
        raise EngineError(f"there are no blocks of type {name}; known are {', '.join(KERNELS)}")
    if out.device.type != "cpu":
        dequantize_kernels(out.device).gguf_blocks(name, raw, out)
        return
    if out.dtype not in _WRITTEN:
        exact = torch.empty(out.shape, dtype=torch.float32)
        decode_blocks(name, raw, exact, parallel)
        out.copy_(exact)
        return
    kernel, source, target = KERNELS[name], raw.view(-1).numpy(), carried(out.view(-1))
    num_blocks = raw.numel() // BY_NAME[name].block_bytes
    if out.numel() <= _FEW:
        kernel(source, target, 0, num_blocks)
    else:
        parallel(lambda begin, end: kernel(source, target, begin, end), num_blocks)


def _q4_0(raw: Any, out: Any, begin: int, end: int) -> None:
    for index in range(begin, end):
        source, target = pointer(raw, index * 18), pointer(out, index * 32)
        scale = half(source, 0)
        sixteen(moved(source, 2), 0, 15, 8, scale, None, target)
        sixteen(moved(source, 2), 4, 15, 8, scale, None, moved(target, 16))


def _q4_1(raw: Any, out: Any, begin: int, end: int) -> None:
    for index in range(begin, end):
        source, target = pointer(raw, index * 20), pointer(out, index * 32)
        scale, least = half(source, 0), -half(source, 2)
        sixteen(moved(source, 4), 0, 15, 0, scale, least, target)
        sixteen(moved(source, 4), 4, 15, 0, scale, least, moved(target, 16))


def _q5_0(raw: Any, out: Any, begin: int, end: int) -> None:
    like = out[0]
    for index in range(begin, end):
        source, target = pointer(raw, index * 22), pointer(out, index * 32)
        scale = half(source, 0)
        high = source[2] | (source[3] << 8) | (source[4] << 16) | (source[5] << 24)  # bit i belongs to number i
        for i in range(16):
            target[i] = narrow(scale * small(((source[6 + i] & 15) | ((high >> i) & 1) << 4) - 16), like)
        for i in range(16):
            target[16 + i] = narrow(scale * small(((source[6 + i] >> 4) | ((high >> (16 + i)) & 1) << 4) - 16), like)


def _q5_1(raw: Any, out: Any, begin: int, end: int) -> None:
    like = out[0]
    for index in range(begin, end):
        source, target = pointer(raw, index * 24), pointer(out, index * 32)
        scale, least = half(source, 0), half(source, 2)
        high = source[4] | (source[5] << 8) | (source[6] << 16) | (source[7] << 24)
        for i in range(16):
            target[i] = narrow(scale * small((source[8 + i] & 15) | ((high >> i) & 1) << 4) + least, like)
        for i in range(16):
            target[16 + i] = narrow(scale * small((source[8 + i] >> 4) | ((high >> (16 + i)) & 1) << 4) + least, like)


def _q8_0(raw: Any, out: Any, begin: int, end: int) -> None:
    like = out[0]
    for index in range(begin, end):
        source, target = pointer(raw, index * 34), pointer(out, index * 32)
        scale = half(source, 0)
        for i in range(32):
            target[i] = narrow(small(byte(source, 2 + i)) * scale, like)


def _mxfp4(raw: Any, out: Any, begin: int, end: int) -> None:
    doubled = pointer(_DOUBLED, 0)
    for index in range(begin, end):
        source, target = pointer(raw, index * 17), pointer(out, index * 32)
        exponent = source[0]
        scale = bits_as_float((0x00200000 << exponent) if exponent < 2 else ((exponent - 1) << 23))  # half of 2**(exponent - 127)
        sixteen_looked_up(moved(source, 1), 0, doubled, scale, target)
        sixteen_looked_up(moved(source, 1), 4, doubled, scale, moved(target, 16))


KERNELS: Mapping[str, Any] = {
    "Q4_0": entry(_q4_0), "Q4_1": entry(_q4_1), "Q5_0": entry(_q5_0), "Q5_1": entry(_q5_1), "Q8_0": entry(_q8_0),
    "MXFP4": entry(_mxfp4), **K_KERNELS,
}  # fmt: skip
