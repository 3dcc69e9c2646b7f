"""What a number format is, and the stored tensors that it stands for.  Opens no file, and knows no model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flexgen.errors import EngineError


class StoredRange(NamedTuple):
    """Bytes of a file that are read together.

    Attributes:
        path: the file.
        offset: of the first byte, from the start of the file.
        nbytes: how many there are.
        dtype: of the numbers that they are.
    """

    path: Path
    offset: int
    nbytes: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """A tensor that a file would hold."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor of a checkpoint: where its bytes lie, or what it is encoded as.

    Attributes:
        name: its name in the file.
        path: the file.
        offset: of its first byte, from the start of the file.  Not always a multiple of the element size.
        nbytes: always the product of `shape` times the element size; row-major, little-endian.
        dtype: of its numbers; of an encoded tensor that of the decoded numbers.
        shape: of an encoded tensor that of the decoded numbers.
        encoding: None for plain numbers.  Otherwise the tensors that are really stored; `path` and `offset` then mean nothing.
    """

    name: str
    path: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    encoding: Encoding | None = None

    def ranges(self, first: int, count: int) -> list[StoredRange]:
        """What has to be read for `count` elements from element `first` on."""
        if self.encoding is not None:
            start, stop = self.rows(first, count)
            return self.encoding.ranges(start, stop)
        return [StoredRange(self.path, self.offset + first * self.dtype.itemsize, count * self.dtype.itemsize, self.dtype)]

    def rows(self, first: int, count: int) -> tuple[int, int]:
        """The rows [start, stop) that hold these elements."""
        row_elements = math.prod(self.shape[1:])
        return first // row_elements, -(-(first + count) // row_elements)


@dataclass(frozen=True, slots=True)
class Part:
    """A stored tensor that holds some of what an encoded one is made of.

    Attributes:
        tensor: as stored.
        rows: how many rows of the encoded tensor one row of this one stands for.
    """

    tensor: StoredTensor
    rows: int


@dataclass(frozen=True, slots=True)
class Encoding:
    """How one tensor of the model is stored in a format.

    Attributes:
        format: what decodes it.
        shape: of the decoded tensor.
        parts: the stored tensors, in the order in which the format decodes them.
    """

    format: NumberFormat
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    def ranges(self, start: int, stop: int) -> list[StoredRange]:
        """What has to be read for rows [start, stop) of the decoded tensor, a range for each part."""
        ranges = []
        for part in self.parts:
            first, last = start // part.rows, -(-stop // part.rows)
            row_bytes = part.tensor.nbytes // part.tensor.shape[0]
            offset = part.tensor.offset + first * row_bytes
            ranges.append(StoredRange(part.tensor.path, offset, (last - first) * row_bytes, part.tensor.dtype))
        return ranges


class NumberFormat:
    """A format of stored weights.  Members stand in formats/table.py.

    Attributes:
        name: in ModelSpec.number_format and in messages.
        runs: whether the engine computes with such weights; models in other formats can only be planned for.
        carried_as_stored: whether stored bytes cross the link to a device, which decodes them; otherwise the host decodes before the link.
    """

    name: str
    runs: bool = False
    carried_as_stored: bool = False

    def is_stated_by(self, quantization: Mapping[str, Any]) -> bool:
        """Whether a quantization_config means this format."""
        return False

    def encode(self, tensor: NamedTensor) -> list[NamedTensor]:
        """The tensors that are stored for one that `save_pretrained` would write: itself where the format leaves it alone."""
        return [tensor]

    def find(self, tensors: Mapping[str, StoredTensor]) -> dict[str, Encoding]:
        """The encoded tensors among stored ones, by the name of the decoded one."""
        return {}

    def decode(self, parts: Sequence[torch.Tensor], start: int, out: torch.Tensor) -> None:
        """Compute rows of a tensor from what is stored for them.

        Args:
            parts: what was read of each part of the encoding: its rows, flattened, on the device of `out`.
            start: number of the first row.
            out: (rows, ...), of the dtype that is computed in.
        """
        raise EngineError(f"numbers in {self.name} cannot be decoded")
