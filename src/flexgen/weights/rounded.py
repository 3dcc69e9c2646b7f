"""A source of weights that are rounded to 8 bits as they are decoded: straight from stored numbers, or decoded some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from flexgen.base.parallel import Parallel, serially
from flexgen.base.quantities import MIB
from flexgen.formats.base import StoredRange
from flexgen.kernels.encoded import EncodedPlaces
from flexgen.kernels.int8.products import ROUNDED_AS_STORED, RoundedRows, round_rows, rounded_bytes
from flexgen.weights.unit import SliceableSource

BLOCK_BYTES = 4 * MIB  # of decoded numbers that are rounded at a time


@dataclass(frozen=True, slots=True)
class RoundedSource:
    """A matrix that is bound as RoundedRows, which `RoundedRows.within` finds in its bytes.

    Attributes:
        numbers: The stored bytes of the matrix, whose rows can be read separately.
        computed: The dtype of computing, to which numbers are decoded that are not stored as plain floats.
    """

    numbers: SliceableSource
    computed: torch.dtype

    @property
    def shape(self) -> tuple[int]:
        rows, columns = self.numbers.shape
        return (rounded_bytes(rows, columns),)

    @property
    def dtype(self) -> torch.dtype:
        return self.numbers.dtype

    @property
    def is_view(self) -> bool:
        return False

    @property
    def columns_first(self) -> bool:
        return False

    @property
    def carried_as_stored(self) -> bool:
        return False

    @property
    def ranges(self) -> Sequence[StoredRange]:
        return self.numbers.ranges

    def encoded_places(self, positions: Sequence[int]) -> EncodedPlaces | None:
        return None

    def assemble(self, raws: Sequence[torch.Tensor], out: torch.Tensor, parallel: Parallel = serially) -> None:
        """Write the rounded rows into `out`, int8, of shape `shape`; `raws` are the numbers read for each of `ranges`."""
        rows, columns = self.numbers.shape
        rounded = RoundedRows.within(out, rows, columns)
        if self.numbers.is_view and self.numbers.dtype in ROUNDED_AS_STORED:
            round_rows(raws[0].view(rows, columns), rounded, parallel)
            return
        step = min(max(BLOCK_BYTES // (columns * self.computed.itemsize), 1), rows)
        block = torch.empty(step, columns, dtype=self.computed)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            some, part = block[: stop - start], self.numbers.rows(start, stop)
            part.assemble(list(_found(part.ranges, self.numbers.ranges, raws)), some, parallel)
            round_rows(some, RoundedRows(rounded.codes[start:stop], rounded.scales[start:stop]), parallel)


def _found(wanted: Sequence[StoredRange], read: Sequence[StoredRange], raws: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield the numbers of each wanted range, which lies within a range that was read."""
    for each in wanted:
        yield next(
            raw.view(-1).view(torch.uint8)[each.offset - whole.offset :][: each.nbytes].view(each.dtype)
            for whole, raw in zip(read, raws, strict=True)
            if _lies_within(each, whole)
        )


def _lies_within(part: StoredRange, whole: StoredRange) -> bool:
    return part.path == whole.path and whole.offset <= part.offset and part.offset + part.nbytes <= whole.offset + whole.nbytes
