"""Parameters that are stacks of matrices in codes of 4 bits, as those of experts are: where kernels find the codes in a unit's bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from flexgen.checkpoint.pieces import Piece
from flexgen.kernels.encoded import EncodedPlaces, MatrixCodes, PlacedPart

Key = tuple[int, int]  # the number of an expert, and of a block of its outputs


def encoded_places(
    shape: tuple[int, ...], pieces: Sequence[Piece], positions: Sequence[int], *, columns_first: bool
) -> EncodedPlaces | None:
    """Return where the matrices of a parameter lie, if kernels multiply by them as they are stored; None if they do not.

    They do if each piece is one whole stored matrix, or several, all in the same codes of 4 bits along what is multiplied by, and if the
    pieces lie at equal distances.

    Args:
        shape: The shape of the parameter, (experts, outputs, inputs).
        pieces: Its pieces.
        positions: The positions of all ranges of all pieces in the unit's bytes.
        columns_first: Whether the numbers of a column are stored side by side: then the shape is (experts, inputs, outputs).
    """
    if len(shape) != 3 or not pieces or 0 in shape:
        return None
    codes = _codes(pieces[0])
    outputs, inputs = (shape[2], shape[1]) if columns_first else (shape[1], shape[2])
    if codes is None or any(_codes(piece) != codes or not _is_whole(piece, inputs, columns_first=columns_first) for piece in pieces):
        return None
    rows, num_parts = codes.parts[0][1][0], len(codes.parts)
    at: dict[Key, list[int]] = {}
    for number, piece in enumerate(pieces):
        at.update(_matrices(piece, codes, positions[number * num_parts : (number + 1) * num_parts], columns_first=columns_first))
    experts, blocks = shape[0], outputs // rows
    if set(at) != {(expert, block) for expert in range(experts) for block in range(blocks)} or outputs % rows:
        return None
    parts = [_placed({key: found[part] for key, found in at.items()}, codes, part, (experts, blocks)) for part in range(num_parts)]
    placed = tuple(part for part in parts if part is not None)
    return EncodedPlaces(parts=placed, group=codes.group, zero=codes.zero, inputs=inputs) if len(placed) == num_parts else None


def _codes(piece: Piece) -> MatrixCodes | None:
    encoding = piece.tensor.encoding
    return None if encoding is None else encoding.format.matrix_codes(encoding)


def _is_whole(piece: Piece, inputs: int, *, columns_first: bool) -> bool:
    """Return whether a piece of a parameter is whole stored matrices, whose codes run along the parameter's inputs."""
    encoding = piece.tensor.encoding
    assert encoding is not None
    across, along = (2, 1) if columns_first else (1, 2)  # the dimensions of outputs and of inputs
    stored = encoding.shape[:-3:-1] if encoding.columns_first else encoding.shape[-2:]  # (outputs, inputs)
    in_order = piece.is_contiguous if encoding.columns_first or not columns_first else piece.turned().is_contiguous
    apart = len(encoding.shape) == 3 and all(part.rows == 1 for part in encoding.parts)
    return (
        in_order and piece.every == 1 and piece.start[along] == 0 and stored == (piece.shape[across], inputs)
        and piece.shape[along] == inputs and piece.first % math.prod(encoding.shape[-2:]) == 0
        and (apart or (len(encoding.shape) == 2 and piece.shape[0] == 1)) and (columns_first or not encoding.columns_first)
    )  # fmt: skip


def _matrices(piece: Piece, codes: MatrixCodes, positions: Sequence[int], *, columns_first: bool) -> Iterator[tuple[Key, list[int]]]:
    """Yield the matrices of a piece, with the position of each of their parts."""
    sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in codes.parts]
    block = piece.start[2 if columns_first else 1] // codes.parts[0][1][0]
    for number in range(piece.shape[0]):
        yield (piece.start[0] + number, block), [position + number * size for position, size in zip(positions, sizes, strict=True)]


def _placed(at: dict[Key, int], codes: MatrixCodes, part: int, grid: Key) -> PlacedPart | None:
    """Return where a part of all matrices lies; None if they do not lie at equal distances."""
    dtype, shape = codes.parts[part]
    first = at[0, 0]
    strides = at.get((1, 0), first) - first, at.get((0, 1), first) - first
    if min(strides) < 0 or any(number % dtype.itemsize for number in (first, *strides)):
        return None
    if any(position != first + expert * strides[0] + block * strides[1] for (expert, block), position in at.items()):
        return None
    return PlacedPart(dtype=dtype, position=first, shape=(*grid, *shape), strides=strides)
