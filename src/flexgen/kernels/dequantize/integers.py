"""Decoding of integer codes of 2 to 8 bits, of which groups share a scale and a zero point: (code - zero) * scale.

On a CPU compiled kernels run; on every other device torch operations do, which are also the reference of the kernels.  Everything is
computed in float32 and rounded once, to nearest with ties to even, into the dtype of the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexgen.base.parallel import Parallel
from flexgen.errors import EngineError
from flexgen.kernels.cpu.formats import carried
from flexgen.kernels.dequantize import codes as kernels
from flexgen.kernels.dequantize.portions import portions

WORD_BITS = 32
AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)  # the output, of 8, of each code of a word
AWQ_SHIFTS = tuple(4 * AWQ_OUTPUTS.index(output) for output in range(8))  # the bits of a word below the code of each output


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """The way in which the codes of a row lie in 32-bit words, low bits first.

    Attributes:
        bits: The bits of a code.
        padded: Whether a word holds whole codes only, so that some of its bits are not used; otherwise codes cross the borders of words.
        signed: Whether codes are signed bytes; decoding adds 128 to them.
    """

    bits: int
    padded: bool = False
    signed: bool = False

    @property
    def per_word(self) -> int:
        """The codes of a word, if it holds whole ones only."""
        return WORD_BITS // self.bits

    @property
    def whole(self) -> bool:
        """Whether no code crosses the border of a word."""
        return self.padded or WORD_BITS % self.bits == 0

    @property
    def shifts(self) -> tuple[int, ...]:
        """The bits below each code of a word, if it holds whole ones only."""
        return tuple(range(0, self.per_word * self.bits, self.bits))

    def words(self, count: int) -> int:
        """Return the number of words of so many codes."""
        return -(-count // self.per_word) if self.padded else -(-count * self.bits // WORD_BITS)

    def unpacked(self, words: Tensor, count: int) -> Tensor:
        """Return the codes of rows, integers (rows, count), by torch operations.

        Args:
            words: The words, int32 (rows, words of a row), or the codes themselves, int8 (rows, count).
            count: The codes of a row.
        """
        if self.signed:
            return words.to(torch.int32) + 128
        mask = (1 << self.bits) - 1
        if 8 % self.bits == 0:
            stored = words.reshape(-1).view(torch.uint8)
            return torch.stack([(stored >> shift) & mask for shift in range(0, 8, self.bits)], dim=-1).view(len(words), -1)[:, :count]
        wide = words.to(torch.int64) & 0xFFFFFFFF
        place = torch.arange(count, device=words.device)
        if self.padded:
            found = wide[:, place // self.per_word] >> (place % self.per_word * self.bits)
        else:
            word, shift = place * self.bits // WORD_BITS, place * self.bits % WORD_BITS
            following = wide[:, (word + 1).clamp(max=words.shape[1] - 1)]
            found = (wide[:, word] >> shift) | (following << (WORD_BITS - shift))
        return found & mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """What the codes of a matrix mean: the scale and the zero point of each group.

    Attributes:
        scales: The scales, float32 (rows of blocks, groups); any strides.
        zeros: The codes that stand for zero, float32 of the same shape; None if all are `zero`.
        zero: The code that stands for zero where there are no `zeros`.
        columns: The adjacent columns that share a scale; the last group may be smaller.
        order: The group of each column, int32 (columns,); None if groups are adjacent columns.
        block_rows: The rows that share a scale.
        skipped: The rows of the first block that come before the first row.
    """

    scales: Tensor
    zeros: Tensor | None = None
    zero: int = 0
    columns: int
    order: Tensor | None = None
    block_rows: int = 1
    skipped: int = 0

    def scaled(self, codes: Tensor, start: int) -> Tensor:
        """Return the numbers that codes of rows from `start` stand for, float32 (rows, columns), by torch operations."""
        rows, columns = codes.shape
        device = codes.device
        block = (torch.arange(start, start + rows, device=device) + self.skipped) // self.block_rows
        group = torch.arange(columns, device=device) // self.columns if self.order is None else self.order.to(torch.int64)
        numbers = codes.to(torch.float32)
        if self.zeros is None:
            numbers = numbers - self.zero
        else:
            numbers = numbers - self.zeros[block][:, group]
        return numbers * self.scales[block][:, group]

    def arrays(self, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return scales, zeros and order for the kernels.

        Raises:
            EngineError: A column belongs to a group that does not exist.
        """
        zeros = np.empty((0, 0), np.float32) if self.zeros is None else self.zeros.contiguous().numpy()
        order = np.empty(0, np.int32)
        if self.order is not None and not torch.equal(self.order, torch.arange(columns, dtype=torch.int32) // self.columns):
            low, high = (int(each) for each in self.order.aminmax())
            if low < 0 or high >= self.scales.shape[1]:
                raise EngineError(f"a matrix has {self.scales.shape[1]} groups of columns; g_idx names group {low if low < 0 else high}")
            order = self.order.contiguous().numpy()
        return self.scales.contiguous().numpy(), zeros, order


def zero_points(
    words: Tensor, packing: Packing, rows: int, parallel: Parallel, *, shifts: tuple[int, ...] = (), first: int = 0, lacks: int = 0
) -> Tensor:
    """Return the zero points of rows, float32 (rows, groups).

    Args:
        words: The words, int32 (words, groups): zero points of adjacent rows are in a word.
        packing: The way in which they lie in the words of a group.
        rows: The number of rows.
        parallel: Runs the loop over rows on a CPU.
        shifts: The bits of a word below each of its zero points; without any, those of the packing.
        first: The zero points of the words before that of the first row.
        lacks: What a stored zero point lacks; the sum is taken modulo 2**bits.
    """
    mask, shifts = (1 << packing.bits) - 1, shifts or packing.shifts
    if not packing.whole:
        return ((packing.unpacked(words.t(), first + rows)[:, first:] + lacks) & mask).t().to(torch.float32)
    if words.device.type != "cpu":
        place = torch.arange(first, first + rows, device=words.device)
        shift = torch.tensor(shifts, device=words.device)[place % len(shifts)]
        return (((words[place // len(shifts)] >> shift[:, None]) + lacks) & mask).to(torch.float32)
    zeros = torch.empty(rows, words.shape[1], dtype=torch.float32)
    stored, written, places = words.view(torch.uint32).numpy(), zeros.numpy(), np.array(shifts, np.int64)
    parallel(lambda begin, end: kernels.unpack_zeros(begin, end, stored, places, mask, lacks, first, written), rows)
    return zeros


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
    _check((packed.shape, groups.scales.shape[0]), ((rows, columns if packing.signed else packing.words(columns)), _blocks(groups, rows)))
    if out.device.type != "cpu":
        for start, stop in portions(rows, columns):
            out[start:stop].copy_(groups.scaled(packing.unpacked(packed[start:stop], columns), start))
        return
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
    packing = Packing(bits=bits)
    _check((words.shape, groups.scales.shape[0]), ((packing.words(columns), outputs), outputs))
    if out.device.type != "cpu":
        for start, stop in portions(outputs, columns):
            out[start:stop].copy_(groups.scaled(packing.unpacked(words[:, start:stop].t(), columns), start))
        return
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
        for start, stop in portions(outputs // 8, 8 * columns):
            out[8 * start : 8 * stop].copy_(groups.scaled(unpack_awq(words[:, start:stop]).t(), 8 * start))
        return
    scales, zeros, order = groups.arrays(columns)
    stored, written = _unsigned(words), carried(out)
    parallel(
        lambda begin, end: kernels.decode_awq(begin, end, stored, scales, zeros, groups.columns, order, written),
        -(-outputs // (8 * kernels.AWQ_WORDS)),
    )


def unpack_awq(words: Tensor) -> Tensor:
    """Return the codes of words in AWQ's order, int32 (rows, 8 * words of a row), by torch operations."""
    return torch.stack([(words >> shift) & 15 for shift in AWQ_SHIFTS], dim=-1).view(words.shape[0], -1)


def _unsigned(words: Tensor) -> np.ndarray:
    return words.contiguous().view(torch.uint32).numpy()


def _blocks(groups: Groups, rows: int) -> int:
    return -(-(groups.skipped + rows) // groups.block_rows)


def _check(found: tuple[Any, int], expected: tuple[Any, int]) -> None:
    if (tuple(found[0]), found[1]) != expected:
        raise EngineError(f"codes {tuple(found[0])} with {found[1]} rows of scales: expected {expected[0]} with {expected[1]}")
