"""Matrices of experts in codes of 4 bits, as they are stored: where a unit's bytes hold them, and what they stand for.

Kernels multiply by them without decoding them first.  Letters of shapes: E experts, B blocks of an expert's outputs that are stored apart,
N outputs of a block, G groups of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ZEROS_OF_WORD = 8  # packed zero points


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixCodes:
    """How one matrix, (outputs, inputs), is stored: the codes of an output follow each other, the first of two in the low half of a byte.

    Attributes:
        parts: The dtype and shape of each stored part, row by row: the codes, uint8 (N, bytes of an output), the scales and, if there are
            any, the zero points, as in EncodedMatrices.
        group: As in EncodedMatrices.
        zero: As in EncodedMatrices.
    """

    parts: tuple[tuple[torch.dtype, tuple[int, int]], ...]
    group: int
    zero: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedMatrices:
    """The matrices of experts: a number is the value of its code, less that of zero, times the scale of its group, rounded to `dtype`.

    Output o of an expert is output o % N of block o // N.

    Attributes:
        codes: The codes, uint8 (E, B, N, bytes of an output).
        scales: The scales, (E, B, N, G): floating-point numbers, E4M3, or E8M0 as such or in plain bytes.
        zeros: The codes that stand for zero: int32 words (E, B, words, G), each those of eight outputs from the low bits on, or bytes of
            the shape of the scales, to which `zero` is added.  None if all are `zero`.
        zero: The code that stands for zero; None for codes of E2M1.
        group: The inputs that share a scale; the last group may be smaller.
        inputs: The inputs of a matrix.
        dtype: The dtype of the decoded numbers.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    zero: int | None
    group: int
    inputs: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of the matrices, (experts, inputs, outputs)."""
        experts, blocks, outputs, _ = self.codes.shape
        return experts, self.inputs, blocks * outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedPart:
    """Where one part of all matrices lies in a unit's bytes.

    Attributes:
        dtype: The dtype of its numbers.
        position: The position of the first byte.
        shape: (E, B, rows, columns).
        strides: The distances, in bytes, of two experts and of two blocks.
    """

    dtype: torch.dtype
    position: int
    shape: tuple[int, int, int, int]
    strides: tuple[int, int]

    def within(self, data: Tensor) -> Tensor:
        """Return the part as a view of the unit's bytes."""
        (experts, blocks, rows, columns), size = self.shape, self.dtype.itemsize
        nbytes = (experts - 1) * self.strides[0] + (blocks - 1) * self.strides[1] + rows * columns * size
        numbers = data[self.position : self.position + nbytes].view(self.dtype)
        return numbers.as_strided(self.shape, (self.strides[0] // size, self.strides[1] // size, columns, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPlaces:
    """Where the matrices of experts lie in a unit's bytes.

    Attributes:
        parts: The codes, the scales and, if there are any, the zero points.
        group: As in EncodedMatrices.
        zero: As in EncodedMatrices.
        inputs: As in EncodedMatrices.
    """

    parts: tuple[PlacedPart, ...]
    group: int
    zero: int | None
    inputs: int

    def within(self, data: Tensor, dtype: torch.dtype) -> EncodedMatrices:
        """Return the matrices as views of the unit's bytes; `dtype` is that of the decoded numbers."""
        codes, scales, *zeros = (part.within(data) for part in self.parts)
        return EncodedMatrices(
            codes=codes, scales=scales, zeros=zeros[0] if zeros else None, zero=self.zero, group=self.group, inputs=self.inputs, dtype=dtype
        )
