"""Integer codes as they are stored: how they lie in words, and the scales and zero points of their groups.

What they stand for is computed here by torch operations, on any device: (code - zero) * scale, in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from flexgen.errors import EngineError

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
class ZeroPoints:
    """Zero points as they are stored: those of adjacent rows are in a word.

    Attributes:
        words: The words, int32 (words, groups); any strides.
        packing: The way in which zero points lie in the words of a group.
        rows: The number of rows.
        first: The zero points of the words before that of the first row.
        lacks: What a stored zero point lacks; the sum is taken modulo 2**bits.
        interleaved: Whether they lie in a word in AWQ's order.
    """

    words: Tensor
    packing: Packing
    rows: int
    first: int = 0
    lacks: int = 0
    interleaved: bool = False

    @property
    def mask(self) -> int:
        """The bits of a zero point."""
        return (1 << self.packing.bits) - 1

    @property
    def shifts(self) -> tuple[int, ...]:
        """The bits of a word below each of its zero points, if it holds whole ones only."""
        return AWQ_SHIFTS if self.interleaved else self.packing.shifts

    def unpacked(self) -> Tensor:
        """Return the zero points, float32 (rows, groups), by torch operations."""
        if not self.packing.whole:
            codes = self.packing.unpacked(self.words.t(), self.first + self.rows)[:, self.first :]
            return ((codes + self.lacks) & self.mask).t().to(torch.float32)
        device, shifts = self.words.device, self.shifts
        place = torch.arange(self.first, self.first + self.rows, device=device)
        shift = torch.tensor(shifts, device=device)[place % len(shifts)]
        return (((self.words[place // len(shifts)] >> shift[:, None]) + self.lacks) & self.mask).to(torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """What the codes of a matrix mean: the scale and the zero point of each group.

    Attributes:
        scales: The scales, floating-point numbers (rows of blocks, groups); any strides.
        zeros: The codes that stand for zero, numbers of the same shape, to which `zero` is added, or packed; None if all are `zero`.
        zero: The code that stands for zero where there are no `zeros`.
        columns: The adjacent columns that share a scale; the last group may be smaller.
        order: The group of each column, int32 (columns,); None if groups are adjacent columns.
        block_rows: The rows that share a scale.
        skipped: The rows of the first block that come before the first row.
    """

    scales: Tensor
    zeros: Tensor | ZeroPoints | None = None
    zero: int = 0
    columns: int
    order: Tensor | None = None
    block_rows: int = 1
    skipped: int = 0

    def num_blocks(self, rows: int) -> int:
        """Return the rows of blocks that so many rows of a matrix touch."""
        return -(-(self.skipped + rows) // self.block_rows)

    def in_floats(self, zeros: Tensor | None = None) -> Groups:
        """Return the same groups with scales and zero points in float32.

        Args:
            zeros: Packed zero points, unpacked; None to unpack them by torch operations.
        """
        if zeros is None and self.zeros is not None:
            zeros = self.zeros.unpacked() if isinstance(self.zeros, ZeroPoints) else self.zeros.to(torch.float32) + self.zero
        return replace(self, scales=self.scales.to(torch.float32), zeros=zeros, zero=self.zero if zeros is None else 0)

    def scaled(self, codes: Tensor, start: int) -> Tensor:
        """Return the numbers that codes of rows from `start` stand for, float32 (rows, columns), by torch operations.

        Scales and zero points have to be in float32.
        """
        rows, columns = codes.shape
        device = codes.device
        block = (torch.arange(start, start + rows, device=device) + self.skipped) // self.block_rows
        group = torch.arange(columns, device=device) // self.columns if self.order is None else self.order.to(torch.int64)
        numbers = codes.to(torch.float32)
        if self.zeros is None:
            numbers = numbers - self.zero
        else:
            assert isinstance(self.zeros, Tensor)
            numbers = numbers - self.zeros[block][:, group]
        return numbers * self.scales[block][:, group]

    def arrays(self, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return scales, zeros and order, in float32, for the kernels of a CPU.

        Raises:
            EngineError: A column belongs to a group that does not exist.
        """
        zeros = np.empty((0, 0), np.float32)
        if self.zeros is not None:
            assert isinstance(self.zeros, Tensor)
            zeros = self.zeros.contiguous().numpy()
        order = np.empty(0, np.int32)
        if self.order is not None and not torch.equal(self.order, torch.arange(columns, dtype=torch.int32) // self.columns):
            low, high = (int(each) for each in self.order.aminmax())
            if low < 0 or high >= self.scales.shape[1]:
                raise EngineError(f"a matrix has {self.scales.shape[1]} groups of columns; g_idx names group {low if low < 0 else high}")
            order = self.order.contiguous().numpy()
        return self.scales.contiguous().numpy(), zeros, order


def unpack_awq(words: Tensor) -> Tensor:
    """Return the codes of words in AWQ's order, int32 (rows, 8 * words of a row), by torch operations."""
    return torch.stack([(words >> shift) & 15 for shift in AWQ_SHIFTS], dim=-1).view(words.shape[0], -1)
