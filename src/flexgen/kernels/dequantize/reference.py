"""Decoding in plain torch, on any device: what devices without kernels of their own compute, and what kernels are compared with.

Everything is computed in float32 and rounded once.  Temporary tensors are bounded, because numbers are decoded in portions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexgen.kernels.dequantize.blocks import Codes, NestedScales, Scales, as_matrices, in_rows
from flexgen.kernels.dequantize.gguf_torch import decode_blocks
from flexgen.kernels.dequantize.groups import Groups, Packing, unpack_awq
from flexgen.kernels.dequantize.portions import portions


class DequantizeKernels:
    """The kernels that decode stored numbers on a device.  All tensors are there, shapes go together, and `out` is contiguous."""

    def look_up(self, codes: Codes, scales: Scales, out: Tensor) -> None:
        """Decode matrices (matrices, rows, columns) of codes with scales of as many dimensions: value * scale."""
        for index in range(len(out)):
            given, numbers, matrix = scales.of_matrix(index), codes.numbers[index], out[index]
            for start, stop in portions(*matrix.shape):
                values = codes.looked_up(numbers[start:stop])
                matrix[start:stop].copy_(_times_scales(values, given.of_rows(start, stop), scales.block_columns))

    def flat(self, codes: Codes, scales: Tensor | NestedScales, size: int, out: Tensor) -> None:
        """Decode numbers whose blocks, of `size` numbers, run over the flattened matrix."""
        for matrix in in_rows(codes, scales, size, out):
            self.look_up(*as_matrices(*matrix))

    def rows(self, packed: Tensor, packing: Packing, groups: Groups, out: Tensor) -> None:
        """Decode rows (rows, columns) of integer codes along the columns: (code - zero) * scale."""
        given, (rows, columns) = groups.in_floats(), out.shape
        for start, stop in portions(rows, columns):
            out[start:stop].copy_(given.scaled(packing.unpacked(packed[start:stop], columns), start))

    def gptq(self, words: Tensor, bits: int, groups: Groups, out: Tensor) -> None:
        """Decode a matrix (outputs, inputs) of words (words of an output, outputs) whose codes are packed along the inputs."""
        given, packing, (outputs, columns) = groups.in_floats(), Packing(bits=bits), out.shape
        for start, stop in portions(outputs, columns):
            out[start:stop].copy_(given.scaled(packing.unpacked(words[:, start:stop].t(), columns), start))

    def awq(self, words: Tensor, groups: Groups, out: Tensor) -> None:
        """Decode a matrix (outputs, inputs) of words (inputs, outputs / 8) with 4-bit codes in AWQ's order."""
        given, (outputs, columns) = groups.in_floats(), out.shape
        for start, stop in portions(outputs // 8, 8 * columns):
            out[8 * start : 8 * stop].copy_(given.scaled(unpack_awq(words[:, start:stop]).t(), 8 * start))

    def gguf_blocks(self, name: str, raw: Tensor, out: Tensor) -> None:
        """Decode blocks of one of GGUF's types.

        Raises:
            EngineError: There is no such type.
        """
        decode_blocks(name, raw, out)

    def ranges(self, codes: Tensor, ranges: Tensor, size: int, start: int, out: Tensor) -> None:
        """Decode rows of 4-bit codes, of which `size` rows of a column share a range: code / scale + least.

        Args:
            codes: The codes, uint8 (pairs of rows, columns), the first of two rows in the high half of the byte.
            ranges: Scales and least numbers, float16 (groups of rows, 2, columns).
            size: The rows of a group, an even number.
            start: The number of the first row, whose pair and group are the first ones.
            out: The numbers, (rows, columns); they are written.
        """
        row = 0
        while row < len(out):
            group = (start + row) // size
            stop = min(len(out), (group + 1) * size - start)
            scale, least = ranges[group - start // size].float()
            out[row:stop] = _codes_of_rows(codes, start, row, stop) / scale + least
            row = stop


def _times_scales(values: Tensor, scales: Tensor, block_columns: int) -> Tensor:
    """Return float32 numbers, (rows, columns), times the scales of their blocks, (rows, columns of blocks)."""
    rows, columns = values.shape
    if columns == scales.shape[1] * block_columns:
        return (values.view(rows, -1, block_columns) * scales[:, :, None]).view(rows, columns)
    return values * scales[:, :, None].expand(-1, -1, block_columns).reshape(rows, -1)[:, :columns]


def _codes_of_rows(codes: Tensor, start: int, first: int, stop: int) -> Tensor:
    """Return the codes of rows [first, stop) after row `start` of the matrix, float32; `codes` begin with the pair of row `start`."""
    skipped = start % 2  # the first byte of a range of rows may also hold the row before it
    pairs = codes[(first + skipped) // 2 : (stop + skipped + 1) // 2]
    both = torch.stack((pairs >> 4, pairs & 15), dim=1).view(-1, codes.shape[1])
    return both[(first + skipped) % 2 :][: stop - first].float()
