"""Decoding of integer codes of 2 to 8 bits, of which groups share a scale and a zero point: (code - zero) * scale.

On a CPU compiled kernels run; on every other device the kernels that are chosen for it do (choice.py).  Everything is computed in float32
and rounded once, to nearest with ties to even, into the dtype of the result.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexgen.base.parallel import Parallel
from flexgen.errors import EngineError
from flexgen.kernels.cpu.formats import carried
from flexgen.kernels.dequantize import codes as kernels
from flexgen.kernels.dequantize.choice import dequantize_kernels
from flexgen.kernels.dequantize.groups import Groups, Packing, ZeroPoints


def zero_points(zeros: ZeroPoints, parallel: Parallel) -> Tensor:
    """Return packed zero points as float32 (rows, groups), unpacked by a compiled loop where words hold whole ones."""
    words, shifts = zeros.words, zeros.shifts
    if not zeros.packing.whole:
        return zeros.unpacked()
    found = torch.empty(zeros.rows, words.shape[1], dtype=torch.float32)
    stored, written, places = words.view(torch.uint32).numpy(), found.numpy(), np.array(shifts, np.int64)
    settings = stored, places, zeros.mask, zeros.lacks, zeros.first
    parallel(lambda begin, end: kernels.unpack_zeros(begin, end, *settings, written), zeros.rows)
    return found


def decode_rows(packed: Tensor, packing: Packing, groups: Groups, out: Tensor, parallel: Parallel) -> None:
    """Decode rows whose codes lie along the columns.

    Args:
        packed: The words, int32 (rows, words of a row), or signed bytes, int8 (rows, columns).
        packing: The way in which codes lie in them.
        groups: The scales and zero points.
        out: The numbers, (rows, columns), contiguous, bfloat16, float16 or float32; they are written.
        parallel: Runs the loop over rows on a CPU.

    Raises:
        EngineError: Shapes do not go together.
    """
    rows, columns = out.shape
    expected = (rows, columns if packing.signed else packing.words(columns)), groups.num_blocks(rows)
    _check((packed.shape, groups.scales.shape[0]), expected)
    if out.device.type != "cpu":
        dequantize_kernels(out.device).rows(packed, packing, groups, out)
        return
    groups = _in_floats(groups, parallel)
    scales, zeros, order = groups.arrays(columns)
    stored, written = packed.contiguous().view(torch.uint8).numpy(), carried(out)
    per_word, flip = packing.per_word if packing.padded else 0, 128 if packing.signed else 0
    layout, meaning = (packing.bits, per_word, flip), (scales, zeros, np.float32(groups.zero))
    settings: tuple[Any, ...] = (groups.block_rows, groups.skipped, groups.columns, order)
    parallel(lambda begin, end: kernels.decode_packed(begin, end, stored, *layout, *meaning, *settings, written), rows)


def decode_gptq(words: Tensor, bits: int, groups: Groups, out: Tensor, parallel: Parallel) -> None:
    """Decode a matrix that is stored transposed, its codes packed along the inputs, as GPTQ stores it.

    Args:
        words: The words, int32 (words of an output, outputs).
        bits: The bits of a code.
        groups: The scales and zero points, with a row for each output.
        out: The numbers, (outputs, inputs), contiguous, bfloat16, float16 or float32; they are written.
        parallel: Runs the loop over blocks of outputs on a CPU.

    Raises:
        EngineError: Shapes do not go together.
    """
    outputs, columns = out.shape
    _check((words.shape, groups.scales.shape[0]), ((Packing(bits=bits).words(columns), outputs), outputs))
    if out.device.type != "cpu":
        dequantize_kernels(out.device).gptq(words, bits, groups, out)
        return
    groups = _in_floats(groups, parallel)
    scales, zeros, order = groups.arrays(columns)
    stored, written = _unsigned(words), carried(out)
    parallel(
        lambda begin, end: kernels.decode_gptq(begin, end, stored, bits, scales, zeros, groups.columns, order, written),
        -(-outputs // kernels.GPTQ_ROWS),
    )


def decode_awq(words: Tensor, groups: Groups, out: Tensor, parallel: Parallel) -> None:
    """Decode a matrix of 4-bit codes that is stored transposed, its codes packed along the outputs, as AWQ's gemm version stores it.

    Args:
        words: The words, int32 (inputs, outputs / 8).
        groups: The scales and zero points, with a row for each output.
        out: The numbers, (outputs, inputs), contiguous, bfloat16, float16 or float32; they are written.
        parallel: Runs the loop over blocks of outputs on a CPU.

    Raises:
        EngineError: Shapes do not go together.
    """
    outputs, columns = out.shape
    _check((words.shape, groups.scales.shape[0]), ((columns, outputs // 8), outputs))
    if out.device.type != "cpu":
        dequantize_kernels(out.device).awq(words, groups, out)
        return
    groups = _in_floats(groups, parallel)
    scales, zeros, order = groups.arrays(columns)
    stored, written = _unsigned(words), carried(out)
    parallel(
        lambda begin, end: kernels.decode_awq(begin, end, stored, scales, zeros, groups.columns, order, written),
        -(-outputs // (8 * kernels.AWQ_WORDS)),
    )


def _in_floats(groups: Groups, parallel: Parallel) -> Groups:
    return groups.in_floats(zero_points(groups.zeros, parallel) if isinstance(groups.zeros, ZeroPoints) else None)


def _unsigned(words: Tensor) -> np.ndarray:
    return words.contiguous().view(torch.uint32).numpy()


def _check(found: tuple[Any, int], expected: tuple[Any, int]) -> None:
    if (tuple(found[0]), found[1]) != expected:
        raise EngineError(f"codes {tuple(found[0])} with {found[1]} rows of scales: expected {expected[0]} with {expected[1]}")
