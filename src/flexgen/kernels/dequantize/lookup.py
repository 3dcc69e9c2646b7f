"""Decoding by tables: codes of 4 or 8 bits, whose values are multiplied by the scale of their block.

On a CPU compiled kernels run; on every other device the kernels that are chosen for it do (choice.py).  Everything is computed in float32
and rounded once, to nearest with ties to even, into the dtype of the result.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flexgen.base.parallel import Parallel
from flexgen.kernels.cpu.formats import carried
from flexgen.kernels.dequantize import compiled, tables
from flexgen.kernels.dequantize.blocks import Codes, NestedScales, Scales, as_matrices, in_rows
from flexgen.kernels.dequantize.choice import dequantize_kernels
from flexgen.kernels.dequantize.halves import has_wide_vectors
from flexgen.kernels.dequantize.loops import has_vectors

_WIDE = 32  # codes that are looked up at once where numbers have 16 bits


def decode(codes: Codes, scales: Scales, out: Tensor, parallel: Parallel) -> None:
    """Decode a matrix, or some of its rows, or several matrices.

    Args:
        codes: The codes, (..., rows, codes of a row).
        scales: The scales of all blocks that the rows touch, of as many dimensions.
        out: The numbers, (rows, columns) or (matrices, rows, columns), contiguous, bfloat16, float16 or float32; they are written.
        parallel: Runs the loop over rows on a CPU.

    Raises:
        EngineError: Shapes do not go together.
    """
    codes, scales, out = as_matrices(codes, scales, out)
    if out.device.type != "cpu":
        dequantize_kernels(out.device).look_up(codes, scales, out)
        return
    for index in range(len(out)):
        _decode_matrix(codes, scales, index, out[index], parallel)


def decode_flat(codes: Codes, scales: Tensor | NestedScales, size: int, out: Tensor, parallel: Parallel) -> None:
    """Decode numbers whose blocks run over the flattened matrix.

    Args:
        codes: The codes of 4 bits, whose numbers are (bytes,).
        scales: The scales of blocks, (blocks,).
        size: The numbers of a block, an even number; the last block may be shorter, and half of the last byte be unused.
        out: The numbers, (numbers,), contiguous; they are written.
        parallel: Runs the loop over rows of blocks on a CPU.
    """
    if out.device.type != "cpu":
        dequantize_kernels(out.device).flat(codes, scales, size, out)
        return
    for matrix in in_rows(codes, scales, size, out):
        decode(*matrix, parallel)


def in_vectors(codes: Codes) -> bool:
    """Return whether the compiled kernel looks the codes up in vectors: those of 4 bits and of E4M3, if the processor can."""
    if not has_vectors():
        return False
    if codes.per_byte == 2:
        return True
    e4m3 = tables.on_device(tables.e4m3(), codes.values.device)
    return codes.values is e4m3 or torch.equal(codes.values.view(torch.int32), e4m3.view(torch.int32))


def _decode_matrix(codes: Codes, scales: Scales, index: int, out: Tensor, parallel: Parallel) -> None:
    """Decode one of several matrices on a CPU."""
    rows, columns = out.shape
    given = scales.of_matrix(index)
    whole = scales.block_columns % _WIDE == 0 and columns % scales.block_columns == 0
    wide = codes.per_byte == 2 and out.itemsize == 2 and whole and has_wide_vectors()
    numbers = codes.numbers[index].contiguous().numpy()
    stored = numbers, 4 if codes.high_first else 0, codes.values.numpy(), in_vectors(codes), wide
    of_scales = np.empty(0, np.float32) if given.values is None else given.values.numpy()
    arrays = *stored, given.numbers.contiguous().numpy(), of_scales
    settings, written = (scales.block_rows, scales.block_columns, scales.skipped), carried(out)
    parallel(lambda begin, end: compiled.decode_rows(begin, end, *arrays, *settings, written), rows)
