"""Matrices of integer codes with scales and zero points for blocks of numbers: what several formats have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexgen.base.parallel import Parallel, serially
from flexgen.formats.base import Encoding, NumberFormat

if TYPE_CHECKING:
    import torch

    from flexgen.kernels.dequantize.groups import Packing, ZeroPoints
    from flexgen.kernels.encoded import MatrixCodes


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The blocks of a matrix that share a scale.

    Attributes:
        rows: The rows of a block; None if all rows share a scale.
        columns: The columns of a block.
    """

    rows: int | None
    columns: int

    def skipped(self, start: int) -> int:
        """Return the rows of the first block that come before row `start`."""
        return 0 if self.rows is None else start % self.rows

    def shape(self, start: int, rows: int, columns: int) -> tuple[int, int]:
        """Return the shape of the scales of `rows` rows from `start`."""
        return 1 if self.rows is None else -(-(start % self.rows + rows) // self.rows), -(-columns // self.columns)


class StoredMatrix(NumberFormat):
    """A layout of a matrix; stored bytes cross the link to a device."""

    name = "matrix"
    runs = True
    carried_as_stored = True


@dataclass(frozen=True, kw_only=True)
class IntegerRows(StoredMatrix):
    """Integer codes along the rows.  Parts: codes, scales, zero points if there are any, the group of each column if it is stored.

    Attributes:
        packing: The way in which codes lie in words.
        blocks: The blocks that share a scale.
        zero_packing: The way in which zero points are packed along the rows of the matrix; None if they are not packed.
        with_zeros: Whether zero points are stored, as signed numbers; otherwise the middle code stands for zero.
        with_order: Whether the group of each column is stored.
    """

    packing: Packing
    blocks: Blocks
    zero_packing: Packing | None = None
    with_zeros: bool = False
    with_order: bool = False

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"int{self.packing.bits}"

    def matrix_codes(self, encoding: Encoding) -> MatrixCodes | None:
        import torch

        from flexgen.kernels.dequantize.groups import Packing
        from flexgen.kernels.encoded import MatrixCodes

        packing, zeros = Packing(bits=4), self.zero_packing
        if self.packing != packing or self.with_order or self.blocks.rows != 1 or zeros not in (None, packing):
            return None
        rows, columns = encoding.shape
        groups = rows, -(-columns // self.blocks.columns)
        parts = [(torch.uint8, (rows, 4 * packing.words(columns))), (encoding.parts[1].tensor.dtype, groups)]
        if zeros is not None:
            parts.append((torch.int32, (packing.words(rows), groups[1])))
        elif self.with_zeros:
            parts.append((encoding.parts[2].tensor.dtype, groups))
        return MatrixCodes(parts=tuple(parts), group=self.blocks.columns, zero=8)

    def decode(self, parts: Sequence[torch.Tensor], start: int, out: torch.Tensor, parallel: Parallel = serially) -> None:
        import torch

        from flexgen.kernels.dequantize.groups import Groups
        from flexgen.kernels.dequantize.integers import decode_rows

        rows, columns = out.shape
        shape, middle = self.blocks.shape(start, rows, columns), 1 << (self.packing.bits - 1)
        rest = list(parts[2:])
        zeros = self._zeros(rest.pop(0), start, shape) if self.with_zeros else None
        groups = Groups(
            scales=parts[1].view(shape), zeros=zeros, zero=middle, columns=self.blocks.columns,
            order=self._order(rest[0]) if self.with_order else None, block_rows=self.blocks.rows or start + rows,
            skipped=self.blocks.skipped(start),
        )  # fmt: skip
        codes = parts[0] if self.packing.signed else parts[0].view(torch.int32)
        decode_rows(codes.view(rows, -1), self.packing, groups, out, parallel)

    def _zeros(self, stored: torch.Tensor, start: int, shape: tuple[int, int]) -> torch.Tensor | ZeroPoints:
        """Return the codes that stand for zero, packed, or what they are above the middle code, of the shape of the scales."""
        import torch

        from flexgen.kernels.dequantize.groups import ZeroPoints

        if (packing := self.zero_packing) is None:
            return stored.view(shape)
        words = stored.view(torch.int32).view(-1, shape[1])  # (words along the rows, groups)
        first = start if (zero_rows := rows_of_zeros(packing)) is None else start % zero_rows
        return ZeroPoints(words=words, packing=packing, rows=shape[0], first=first)

    def _order(self, stored: torch.Tensor) -> torch.Tensor:
        """Return the group of each column: -1 stands for groups of adjacent columns."""
        import torch

        adjacent = torch.arange(len(stored), dtype=torch.int32, device=stored.device) // self.blocks.columns
        return torch.where(stored < 0, adjacent, stored.to(torch.int32))


def rows_of_zeros(packing: Packing) -> int | None:
    """Return the rows whose zero points are in one word; None if zero points cross the borders of words, so that all are read."""
    return packing.per_word if packing.whole else None
