"""Reused memory for decoding, a piece for each unit that is decoded."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

from flexgen.devices.base import POISON


class ScratchPool:
    """Reused memory for decoding, a piece for each unit that is decoded; newly allocated pages would cause page faults in every pass.

    Args:
        size_bytes: The size of a piece.
        pieces: The most pieces that there may be.
        allocate: A function that returns uint8 memory of a given size where computing happens.
        poison: Whether to overwrite pieces that are given back, so that a late use is noticed (for tests).
    """

    def __init__(self, size_bytes: int, pieces: int, allocate: Callable[[int], torch.Tensor], *, poison: bool = False) -> None:
        self._size_bytes, self._pieces, self._allocate, self._poison = size_bytes, pieces, allocate, poison
        self._free: list[torch.Tensor] = []
        self._taken: dict[int, torch.Tensor] = {}  # by unit

    @property
    def has_room(self) -> bool:
        """Whether one more unit may be decoded, by the memory that is accounted for."""
        return len(self._taken) < self._pieces

    @property
    def units(self) -> Collection[int]:
        """The units that have a piece."""
        return self._taken.keys()

    def of(self, unit: int) -> torch.Tensor:
        """Return the piece of a unit, which it is given now if it has none."""
        if unit not in self._taken:
            self._taken[unit] = self._free.pop() if self._free else self._allocate(self._size_bytes)
        return self._taken[unit]

    def give_back(self, unit: int) -> None:
        """Take the piece of a unit back, if it has one."""
        piece = self._taken.pop(unit, None)
        if piece is not None:
            if self._poison:
                piece.fill_(POISON)
            self._free.append(piece)
