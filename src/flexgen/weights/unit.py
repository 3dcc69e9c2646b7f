"""A unit as bytes: what is read for it, what crosses a link to a device, and which tensors result.

Knows parameters only through `TensorSource`, and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, Self

import torch

from flexgen.base.parallel import Parallel, serially
from flexgen.base.quantities import align_up
from flexgen.formats.base import StoredRange, in_order
from flexgen.io.aligned import Extent, plan_extents
from flexgen.kernels.encoded import EncodedPlaces

DEVICE_ALIGNMENT = 256  # the alignment of a tensor on a device, for vector loads and matrix kernels

Take = Callable[["UnitTensor"], torch.Tensor]


class UnitForm(Enum):
    """The form of a unit's bytes on a part of their way."""

    STORED = "as in the files, over-read included"
    CARRIED = "as they cross a link to a device: decoded by the host, or stored where the device decodes"


class TensorSource(Protocol):
    """A way to make a tensor from stored bytes, as implemented by checkpoint/sources.py."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def is_view(self) -> bool: ...
    @property
    def columns_first(self) -> bool: ...
    @property
    def carried_as_stored(self) -> bool: ...
    @property
    def ranges(self) -> Sequence[StoredRange]: ...
    def encoded_places(self, positions: Sequence[int]) -> EncodedPlaces | None: ...
    def assemble(self, raws: Sequence[torch.Tensor], out: torch.Tensor, parallel: Parallel = ...) -> None: ...


class SliceableSource(TensorSource, Protocol):
    """A source whose rows can be read separately."""

    def rows(self, start: int, stop: int) -> Self:
        """Return the source of rows [start, stop)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedTensor:
    """A tensor that a unit brings, before its position in the unit is known.

    Attributes:
        module: The name of the module to which it is bound.
        parameter: The name of the parameter within the module.
        source: The stored bytes of the tensor.
        dtype: The dtype of the decoded tensor.
    """

    module: str
    parameter: str
    source: TensorSource
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitTensor(WantedTensor):
    """One tensor of a unit, with its positions in the unit's bytes.

    Attributes:
        stored_at: The positions of the source's ranges in the unit's stored bytes.
        carried_at: The positions of the same ranges in the unit's carried bytes if the device decodes; otherwise the position of the
            decoded tensor.
    """

    stored_at: tuple[int, ...]
    carried_at: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.source.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes of the decoded tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def plain(self) -> bool:
        """Whether the stored bytes are the tensor, so that it can be a view of them."""
        aligned = all(position % self.dtype.itemsize == 0 for position in self.stored_at)
        return self.source.is_view and self.source.dtype == self.dtype and aligned

    def view(self, data: torch.Tensor, position: int) -> torch.Tensor:
        """Return the decoded tensor as a view of the bytes that begin at `position`, in the order of the source's numbers."""
        numbers = data[position : position + self.nbytes].view(self.dtype)
        return in_order(numbers, self.shape, columns_first=self.source.columns_first)

    def is_view(self, form: UnitForm) -> bool:
        """Return whether bytes of this form hold the decoded tensor."""
        return self.plain if form is UnitForm.STORED else not self.source.carried_as_stored

    def numbers(self, data: torch.Tensor, form: UnitForm, take: Take, parallel: Parallel = serially) -> torch.Tensor:
        """Return the decoded tensor: a view of its unit's bytes if they hold it, otherwise decoded.

        Args:
            data: The unit's bytes, uint8, on any device.
            form: The form of these bytes.
            take: A function that returns the tensor, on the same device, into which to decode.
            parallel: Runs the loops of the decoding.
        """
        positions = self.stored_at if form is UnitForm.STORED else self.carried_at
        if self.is_view(form):
            return self.view(data, positions[0])
        out = take(self)
        raws = []
        for each, position in zip(self.source.ranges, positions, strict=True):
            raw = data[position : position + each.nbytes]
            if position % each.dtype.itemsize:
                raw = raw.clone()  # torch's views need aligned storage offsets
            raws.append(raw.view(each.dtype))
        self.source.assemble(raws, out, parallel)
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitLayout:
    """A unit: the bytes that are read for it, and the tensors that are bound.

    Attributes:
        index: The position of the unit in the order of use.
        name: A name for people.
        tensors: The tensors that the unit brings.
        extents: The ranges of files that are read for it.
        stored_bytes: The bytes of all extents, as they lie in a ring.
        carried_bytes: The bytes that cross a link to a device, each tensor at a multiple of DEVICE_ALIGNMENT.
        decoded_bytes: The bytes of all decoded tensors, each at a multiple of DEVICE_ALIGNMENT.
    """

    index: int
    name: str
    tensors: tuple[UnitTensor, ...]
    extents: tuple[Extent, ...]
    stored_bytes: int
    carried_bytes: int
    decoded_bytes: int

    @property
    def plain(self) -> bool:
        return all(tensor.plain for tensor in self.tensors)

    @classmethod
    def of(cls, index: int, name: str, wanted: Sequence[WantedTensor]) -> UnitLayout:
        """Lay tensors out for reading, for the link and for computing."""
        sources = [each.source for each in wanted]
        extents, positions, stored_bytes = plan_extents([stored[:3] for source in sources for stored in source.ranges])
        tensors: list[UnitTensor] = []
        at = carried_bytes = decoded_bytes = 0
        for each in wanted:
            decoded = torch.Size(each.source.shape).numel() * each.dtype.itemsize
            carried_at = [carried_bytes]
            if each.source.carried_as_stored:
                carried_at, carried_bytes = _carried_positions(each.source.ranges, carried_bytes)
            else:
                carried_bytes += align_up(decoded, DEVICE_ALIGNMENT)
            decoded_bytes += align_up(decoded, DEVICE_ALIGNMENT)
            stored_at = tuple(positions[at : at + len(each.source.ranges)])
            at += len(stored_at)
            tensors.append(
                UnitTensor(
                    module=each.module, parameter=each.parameter, source=each.source, dtype=each.dtype,
                    stored_at=stored_at, carried_at=tuple(carried_at),
                )
            )  # fmt: skip
        return cls(
            index=index, name=name, tensors=tuple(tensors), extents=tuple(extents),
            stored_bytes=max(stored_bytes, 1), carried_bytes=max(carried_bytes, 1), decoded_bytes=max(decoded_bytes, 1),
        )  # fmt: skip

    def to_decode_bytes(self, form: UnitForm) -> int:
        """Return the bytes of the tensors that have to be decoded from bytes of this form, each at a multiple of DEVICE_ALIGNMENT."""
        return sum(align_up(tensor.nbytes, DEVICE_ALIGNMENT) for tensor in self.tensors if not tensor.is_view(form))

    def carried(self, stored: torch.Tensor, into: torch.Tensor, parallel: Parallel = serially) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the carried bytes in portions: (position, bytes).

        Args:
            stored: The unit's stored bytes.
            into: Host memory for `carried_bytes`; tensors that the host decodes are written to their positions in it.
            parallel: Runs the loops of the decoding.
        """
        for tensor in self.tensors:
            if tensor.source.carried_as_stored:
                end = 0  # of what has been carried; ranges that overlap in the file overlap here too
                sizes = [each.nbytes for each in tensor.source.ranges]
                for at, stored_at, size in sorted(zip(tensor.carried_at, tensor.stored_at, sizes, strict=True)):
                    begin = max(end - at, 0)
                    if begin < size:
                        yield at + begin, stored[stored_at + begin : stored_at + size]
                        end = at + size
            else:
                numbers = tensor.numbers(stored, UnitForm.STORED, lambda each: each.view(into, each.carried_at[0]), parallel)
                numbers = numbers.mT if tensor.source.columns_first else numbers
                yield tensor.carried_at[0], numbers.view(-1).view(torch.uint8)


def _carried_positions(ranges: Sequence[StoredRange], at: int) -> tuple[list[int], int]:
    """Return the positions of ranges in the carried bytes, beginning at `at`, and the end of the last; what overlaps is carried once.

    They follow each other in their order, so that pieces of equal sizes lie at equal distances.
    """
    merged: dict[int, StoredRange] = {}  # the first of the ranges that overlap, grown by the others
    owners = [0] * len(ranges)
    owner = -1
    for index in sorted(range(len(ranges)), key=lambda each: (str(ranges[each].path), ranges[each].offset)):
        each, before = ranges[index], merged.get(owner)
        if before is None or each.path != before.path or each.offset >= before.offset + before.nbytes:
            owner, merged[index] = index, each
        else:
            merged[owner] = before._replace(nbytes=max(before.nbytes, each.offset + each.nbytes - before.offset))
        owners[index] = owner
    begins: dict[int, int] = {}
    positions: list[int] = []
    for each, owner in zip(ranges, owners, strict=True):
        if owner not in begins:
            begins[owner] = at
            at = align_up(at + merged[owner].nbytes, DEVICE_ALIGNMENT)
        positions.append(begins[owner] + each.offset - merged[owner].offset)
    return positions, at
