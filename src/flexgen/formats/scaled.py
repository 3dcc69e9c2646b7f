"""Matrices of codes with a scale for each block of numbers: what the formats of small floating-point numbers have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from flexgen.base.parallel import Parallel, serially
from flexgen.errors import CheckpointError
from flexgen.formats.base import RANDOM_DEVIATION, Encoding, EncodingPart, NamedTensor, NumberFormat, StoredTensor

if TYPE_CHECKING:
    import torch

    from flexgen.kernels.encoded import MatrixCodes


class ScaledMatrices(NumberFormat):
    """Codes of 4 or 8 bits, row by row, and a scale for each block of rows and columns.

    The parts of an encoding are the codes, the scales and, where there is one, a number by which all scales are multiplied or divided.

    Args:
        name: The name of the format; that of the matrices has their bits, too.
        block: The rows and columns that share a scale.
        bits: The bits of a code: 4 for E2M1 (the first of two codes in the low half of the byte), 8 for E4M3.
        divided: Whether scales are divided by the number that is stored beside them.
    """

    runs = True
    carried_as_stored = True

    def __init__(self, name: str, block: tuple[int, int], bits: int, *, divided: bool = False) -> None:
        self.name, self._block, self._bits, self._divided = f"{name}_fp{bits}", block, bits, divided

    def sample(self, stored: NamedTensor, generator: torch.Generator) -> torch.Tensor:
        return sample(stored, generator)

    def matrix_codes(self, encoding: Encoding) -> MatrixCodes | None:
        import torch

        from flexgen.kernels.encoded import MatrixCodes

        (rows, columns), (block_rows, group) = encoding.shape[-2:], self._block
        _, scales, *factors = encoding.parts
        if self._bits != 4 or block_rows != 1 or factors:
            return None
        parts = (torch.uint8, (rows, columns // 2)), (scales.tensor.dtype, (rows, -(-columns // group)))
        return MatrixCodes(parts=parts, group=group, zero=None)

    def decode(self, parts: Sequence[torch.Tensor], start: int, out: torch.Tensor, parallel: Parallel = serially) -> None:
        import torch

        from flexgen.kernels.dequantize import tables
        from flexgen.kernels.dequantize.blocks import Codes, Scales
        from flexgen.kernels.dequantize.lookup import decode

        values = tables.on_device(tables.E2M1 if self._bits == 4 else tables.e4m3(), out.device)
        *matrices, rows, columns = out.shape
        block_rows, block_columns = self._block
        skipped = 0 if matrices else start % block_rows
        grid = -(-(skipped + rows) // block_rows), -(-columns // block_columns)
        scales = Scales(
            numbers=parts[1].view(*matrices, *grid), block_rows=block_rows, block_columns=block_columns, skipped=skipped,
            factors=parts[2] if len(parts) > 2 else None, divided=self._divided,
        )  # fmt: skip
        codes = Codes(numbers=parts[0].view(torch.uint8).view(*matrices, rows, -1), values=values)
        decode(codes, scales, out, parallel)


def sample(stored: NamedTensor, generator: torch.Generator) -> torch.Tensor:
    """Return random numbers of a part, as `NumberFormat.sample` does."""
    import torch

    if stored.name.endswith("_scale_2"):
        return torch.ones(stored.shape, dtype=stored.dtype)
    if "scale" in stored.name:
        if stored.dtype == torch.uint8:
            return torch.full(stored.shape, 127 - 6, dtype=torch.uint8)  # 2 ** -6
        # Of NVFP4's random codes, which have a standard deviation of 2.9, or of E4M3's.
        scale = RANDOM_DEVIATION / 2.9 if stored.dtype == torch.float8_e4m3fn else RANDOM_DEVIATION
        return torch.full(stored.shape, scale).to(stored.dtype)
    if stored.dtype == torch.float8_e4m3fn:
        return torch.randn(stored.shape, generator=generator).to(stored.dtype)
    codes = torch.randint(256, stored.shape, dtype=torch.uint8, generator=generator)
    return codes if stored.dtype == torch.uint8 else (codes & 0xBB).view(stored.dtype)  # those up to 1.5


def scaled(
    name: str, codes: StoredTensor, scales: StoredTensor, stated: tuple[int, int] | None, *, bits: int, factor: StoredTensor | None = None,
    tensors: Mapping[str, StoredTensor], beside: Sequence[str] = (), divided: bool = False,
) -> Encoding:  # fmt: skip
    """Return the encoding of a matrix, or of several, whose block follows from the shapes of its codes and of its scales.

    Args:
        name: The name of the format.
        codes: The codes, (rows, columns) or (matrices, rows, columns); a byte holds two codes of 4 bits.
        scales: The scales: one, one for each row, or a grid of blocks.
        stated: The block that the config states, in which a matrix may end with a part of a block; None if it states none.
        bits: The bits of a code.
        factor: A number by which all scales are multiplied, or one for each matrix; None if there is none.
        tensors: All stored tensors.
        beside: The names of tensors that belong to it but are not needed, whether they exist or not.
        divided: Whether scales are divided by `factor`.

    Raises:
        CheckpointError: No block fits both shapes.
    """
    _check_scales(scales)
    *matrices, rows, columns = codes.shape
    columns = columns * 8 // bits
    grid = _grid(tuple(matrices), rows, scales.shape)
    block = None
    if grid is not None and 0 not in grid:
        found = (_block(rows, grid[0], stated and stated[0]), _block(columns, grid[1], stated and stated[1]))
        block = None if None in found else found
    if block is None or block[0] is None or block[1] is None:
        raise CheckpointError(
            f"{codes.path.name}: {codes.name} has the shape {codes.shape}, its scales {scales.name} have {scales.shape}: "
            f"these are no scales of blocks{'' if stated is None else f' of {stated[0]} by {stated[1]}'}"
        )
    by_blocks = None if math.prod(scales.shape) == 1 else 1 if matrices else block[0]
    parts = [EncodingPart(codes, 1), EncodingPart(scales, by_blocks)]
    if factor is not None:
        if math.prod(factor.shape) not in (1, *matrices[:1]):
            raise CheckpointError(f"{factor.path.name}: {factor.name} has the shape {factor.shape}; it should be one number")
        parts.append(EncodingPart(factor, None if math.prod(factor.shape) == 1 else 1))
    return Encoding(
        ScaledMatrices(name, (block[0], block[1]), bits, divided=divided), (*matrices, rows, columns), tuple(parts),
        beside=tuple(each for each in beside if each in tensors),
    )  # fmt: skip


def _check_scales(scales: StoredTensor) -> None:
    import torch

    known = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.float8_e4m3fn, torch.uint8)
    if scales.dtype not in known:
        raise CheckpointError(f"{scales.path.name}: {scales.name} holds {scales.dtype}, which are no scales")


def _grid(matrices: tuple[int, ...], rows: int, scales: tuple[int, ...]) -> tuple[int, int] | None:
    """Return the rows and columns of blocks of one matrix; None if the shape of the scales has no such meaning."""
    if scales[: len(matrices)] != matrices:
        return None
    each = scales[len(matrices) :]
    if math.prod(each) == 1:
        return 1, 1
    if len(each) == 1:  # one for each row
        return (rows, 1) if each[0] == rows else None
    if len(each) == 4 and each[1] == each[3] == 1:  # as (rows of blocks, 1, columns of blocks, 1)
        return each[0], each[2]
    return (each[0], each[1]) if len(each) == 2 else None


def _block(size: int, count: int, stated: int | None) -> int | None:
    """Return the size of each of `count` blocks, of which only a block of the stated size may be cut short; None if there is none."""
    if stated and -(-size // stated) == count:
        return stated
    return size // count if size % count == 0 else None
