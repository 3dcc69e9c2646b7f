"""Decoding by tables: codes of 4 or 8 bits, whose values are multiplied by the scale of their block.

On a CPU compiled kernels run; on every other device torch operations do, which are also the reference of the kernels.  Everything is
computed in float32 and rounded once, to nearest with ties to even, into the dtype of the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from flexgen.base.parallel import Parallel
from flexgen.errors import EngineError
from flexgen.kernels.cpu.formats import carried
from flexgen.kernels.dequantize import compiled, tables
from flexgen.kernels.dequantize.halves import has_wide_vectors
from flexgen.kernels.dequantize.loops import has_vectors
from flexgen.kernels.dequantize.portions import portions

_WIDE = 32  # codes that are looked up at once where numbers have 16 bits
_SCALE_VALUES = {torch.uint8: tables.powers, torch.float8_e8m0fnu: tables.e8m0, torch.float8_e4m3fn: tables.e4m3}


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

    def in_vectors(self) -> bool:
        """Return whether the compiled kernel looks the codes up in vectors: those of 4 bits and of E4M3, if the processor can."""
        if not has_vectors():
            return False
        if self.per_byte == 2:
            return True
        e4m3 = tables.on_device(tables.e4m3(), self.values.device)
        return self.values is e4m3 or torch.equal(self.values.view(torch.int32), e4m3.view(torch.int32))

    def looked_up(self, numbers: Tensor) -> Tensor:
        """Return the values of codes, (rows, codes of a row), as float32 (rows, columns), by torch operations."""
        if self.per_byte == 2:
            halves = (numbers >> 4, numbers & 15) if self.high_first else (numbers & 15, numbers >> 4)
            numbers = torch.stack(halves, dim=-1)
        return self.values.index_select(0, numbers.reshape(-1).to(torch.int32)).view(numbers.shape[0], -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """The scales of blocks of a matrix.

    Attributes:
        numbers: The scales of all blocks, (..., rows of blocks, columns of blocks): float32, or uint8 codes.
        values: The values of the codes, float32 (256,); None for scales in float32.
        block_rows: The rows that share a scale.
        block_columns: The columns that share a scale; a row's last block may be shorter.
        skipped: The rows of the first block that come before the first row.
    """

    numbers: Tensor
    values: Tensor | None
    block_rows: int = 1
    block_columns: int
    skipped: int = 0

    @classmethod
    def of(
        cls,
        stored: Tensor,
        shape: tuple[int, ...],
        *,
        block_rows: int = 1,
        block_columns: int,
        skipped: int = 0,
        factor: Tensor | None = None,
        divisor: Tensor | None = None,
    ) -> Self:
        """Return stored scales: floating-point numbers, E4M3, or E8M0 as such or in plain bytes.

        Args:
            stored: The scales, of any shape.
            shape: Their shape.
            block_rows: As in the attributes.
            block_columns: As in the attributes.
            skipped: As in the attributes.
            factor: A number of one element by which scales are multiplied, in float32.
            divisor: A number of one element by which scales are divided, in float32.
        """
        values = _SCALE_VALUES.get(stored.dtype)
        table = tables.on_device(values(), stored.device) if values is not None else None
        numbers = stored.view(torch.uint8) if table is not None else stored.to(torch.float32)
        effective = numbers if table is None else table
        if factor is not None:
            effective = effective * factor.to(torch.float32).reshape(())
        if divisor is not None:
            effective = effective / divisor.to(torch.float32).reshape(())
        if table is None:
            numbers = effective
        return cls(
            numbers=numbers.reshape(shape), values=None if table is None else effective,
            block_rows=block_rows, block_columns=block_columns, skipped=skipped,
        )  # fmt: skip

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


def decode(codes: Codes, scales: Scales, out: Tensor, parallel: Parallel) -> None:
    """Decode a matrix, or some of its rows.

    Args:
        codes: The codes, (rows, codes of a row).
        scales: The scales of all blocks that the rows touch, of two dimensions.
        out: The numbers, (rows, columns), contiguous, bfloat16, float16 or float32; they are written.
        parallel: Runs the loop over rows on a CPU.

    Raises:
        EngineError: Shapes do not go together.
    """
    rows, columns = out.shape
    blocks = -(-(scales.skipped + rows) // scales.block_rows), -(-columns // scales.block_columns)
    if codes.numbers.shape != (rows, columns // codes.per_byte) or columns % codes.per_byte or scales.numbers.shape != blocks:
        raise EngineError(f"codes {tuple(codes.numbers.shape)} and scales {tuple(scales.numbers.shape)} do not make {tuple(out.shape)}")
    if out.device.type != "cpu":
        for start, stop in portions(rows, columns):
            values = codes.looked_up(codes.numbers[start:stop])
            out[start:stop].copy_(_scaled(values, scales.of_rows(start, stop), scales.block_columns))
        return
    whole = scales.block_columns % _WIDE == 0 and columns % scales.block_columns == 0
    wide = codes.per_byte == 2 and out.itemsize == 2 and whole and has_wide_vectors()
    stored = codes.numbers.contiguous().numpy(), 4 if codes.high_first else 0, codes.values.numpy(), codes.in_vectors(), wide
    arrays = *stored, scales.numbers.contiguous().numpy(), _values(scales)
    settings, written = (scales.block_rows, scales.block_columns, scales.skipped), carried(out)
    parallel(lambda begin, end: compiled.decode_rows(begin, end, *arrays, *settings, written), rows)


def _values(scales: Scales) -> np.ndarray:
    return scales.values.numpy() if scales.values is not None else np.empty(0, np.float32)


def _scaled(values: Tensor, scales: Tensor, block_columns: int) -> Tensor:
    """Return float32 numbers, (rows, columns), times the scales of their blocks, (rows, columns of blocks)."""
    rows, columns = values.shape
    if columns == scales.shape[1] * block_columns:
        return (values.view(rows, -1, block_columns) * scales[:, :, None]).view(rows, columns)
    return values * scales[:, :, None].expand(-1, -1, block_columns).reshape(rows, -1)[:, :columns]
