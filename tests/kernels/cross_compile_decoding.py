"""Compiles the programs that decode stored numbers, as cross_compile.py does those of attention.

python tests/kernels/cross_compile_decoding.py CASE
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from cross_compile import META, main, numbers  # this script's folder is searched

from flexgen.hub.gguf_file import BY_NAME
from flexgen.kernels.dequantize import tables
from flexgen.kernels.dequantize.blocks import Codes, NestedScales, Scales
from flexgen.kernels.dequantize.groups import Groups, Packing, ZeroPoints
from flexgen.kernels.triton.dequantize import TritonDequantizeKernels


def stored(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


def table(values: tuple[float, ...]) -> torch.Tensor:
    return tables.on_device(values, META)


def look_up(
    values: tuple[float, ...], scale_dtype: torch.dtype, block: tuple[int, int], dtype: torch.dtype, shape: tuple[int, int, int], **how: Any
) -> Callable[[], None]:
    def call() -> None:
        (count, rows, columns), per_byte = shape, 2 if len(values) == 16 else 1
        codes = Codes(numbers=stored(count, rows, columns // per_byte), values=table(values))
        of_blocks = stored(count, -(-rows // block[0]), -(-columns // block[1]), dtype=scale_dtype)
        scales = Scales(numbers=of_blocks, block_rows=block[0], block_columns=block[1], **how)
        TritonDequantizeKernels().look_up(codes, scales, numbers(*shape, dtype=dtype))

    return call


def flat(dtype: torch.dtype, *, nested: bool) -> Callable[[], None]:
    def call() -> None:
        codes, count = Codes(numbers=stored(1 << 20), values=table(tuple(range(16))), high_first=True), 1 << 15
        scales: torch.Tensor | NestedScales = numbers(count, dtype=torch.float32)
        if nested:
            of_scales = numbers(count // 256, dtype=torch.float32)
            scales = NestedScales(codes=stored(count), values=table(tables.e4m3()), scales=of_scales, size=256, first=0, offset=0.1)
        TritonDequantizeKernels().flat(codes, scales, 64, numbers(1 << 21, dtype=dtype))

    return call


def points(packing: Packing, rows: int, groups: int, **how: Any) -> ZeroPoints:
    return ZeroPoints(words=stored(groups, packing.words(rows), dtype=torch.int32).t(), packing=packing, rows=rows, **how)


def rows(packing: Packing, dtype: torch.dtype, *, zeros: str = "none", group: int = 128, ordered: bool = False) -> Callable[[], None]:
    def call() -> None:
        count, columns = 4096, 4096
        word = torch.int8 if packing.signed else torch.int32
        packed = stored(count, columns if packing.signed else packing.words(columns), dtype=word)
        shape = count, -(-columns // group)
        given = {"none": None, "packed": points(packing, *shape), "bytes": stored(*shape, dtype=torch.int8)}[zeros]
        order = stored(columns, dtype=torch.int32) if ordered else None
        groups = Groups(scales=numbers(*shape, dtype=dtype), zeros=given, zero=8, columns=group, order=order)
        TritonDequantizeKernels().rows(packed, packing, groups, numbers(count, columns, dtype=dtype))

    return call


def gptq(bits: int, dtype: torch.dtype, *, ordered: bool = False) -> Callable[[], None]:
    def call() -> None:
        outputs, inputs, packing = 4096, 4096, Packing(bits=bits)
        order = stored(inputs, dtype=torch.int32) if ordered else None
        zeros = points(packing, outputs, inputs // 128, lacks=1)
        groups = Groups(scales=numbers(inputs // 128, outputs, dtype=torch.float16).t(), zeros=zeros, columns=128, order=order)
        words = stored(packing.words(inputs), outputs, dtype=torch.int32)
        TritonDequantizeKernels().gptq(words, bits, groups, numbers(outputs, inputs, dtype=dtype))

    return call


def awq(dtype: torch.dtype) -> Callable[[], None]:
    def call() -> None:
        outputs, inputs = 4096, 11008
        zeros = points(Packing(bits=4), outputs, inputs // 128, interleaved=True)
        groups = Groups(scales=numbers(inputs // 128, outputs, dtype=torch.float16).t(), zeros=zeros, zero=8, columns=128)
        words = stored(inputs, outputs // 8, dtype=torch.int32)
        TritonDequantizeKernels().awq(words, groups, numbers(outputs, inputs, dtype=dtype))

    return call


def blocks(name: str, dtype: torch.dtype) -> Callable[[], None]:
    def call() -> None:
        count = 1 << 12
        out = numbers(count, BY_NAME[name].block, dtype=dtype)
        TritonDequantizeKernels().gguf_blocks(name, stored(count * BY_NAME[name].block_bytes), out)

    return call


def ranges(dtype: torch.dtype) -> Callable[[], None]:
    def call() -> None:
        out = numbers(4096, 4096, dtype=dtype)
        TritonDequantizeKernels().ranges(stored(2048, 4096), numbers(64, 2, 4096, dtype=torch.float16), 64, 0, out)

    return call


BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
CASES: dict[str, Callable[[], None]] = {
    "mxfp4": look_up(tables.E2M1, torch.uint8, (1, 32), BFLOAT16, (1, 32 * 2880, 2880)),
    "nvfp4": look_up(tables.E2M1, torch.float8_e4m3fn, (1, 16), BFLOAT16, (8, 512, 2048), factors=numbers(8, dtype=FLOAT32)),
    "nvfp4-divided": look_up(
        tables.E2M1, torch.float8_e4m3fn, (1, 16), FLOAT16, (1, 512, 2048), factors=numbers(1, dtype=FLOAT32), divided=True
    ),
    "fp8-blocks": look_up(tables.e4m3(), FLOAT32, (128, 128), BFLOAT16, (1, 7168, 2048), skipped=5),
    "fp8-rows": look_up(tables.e4m3(), BFLOAT16, (1, 4096), FLOAT32, (1, 4096, 4096)),
    "mxfp8": look_up(tables.e4m3(), torch.float8_e8m0fnu, (1, 32), FLOAT16, (1, 4096, 4096)),
    "nf4": flat(BFLOAT16, nested=False),
    "nf4-nested": flat(BFLOAT16, nested=True),
    "int4": rows(Packing(bits=4), BFLOAT16),
    "int4-zeros": rows(Packing(bits=4), FLOAT16, zeros="packed", group=32),
    "int4-ordered": rows(Packing(bits=4), BFLOAT16, zeros="packed", ordered=True),
    "int3": rows(Packing(bits=3), BFLOAT16, zeros="packed"),
    "int8": rows(Packing(bits=8, signed=True), BFLOAT16, zeros="bytes", group=4096),
    "gptq": gptq(4, BFLOAT16),
    "gptq-ordered": gptq(8, FLOAT16, ordered=True),
    "gptq-3": gptq(3, FLOAT32),
    "awq": awq(BFLOAT16),
    "q4_0": blocks("Q4_0", BFLOAT16),
    "q4_1": blocks("Q4_1", BFLOAT16),
    "q5_0": blocks("Q5_0", BFLOAT16),
    "q5_1": blocks("Q5_1", FLOAT16),
    "q8_0": blocks("Q8_0", BFLOAT16),
    "mxfp4-blocks": blocks("MXFP4", BFLOAT16),
    "q2_k": blocks("Q2_K", BFLOAT16),
    "q3_k": blocks("Q3_K", FLOAT32),
    "q4_k": blocks("Q4_K", BFLOAT16),
    "q5_k": blocks("Q5_K", FLOAT16),
    "q6_k": blocks("Q6_K", BFLOAT16),
    "ranges": ranges(BFLOAT16),
}


if __name__ == "__main__":
    main(CASES, sys.argv[1])
