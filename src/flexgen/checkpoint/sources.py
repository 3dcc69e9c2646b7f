"""The bytes of files that become a parameter, as values that can be used without knowing models.

The caller reads the bytes of the pieces, by whatever means, and `assemble` puts them in their places.
`read` is the plain version of that, for small tensors and to check the fast versions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from flexgen.base.parallel import Parallel, serially
from flexgen.checkpoint.pieces import Piece, span
from flexgen.checkpoint.stacks import encoded_places
from flexgen.errors import CheckpointError
from flexgen.formats.base import StoredRange
from flexgen.formats.plain import cast_into
from flexgen.kernels.encoded import EncodedPlaces

Convert = Callable[[Sequence[torch.Tensor]], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterSource:
    """The source of a parameter, of a range of its rows, or of a persistent buffer.

    Attributes:
        name: The name in the model's state dict.
        shape: The shape of the parameter, or of the rows.
        dtype: The dtype of the stored numbers.
        pieces: The pieces to read, in the order in which `assemble` expects them.
        convert: None if the pieces only have to be put in their places, where they fill the parameter.  Otherwise the function that
            computes it from the stored tensors; such a source cannot be read in parts.
        convert_dtype: The dtype of the numbers that `convert` gets; None for that of the destination.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    convert: Convert | None = None
    convert_dtype: torch.dtype | None = None

    @property
    def nbytes(self) -> int:
        """The bytes of all pieces."""
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def ranges(self) -> list[StoredRange]:
        """The ranges to read, in the order in which `assemble` expects them."""
        return [each for piece in self.pieces for each in piece.ranges]

    @property
    def carried_as_stored(self) -> bool:
        """Whether a device assembles the parameter from the bytes that were read; otherwise the host does so before the link."""
        if self.convert is not None or not self.pieces:
            return False
        encodings = (piece.tensor.encoding for piece in self.pieces)
        return all(each is not None and each.format.carried_as_stored for each in encodings)

    @property
    def columns_first(self) -> bool:
        """Whether the parameter is assembled fastest where the numbers of each column lie side by side in memory."""
        return self.convert is None and bool(self.pieces) and all(piece.columns_first for piece in self.pieces)

    def encoded_places(self, positions: Sequence[int]) -> EncodedPlaces | None:
        """Return where bytes hold the matrices of a parameter by which kernels multiply as they are stored; None if they do not.

        Args:
            positions: The position of each of `ranges` in these bytes.
        """
        return None if self.convert is not None else encoded_places(self.shape, self.pieces, positions, columns_first=self.columns_first)

    @property
    def is_view(self) -> bool:
        """Whether the bytes of the only piece, viewed as `shape`, are the parameter."""
        if self.convert is not None or len(self.pieces) != 1 or self.pieces[0].tensor.encoding is not None:
            return False
        return self.pieces[0].shape == self.shape and self.pieces[0].is_contiguous

    @property
    def sliceable(self) -> bool:
        """Whether `rows` is allowed: there are rows, and the numbers of each are contiguous in a file."""
        if self.convert is not None or not self.shape:
            return False
        # what is stored as a whole may still be one row, as an expert is of all experts
        if any(p.tensor.encoding is not None and not p.tensor.encoding.by_rows and p.shape[0] > 1 for p in self.pieces):
            return False
        return all(p.shape[0] == 1 or p.strides[0] >= span(p.shape[1:], p.strides[1:]) for p in self.pieces)

    def rows(self, start: int, stop: int) -> ParameterSource:
        """Return the source of rows [start, stop) along dimension 0, which reads the bytes of these rows only.

        Raises:
            ValueError: The source is not `sliceable`, or there are no such rows.
        """
        if not self.sliceable:
            raise ValueError(f"{self.name} cannot be read in parts")
        if not 0 <= start <= stop <= self.shape[0]:
            raise ValueError(f"{self.name} has {self.shape[0]} rows; [{start}, {stop}) is no part of them")
        pieces = tuple(part for piece in self.pieces if (part := piece.narrow(0, start, stop)))
        return replace(self, shape=(stop - start, *self.shape[1:]), pieces=pieces)

    def assemble(self, raws: Sequence[torch.Tensor], out: torch.Tensor, parallel: Parallel = serially) -> None:
        """Write the parameter into `out`, cast to its dtype.

        Args:
            raws: For each of `ranges` the numbers read: contiguous, of the range's dtype, in any shape.
            out: A tensor of shape `shape`, of any dtype, device and strides.
            parallel: Runs the loops of the decoding of encoded tensors.
        """
        if tuple(out.shape) != self.shape:
            raise ValueError(f"{self.name} is {self.shape}, the destination {tuple(out.shape)}")
        if (num_ranges := sum(piece.num_ranges for piece in self.pieces)) != len(raws):
            raise ValueError(f"{self.name} is made of {num_ranges} ranges, not of {len(raws)}")
        rest = iter(raws)
        pieces = [(piece, list(islice(rest, piece.num_ranges))) for piece in self.pieces]
        with torch.no_grad():
            if self.convert is None:
                for piece, read in pieces:
                    piece.put_into(out[piece.target], read, parallel)
            else:  # transformers casts safetensors first and computes then; so does this code, to get the same bits
                like = torch.empty(0, dtype=self.convert_dtype or out.dtype, device=out.device)
                boxes = (piece.box(read, like, parallel) for piece, read in pieces)
                out.copy_(self.convert([box.to(device=like.device, dtype=like.dtype) for box in boxes]))

    @property
    def rows_apart(self) -> bool:
        """Whether single rows of the only piece can be read, and assembled by `assemble_rows`."""
        if self.convert is not None or len(self.pieces) != 1 or len(self.shape) != 2 or self.pieces[0].shape != self.shape:
            return False
        encoding = self.pieces[0].tensor.encoding
        apart = encoding is None or (encoding.by_rows and all(part.rows == 1 for part in encoding.parts))
        return apart and self.pieces[0].is_contiguous

    def assemble_rows(self, raws: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Write rows that lie anywhere in the parameter into `out`, cast to its dtype.

        Args:
            raws: For each of `ranges`, the numbers read of these rows, flattened, of the range's dtype.
            out: The rows, (rows, columns), contiguous.
        """
        encoding = self.pieces[0].tensor.encoding
        if encoding is None:
            cast_into(out, raws[0].view(out.shape))
        else:
            encoding.format.decode(raws, 0, out)

    def read(self, out: torch.Tensor) -> None:
        """Read the ranges, each with one blocking read, and `assemble` them.

        Raises:
            CheckpointError: A file cannot be read.
        """
        self.assemble([read_bytes(each.path, each.offset, each.nbytes).view(each.dtype) for each in self.ranges], out)


def read_bytes(path: Path, offset: int, nbytes: int) -> torch.Tensor:
    """Return a byte range of a file, (nbytes,) uint8, by blocking reads.

    Raises:
        CheckpointError: The file cannot be read, or ends too early.
    """
    data = torch.empty(nbytes, dtype=torch.uint8)
    rest, end = data.numpy().data, offset + nbytes
    try:
        with path.open("rb", buffering=0) as file:
            while rest and (count := os.preadv(file.fileno(), [rest], end - len(rest))):
                rest = rest[count:]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if rest:
        raise CheckpointError(f"{path}: ends before byte {end}; it was longer when its header was read")
    return data
