"""The definition of a number format and of the stored tensors that it encodes.  Opens no file, and knows no model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flexgen.base.parallel import Parallel, serially
from flexgen.errors import CheckpointError, EngineError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

    from flexgen.kernels.encoded import MatrixCodes

RANDOM_DEVIATION = 0.02  # of the numbers of random weights


class StoredRange(NamedTuple):
    """Bytes of a file that are read together.

    Attributes:
        path: The file.
        offset: The offset of the first byte from the start of the file.
        nbytes: The number of bytes.
        dtype: The dtype of the stored numbers.
    """

    path: Path
    offset: int
    nbytes: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """The name, shape and dtype of a tensor that a file would hold."""

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
        name: The name of the tensor in the file.
        path: The file.
        offset: The offset of its first byte from the start of the file, not always a multiple of the element size.
        nbytes: The product of `shape` times the element size; the numbers are row-major and little-endian.
        dtype: The dtype of its numbers; for an encoded tensor, that of the decoded numbers.
        shape: The shape; for an encoded tensor, that of the decoded one.
        encoding: The tensors that are actually stored, in which case `path` and `offset` have no meaning; None for plain numbers.
    """

    name: str
    path: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    encoding: Encoding | None = None

    def ranges(self, first: int, count: int) -> list[StoredRange]:
        """Return the ranges to read for `count` elements starting at element `first`."""
        if self.encoding is not None:
            start, stop = self.rows(first, count)
            return self.encoding.ranges(start, stop)
        return [StoredRange(self.path, self.offset + first * self.dtype.itemsize, count * self.dtype.itemsize, self.dtype)]

    def small_bytes(self) -> bytes:
        """Return the bytes of a small tensor that says something about others, such as their shape.

        Raises:
            CheckpointError: The file cannot be read, or ends before the tensor.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.nbytes)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error})") from error
        if len(data) != self.nbytes:
            raise CheckpointError(f"{self.path}: {self.name}: the file ends before it; it was longer when its header was read")
        return data

    def rows(self, first: int, count: int) -> tuple[int, int]:
        """Return the rows [start, stop) that contain these elements; all rows if they are not stored apart."""
        if self.encoding is not None and not self.encoding.by_rows:
            return 0, self.shape[0]
        row_elements = math.prod(self.shape[1:])
        return first // row_elements, -(-(first + count) // row_elements)


@dataclass(frozen=True, slots=True)
class EncodingPart:
    """A stored tensor that holds a part of an encoded one.

    Attributes:
        tensor: The tensor as stored.
        rows: The number of rows of the encoded tensor that correspond to one row of this tensor; None if the whole tensor is needed
            for any rows, as a scale of the whole matrix is.
    """

    tensor: StoredTensor
    rows: int | None

    def range(self, start: int, stop: int) -> StoredRange:
        """Return the range to read for rows [start, stop) of the encoded tensor."""
        tensor = self.tensor
        if self.rows is None:
            return StoredRange(tensor.path, tensor.offset, tensor.nbytes, tensor.dtype)
        first, last = start // self.rows, -(-stop // self.rows)
        row_bytes = tensor.nbytes // tensor.shape[0]
        return StoredRange(tensor.path, tensor.offset + first * row_bytes, (last - first) * row_bytes, tensor.dtype)


@dataclass(frozen=True, slots=True)
class Encoding:
    """The way in which one tensor of the model is stored in a format.

    Attributes:
        format: The format that decodes it.
        shape: The shape of the decoded tensor.
        parts: The stored tensors, in the order in which the format expects them for decoding.
        by_rows: Whether rows of the decoded tensor can be read and decoded apart from the others.  A matrix that is stored transposed is
            read as a whole.
        beside: The names of stored tensors that belong to it but that decoding does not need, such as the scales of activations.
        columns_first: Whether the numbers of a column of a matrix are stored side by side, and are decoded several times as fast into
            memory where they lie so as well.
    """

    format: NumberFormat
    shape: tuple[int, ...]
    parts: tuple[EncodingPart, ...]
    by_rows: bool = True
    beside: tuple[str, ...] = ()
    columns_first: bool = False

    def laid_out(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return numbers, flattened, as a tensor of the decoded shape in the order that is decoded fastest."""
        return in_order(numbers, self.shape, columns_first=self.columns_first)

    def ranges(self, start: int, stop: int) -> list[StoredRange]:
        """Return the ranges to read for rows [start, stop) of the decoded tensor, one for each part."""
        return [part.range(start, stop) for part in self.parts]


def in_order(numbers: torch.Tensor, shape: Sequence[int], *, columns_first: bool) -> torch.Tensor:
    """Return numbers, flattened, as a tensor of a shape: its matrices row by row, or column by column."""
    return numbers.view(*shape[:-2], shape[-1], shape[-2]).mT if columns_first else numbers.view(tuple(shape))


class NumberFormat:
    """A format of stored weights.  All formats are listed in formats/table.py.

    Attributes:
        name: The name in ModelSpec.number_format and in messages.
        runs: Whether the engine can compute with such weights; models in other formats can only be planned for.
        carried_as_stored: Whether stored bytes cross the link to a device, which decodes them; otherwise the host decodes before the link.
        stored_as_linear: Whether the weight of a GPT-2's Conv1D is stored as that of a linear layer, transposed.
    """

    name: str
    runs: bool = False
    carried_as_stored: bool = False
    stored_as_linear: bool = False

    def stated_by(self, quantization: Mapping[str, Any]) -> NumberFormat | None:
        """Return the format that a quantization_config states, with the settings that it states; None if it states another one.

        Raises:
            UnsupportedModelError: It states a variant of this format that is not supported.
        """
        return None

    def encode(self, tensor: NamedTensor) -> list[NamedTensor]:
        """Return the tensors that are stored for one that `save_pretrained` would write: the tensor itself if it is not encoded."""
        return [tensor]

    def with_shapes(self, shapes: Callable[[], Mapping[str, tuple[int, ...]]]) -> NumberFormat:
        """Return the format for files that are not on this machine.

        Args:
            shapes: Returns the shapes of the tensors that `save_pretrained` would write, by name; headers may not tell them.
        """
        return self

    def find(self, tensors: Mapping[str, StoredTensor]) -> dict[str, Encoding]:
        """Return the encoded tensors among stored ones, by the name of the decoded tensor.

        Raises:
            CheckpointError: Stored tensors contradict each other or the settings of the format.
        """
        return {}

    def common_configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Return the quantization_config of common models, by the name of their encodings' format, as in ModelSpec.decoded_from.

        How fast these are decoded is measured; the rates of others are estimated.
        """
        return {}

    def example(self, num_elements: int) -> NamedTensor:
        """Return a matrix of about so many numbers that `encode` encodes, as models have them, for measuring how fast it is decoded."""
        import torch

        return NamedTensor("model.layers.0.mlp.down_proj.weight", (max(num_elements >> 19, 1) << 7, 4096), torch.bfloat16)

    def sample(self, stored: NamedTensor, generator: torch.Generator) -> torch.Tensor:
        """Return random numbers of a stored tensor that `encode` returned for another one, or of some of its rows.

        Whatever is made of them for one decoded tensor decodes to finite numbers with a mean near 0 and a standard deviation near
        RANDOM_DEVIATION.

        Raises:
            UnsupportedModelError: Random weights in this format cannot be made.
        """
        raise UnsupportedModelError(f"random weights in {self.name} cannot be made")

    def matrix_codes(self, encoding: Encoding) -> MatrixCodes | None:
        """Return how each matrix of an encoding is stored, if grouped products read its codes as they are; None if they do not.

        Args:
            encoding: A matrix or several, each of which is stored row by row in all parts.
        """
        return None

    def decode(self, parts: Sequence[torch.Tensor], start: int, out: torch.Tensor, parallel: Parallel = serially) -> None:
        """Decode rows of a tensor from what is stored for them.

        Args:
            parts: For each part of the encoding, the numbers read of its rows, flattened, on the device of `out`.
            start: The index of the first row.
            out: The decoded rows, (rows, ...), contiguous, in the dtype of computing; they are written.
            parallel: Runs loops over rows, where the host decodes.
        """
        raise EngineError(f"numbers in {self.name} cannot be decoded")
