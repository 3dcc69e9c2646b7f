"""The blocks of GGUF with 256 numbers ("K-quants"), decoded by compiled loops.

The layouts are those of ggml (ggml-common.h), the arithmetic is that of `gguf.quants`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numba.extending import register_jitable

from flexgen.base.compiled import entry
from flexgen.kernels.cpu.rows import moved, pointer
from flexgen.kernels.dequantize.loops import byte, half, sixteen, sixteen_joined, small


def _q2_k(raw: Any, out: Any, begin: int, end: int) -> None:
    for index in range(begin, end):
        source = pointer(raw, index * 84)
        all_scales, all_least = half(source, 80), half(source, 82)
        for group in range(16):  # 16 numbers with a scale; eight groups lie in 32 bytes
            numbers, shift = moved(source, 16 + group // 8 * 32 + group % 2 * 16), group % 8 // 2 * 2
            scale = all_scales * small(source[group] & 15)
            least = all_least * small(source[group] >> 4)
            sixteen(numbers, shift, 3, 0, scale, least, pointer(out, index * 256 + group * 16))


def _q3_k(raw: Any, out: Any, begin: int, end: int) -> None:
    for index in range(begin, end):
        source = pointer(raw, index * 110)
        all_scales = half(source, 108)
        for group in range(16):
            low = (source[96 + group % 8] >> (group // 8 * 4)) & 15
            high = (source[104 + group % 4] >> (group // 4 * 2)) & 3
            scale = all_scales * small((low | high << 4) - 32)
            numbers, shift = moved(source, 32 + group // 8 * 32 + group % 2 * 16), group % 8 // 2 * 2
            present, bit = moved(source, group % 2 * 16), group // 2  # where it is not set, 4 are subtracted
            sixteen_joined(numbers, shift, 3, present, bit, 1, 4, scale, None, pointer(out, index * 256 + group * 16))


@register_jitable
def _scale(source: Any, group: int) -> Any:
    """Return the 6-bit scale of one of eight groups, of which the first four begin at byte 4 and the others are spread."""
    return source[4 + group] & 63 if group < 4 else (source[8 + group] & 15) | ((source[group] >> 2) & 48)


@register_jitable
def _least(source: Any, group: int) -> Any:
    """Return the 6-bit offset of one of eight groups."""
    return source[8 + group] & 63 if group < 4 else (source[8 + group] >> 4) | ((source[4 + group] >> 2) & 48)


def _q4_k(raw: Any, out: Any, begin: int, end: int) -> None:
    for index in range(begin, end):
        source = pointer(raw, index * 144)
        all_scales, all_least = half(source, 0), half(source, 2)
        for group in range(8):
            numbers, shift = moved(source, 16 + group // 2 * 32), group % 2 * 4
            scale = all_scales * small(_scale(source, group))
            least = all_least * small(_least(source, group))
            target = pointer(out, index * 256 + group * 32)
            sixteen(numbers, shift, 15, 0, scale, least, target)
            sixteen(moved(numbers, 16), shift, 15, 0, scale, least, moved(target, 16))


def _q5_k(raw: Any, out: Any, begin: int, end: int) -> None:
    for index in range(begin, end):
        source = pointer(raw, index * 176)
        all_scales, all_least, high = half(source, 0), half(source, 2), moved(source, 16)
        for group in range(8):
            numbers, shift = moved(source, 48 + group // 2 * 32), group % 2 * 4
            scale = all_scales * small(_scale(source, group))
            least = all_least * small(_least(source, group))
            target = pointer(out, index * 256 + group * 32)
            sixteen_joined(numbers, shift, 15, high, group, 1, 0, scale, least, target)
            sixteen_joined(moved(numbers, 16), shift, 15, moved(high, 16), group, 1, 0, scale, least, moved(target, 16))


def _q6_k(raw: Any, out: Any, begin: int, end: int) -> None:
    for index in range(begin, end):
        source = pointer(raw, index * 210)
        all_scales = half(source, 208)
        for group in range(16):  # 16 numbers with a scale; four runs of 32 numbers share 64 bytes of low and 32 of high bits
            run, odd = group % 8 // 2, group % 2 * 16
            low, low_shift = moved(source, group // 8 * 64 + run % 2 * 32 + odd), run // 2 * 4
            high, high_shift = moved(source, 128 + group // 8 * 32 + odd), run * 2
            scale = all_scales * small(byte(source, 192 + group))
            sixteen_joined(low, low_shift, 15, high, high_shift, 3, 32, scale, None, pointer(out, index * 256 + group * 16))


K_KERNELS: Mapping[str, Any] = {
    "Q2_K": entry(_q2_k), "Q3_K": entry(_q3_k), "Q4_K": entry(_q4_k), "Q5_K": entry(_q5_k), "Q6_K": entry(_q6_k),
}  # fmt: skip
