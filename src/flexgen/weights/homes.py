"""Memory for units whose home is host memory beside a device, taken from the device in few large pieces."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from flexgen.base.quantities import GIB

PIECE_BYTES = 4 * GIB


def allocate_homes(
    sizes: Mapping[int, int], allocate: Callable[[int], torch.Tensor], piece_bytes: int = PIECE_BYTES
) -> dict[int, torch.Tensor]:
    """Return memory for units, by their index.

    A device pins each piece with one call, and in huge pages, which takes longer for each unit by itself.

    Args:
        sizes: The bytes of each unit, by its index.
        allocate: A function that returns uint8 memory of a given size.
        piece_bytes: The most bytes to ask for at a time; a larger unit has a piece of its own.
    """
    memory: dict[int, torch.Tensor] = {}
    piece: dict[int, int] = {}
    room = 0

    def take() -> None:
        memory.update(zip(piece, allocate(sum(piece.values())).split(list(piece.values())), strict=True))
        piece.clear()

    for unit, size in sizes.items():
        if piece and size > room:
            take()
        room = (room if piece else piece_bytes) - size
        piece[unit] = size
    if piece:
        take()
    return memory
