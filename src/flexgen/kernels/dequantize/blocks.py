"""Codes of 4 or 8 bits, whose values are multiplied by the scale of their block, as both are stored.

What they stand for is computed here by torch operations, on any device, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexgen.errors import EngineError
from flexgen.kernels.dequantize import tables

# What codes of scales stand for; scales of another dtype are the numbers themselves.
SCALE_VALUES = {torch.uint8: tables.powers, torch.float8_e8m0fnu: tables.e8m0, torch.float8_e4m3fn: tables.e4m3}
_ROW_BLOCKS = 64  # blocks that are decoded as a row, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """Stored codes and what they stand for.

    Attributes:
        numbers: The codes, uint8 (..., codes of a row).
        values: The values of the codes, float32 (16,) if a byte holds two codes, otherwise (256,).
        high_first: Whether the first of two codes is in the high half of the byte.
    """

    numbers: Tensor
    values: Tensor
    high_first: bool = False

    @property
    def per_byte(self) -> int:
        return 2 if len(self.values) == 16 else 1

    def looked_up(self, numbers: Tensor) -> Tensor:
        """Return the values of codes, (rows, codes of a row), as float32 (rows, columns), by torch operations."""
        if self.per_byte == 2:
            halves = (numbers >> 4, numbers & 15) if self.high_first else (numbers & 15, numbers >> 4)
            numbers = torch.stack(halves, dim=-1)
        return self.values.index_select(0, numbers.reshape(-1).to(torch.int32)).view(numbers.shape[0], -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """The scales of blocks of a matrix, or of several, as they are stored.

    Attributes:
        numbers: The scales of all blocks, (..., rows of blocks, columns of blocks): floating-point numbers, E4M3, or E8M0 as such or in
            plain bytes.
        block_rows: The rows that share a scale.
        block_columns: The columns that share a scale; a row's last block may be shorter.
        skipped: The rows of the first block that come before the first row.
        factors: A number for each matrix, or one for all, by which scales are multiplied in float32; None if there is none.
        divided: Whether scales are divided by it instead.
    """

    numbers: Tensor
    block_rows: int = 1
    block_columns: int
    skipped: int = 0
    factors: Tensor | None = None
    divided: bool = False

    def of_matrix(self, index: int) -> MatrixScales:
        """Return the scales of one of several matrices, with those in codes as a table, by torch operations."""
        stored = self.numbers[index]
        values = SCALE_VALUES.get(stored.dtype)
        effective = stored.to(torch.float32) if values is None else tables.on_device(values(), stored.device)
        if self.factors is not None:
            factor = self.factors.reshape(-1)[index if self.factors.numel() > 1 else 0].to(torch.float32)
            effective = effective / factor if self.divided else effective * factor
        return MatrixScales(
            numbers=effective if values is None else stored.view(torch.uint8), values=None if values is None else effective,
            block_rows=self.block_rows, skipped=self.skipped,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixScales:
    """The scales of the blocks of one matrix.

    Attributes:
        numbers: The scales, (rows of blocks, columns of blocks): float32, or uint8 codes.
        values: The values of the codes, float32 (256,); None for scales in float32.
        block_rows: As in Scales.
        skipped: As in Scales.
    """

    numbers: Tensor
    values: Tensor | None
    block_rows: int
    skipped: int

    def of_rows(self, start: int, stop: int) -> Tensor:
        """Return the scales of rows [start, stop), float32 (rows, columns of blocks), by torch operations."""
        if self.block_rows == 1:
            numbers = self.numbers[start:stop]
        else:
            rows = torch.arange(start + self.skipped, stop + self.skipped, device=self.numbers.device) // self.block_rows
            numbers = self.numbers[rows]
        if self.values is None:
            return numbers
        return self.values.index_select(0, numbers.reshape(-1).to(torch.int32)).view(numbers.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class NestedScales:
    """The scales of blocks of flattened numbers, which are quantized in blocks themselves: value * scale + offset.

    Attributes:
        codes: The code of each scale, uint8 (blocks,).
        values: The values of the codes, float32 (256,).
        scales: The scales of the scales, floating-point numbers; those of all of a matrix.
        size: The scales that share a scale.
        first: The scales of the matrix that come before the first code.
        offset: The number that is added to each scale.
    """

    codes: Tensor
    values: Tensor
    scales: Tensor
    size: int
    first: int
    offset: float

    def in_floats(self) -> Tensor:
        """Return the scales in float32, by torch operations."""
        values = self.values.index_select(0, self.codes.to(torch.int32))
        of = torch.arange(self.first, self.first + len(self.codes), device=self.codes.device) // self.size
        return values * self.scales.to(torch.float32)[of] + self.offset


def as_matrices(codes: Codes, scales: Scales, out: Tensor) -> tuple[Codes, Scales, Tensor]:
    """Return codes, scales and numbers of several matrices, of one if they are those of a matrix.

    Raises:
        EngineError: Their shapes do not go together.
    """
    if out.ndim == 2:
        codes, scales, out = replace(codes, numbers=codes.numbers[None]), replace(scales, numbers=scales.numbers[None]), out[None]
    count, rows, columns = out.shape
    blocks = -(-(scales.skipped + rows) // scales.block_rows), -(-columns // scales.block_columns)
    fits = codes.numbers.shape == (count, rows, columns // codes.per_byte) and not columns % codes.per_byte
    if not fits or scales.numbers.shape != (count, *blocks):
        raise EngineError(f"codes {tuple(codes.numbers.shape)} and scales {tuple(scales.numbers.shape)} do not make {tuple(out.shape)}")
    return codes, scales, out


def in_rows(codes: Codes, scales: Tensor | NestedScales, size: int, out: Tensor) -> Iterator[tuple[Codes, Scales, Tensor]]:
    """Yield flattened numbers as matrices whose rows are blocks, to be decoded one after the other.

    Args:
        codes: The codes, whose numbers are (bytes,).
        scales: The scales of blocks, (blocks,).
        size: The numbers of a block, an even number; the last block may be shorter, and half of the last byte be unused.
        out: The numbers, (numbers,), contiguous.
    """
    scales = scales.in_floats() if isinstance(scales, NestedScales) else scales
    numbers, whole = codes.numbers, len(out) // size * size
    if whole:
        per_row = math.gcd(whole // size, _ROW_BLOCKS)
        grid = whole // size // per_row, per_row
        given = Scales(numbers=scales[: whole // size].view(grid), block_columns=size)
        yield replace(codes, numbers=numbers[: whole // 2].view(grid[0], -1)), given, out[:whole].view(grid[0], -1)
    if rest := len(out) - whole:
        last = torch.empty(1, 2 * (len(numbers) - whole // 2), dtype=out.dtype, device=out.device)
        given = Scales(numbers=scales[-1:].view(1, 1), block_columns=size)
        yield replace(codes, numbers=numbers[None, whole // 2 :]), given, last
        out[whole:].copy_(last[0, :rest])
