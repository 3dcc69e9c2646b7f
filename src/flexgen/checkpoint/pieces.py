"""Pieces of parameters: a box of a parameter, and where in a file its numbers are.  Knows neither models nor names of parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flexgen.base.parallel import Parallel, serially
from flexgen.formats.base import StoredRange, StoredTensor
from flexgen.formats.plain import cast_into


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a parameter, and the contiguous byte range of a file that holds its numbers.

    Pieces of one parameter never overlap in the parameter.  They may overlap in the file (if the rows of two halves are
    stored alternately), in which case they should be merged before reading.

    Attributes:
        tensor: The stored tensor that the numbers belong to.
        first: The index of the box's first element in it, row-major.
        shape: The shape of the box.
        strides: The strides of the box through the stored tensor, in elements.
        start: The start of the box in the parameter.
        every: The distance of the box's numbers along the last dimension of the parameter: 2 for one of two halves that alternate there.
    """

    tensor: StoredTensor
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: tuple[int, ...]
    every: int = 1

    @property
    def path(self) -> Path:
        """The file to read."""
        return self.tensor.path

    @property
    def offset(self) -> int:
        """The offset of the first byte to read from the start of the file, not always a multiple of the element size."""
        return self.tensor.offset + self.first * self.tensor.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """The number of bytes from the first to the last number of the box."""
        return span(self.shape, self.strides) * self.tensor.dtype.itemsize

    @property
    def ranges(self) -> list[StoredRange]:
        """The ranges to read: one, or one for each part of an encoded tensor."""
        return self.tensor.ranges(self.first, span(self.shape, self.strides))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored numbers."""
        return self.tensor.dtype

    @property
    def target(self) -> tuple[slice, ...]:
        """The box as an index into the parameter."""
        found = [slice(first, first + n) for first, n in zip(self.start, self.shape, strict=True)]
        if self.every > 1:
            first, n = self.start[-1], self.shape[-1]
            found[-1] = slice(first, first + (n - 1) * self.every + 1, self.every)
        return tuple(found)

    @property
    def is_contiguous(self) -> bool:
        """Whether the numbers of the byte range, in their order, are the box."""
        expected = contiguous_strides(self.shape)
        return all(n == 1 or have == want for n, have, want in zip(self.shape, self.strides, expected, strict=True))

    @property
    def columns_first(self) -> bool:
        """Whether the box is of several encoded matrices, and the numbers of a column of each are stored side by side."""
        encoding = self.tensor.encoding
        if encoding is None or len(self.shape) < 3:
            return False
        return self._is_turned or (encoding.columns_first and self.is_contiguous)

    @property
    def _is_turned(self) -> bool:
        """Whether matrices are those that are stored, with rows as columns."""
        return not self.is_contiguous and self.strides[-2] == 1 < self.strides[-1]

    def turned(self) -> Piece:
        """Return the box with rows as columns."""
        shape, strides, start = ((*of[:-2], of[-1], of[-2]) for of in (self.shape, self.strides, self.start))
        return replace(self, shape=shape, strides=strides, start=start)

    def view(self, raw: torch.Tensor) -> torch.Tensor:
        """Return the box as a view of `raw`: the numbers read, contiguous, of the stored dtype and any shape."""
        if raw.dtype != self.dtype or raw.nbytes != self.nbytes or not raw.is_contiguous():
            found = f"{raw.nbytes} bytes of {raw.dtype}"
            raise ValueError(f"{self.tensor.name}: expected {self.nbytes} contiguous bytes of {self.dtype}, got {found}")
        return raw.as_strided(self.shape, self.strides)  # keeps the storage offset of `raw`

    @property
    def num_ranges(self) -> int:
        return 1 if self.tensor.encoding is None else len(self.tensor.encoding.parts)

    def box(self, raws: Sequence[torch.Tensor], like: torch.Tensor, parallel: Parallel = serially) -> torch.Tensor:
        """Return the box: a view of the numbers read or, for an encoded tensor, decoded to the dtype and device of `like`.

        Args:
            raws: The numbers read for each range, on the device of `like`.
            like: A tensor of the wanted dtype and device.
            parallel: Runs the loops of the decoding.
        """
        encoding = self.tensor.encoding
        if encoding is None:
            return self.view(raws[0])
        start, stop = self.tensor.rows(self.first, span(self.shape, self.strides))
        rows = torch.empty((stop - start, *encoding.shape[1:]), dtype=like.dtype, device=like.device)
        encoding.format.decode(raws, start, rows, parallel)
        return rows.view(-1)[self.first - start * rows[0].numel() :].as_strided(self.shape, self.strides)

    def put_into(self, target: torch.Tensor, raws: Sequence[torch.Tensor], parallel: Parallel = serially) -> None:
        """Write the box into `target`, cast to its dtype; whole encoded rows are decoded in place.

        Args:
            target: The box in the parameter.
            raws: As for `box`.
            parallel: As for `box`.
        """
        encoding = self.tensor.encoding
        if self.columns_first and self._is_turned:
            self.turned().put_into(target.mT, raws, parallel)
            return
        if encoding is not None and (target.mT if self.columns_first else target).is_contiguous():
            start, stop = self.tensor.rows(self.first, span(self.shape, self.strides))
            step = self._row_step()
            if step == 1 and (stop - start) * math.prod(encoding.shape[1:]) == target.numel():
                encoding.format.decode(raws, start, target.view(stop - start, *encoding.shape[1:]), parallel)
                return
            if step > 1 and encoding.by_rows and all(part.rows == 1 for part in encoding.parts):
                wanted = [raw.view(stop - start, -1)[::step].contiguous().view(-1) for raw in raws]
                encoding.format.decode(wanted, start, target.view(-1, *encoding.shape[1:]), parallel)
                return
        if encoding is not None and self._matrices_apart():
            count = self.shape[0]
            for index, one in enumerate(self._matrices()):
                one.put_into(target[index : index + 1], [raw.view(count, -1)[index] for raw in raws], parallel)
            return
        cast_into(target, self.box(raws, target, parallel))

    def _matrices_apart(self) -> bool:
        """Return whether the box is several encoded matrices, which can be decoded one by one so that no copy of all is needed."""
        encoding, row = self.tensor.encoding, math.prod(self.tensor.shape[1:])
        if encoding is None or not encoding.by_rows or len(self.shape) < 3 or self.shape[0] == 1 or self.strides[0] != row:
            return False
        within = self.first % row + span(self.shape[1:], self.strides[1:]) <= row
        return within and all(part.rows == 1 for part in encoding.parts)

    def _matrices(self) -> Iterator[Piece]:
        """Yield the matrices of the box, each with its place in the parameter."""
        for index in range(self.shape[0]):
            start = put(self.start, 0, self.start[0] + index)
            yield replace(self, first=self.first + index * self.strides[0], shape=put(self.shape, 0, 1), start=start)

    def _row_step(self) -> int:
        """Return n if the box is every n-th whole row of the stored tensor, as halves of rows stored alternately are; 0 if it is not."""
        row = math.prod(self.tensor.shape[1:])
        if self.is_contiguous:
            return 1
        rows_are_whole = self.shape[1:] == self.tensor.shape[1:] and self.strides[1:] == contiguous_strides(self.tensor.shape)[1:]
        return self.strides[0] // row if rows_are_whole and not self.first % row and not self.strides[0] % row else 0

    def narrow(self, dim: int, start: int, stop: int) -> Piece | None:
        """Return the part within [start, stop) of the parameter's dimension `dim`, placed relative to `start`; None if there is none.

        Raises:
            ValueError: The numbers are not adjacent along this dimension.
        """
        if self.every > 1 and dim == len(self.shape) - 1:
            raise ValueError(f"{self.tensor.name} alternates with another tensor along dimension {dim}")
        low = max(self.start[dim], start)
        length = min(self.start[dim] + self.shape[dim], stop) - low
        if length <= 0:
            return None
        return replace(
            self,
            first=self.first + (low - self.start[dim]) * self.strides[dim],
            shape=put(self.shape, dim, length),
            start=put(self.start, dim, low - start),
        )


def whole(tensor: StoredTensor) -> tuple[Piece, ...]:
    """Return the one piece that covers the whole tensor; none if it has no elements."""
    if 0 in tensor.shape:
        return ()
    return (Piece(tensor, 0, tensor.shape, contiguous_strides(tensor.shape), (0,) * len(tensor.shape)),)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides, in elements, of a row-major tensor."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def put(values: Sequence[int], position: int, value: int) -> tuple[int, ...]:
    """Return `values` with the entry at `position` replaced."""
    return (*values[:position], value, *values[position + 1 :])


def span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Return the number of elements from the first to the last of a box, both included."""
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
