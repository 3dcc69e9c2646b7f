"""A unit as bytes: which extents to read, and which tensors come out of them.

Knows parameters only through `TensorSource`; models/ fills it in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from flexgen.base.quantities import align_up
from flexgen.io.aligned import Extent

DEVICE_ALIGNMENT = 256  # of a tensor on a device: vector loads and matrix kernels want it


class StoredPiece(Protocol):
    """A contiguous byte range of a file that becomes a block of a parameter."""

    @property
    def nbytes(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...


class TensorSource(Protocol):
    """How stored pieces become a tensor."""

    @property
    def is_view(self) -> bool: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def pieces(self) -> Sequence[StoredPiece]: ...
    def assemble(self, raws: Sequence[torch.Tensor], out: torch.Tensor) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitTensor:
    """One tensor of a unit.

    Attributes:
        module, parameter: where it is bound. shape, dtype: as bound (decoded).
        source: how its pieces become it. positions: of each piece in the unit's staging bytes.
        packed_offset: where it lies in the unit's packed (decoded, aligned) form.
    """

    module: str
    parameter: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: TensorSource
    positions: tuple[int, ...]
    packed_offset: int

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def plain(self) -> bool:
        """The stored bytes are the tensor: a view of the staging buffer serves."""
        aligned = all(position % self.dtype.itemsize == 0 for position in self.positions)
        return self.source.is_view and self.source.dtype == self.dtype and aligned

    def view(self, staging: torch.Tensor) -> torch.Tensor:
        """The tensor as a view of its unit's staging bytes (plain tensors only)."""
        start = self.positions[0]
        return staging[start : start + self.nbytes].view(self.dtype).view(self.shape)

    def decode(self, staging: torch.Tensor, out: torch.Tensor) -> None:
        """Assemble and cast the stored pieces into `out`."""
        raws = []
        for piece, position in zip(self.source.pieces, self.positions, strict=True):
            raw = staging[position : position + piece.nbytes]
            if position % piece.dtype.itemsize:
                raw = raw.clone()  # torch views need aligned storage offsets
            raws.append(raw.view(piece.dtype))
        self.source.assemble(raws, out)

    def packed_view(self, packed: torch.Tensor) -> torch.Tensor:
        """The tensor as a view of its unit's packed bytes."""
        return packed[self.packed_offset : self.packed_offset + self.nbytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitLayout:
    """A unit: what is read and what is bound.

    Attributes:
        staging_bytes: of the read as it lies in a ring, over-read included.
        packed_bytes: of all tensors decoded, each at a multiple of DEVICE_ALIGNMENT.
    """

    index: int
    name: str
    tensors: tuple[UnitTensor, ...]
    extents: tuple[Extent, ...]
    staging_bytes: int
    packed_bytes: int

    @property
    def plain(self) -> bool:
        return all(tensor.plain for tensor in self.tensors)


def packed_offsets(sizes: Sequence[int]) -> tuple[list[int], int]:
    """(offset of each tensor, total) when each starts at a multiple of DEVICE_ALIGNMENT."""
    offsets, total = [], 0
    for size in sizes:
        offsets.append(total)
        total += align_up(size, DEVICE_ALIGNMENT)
    return offsets, total
