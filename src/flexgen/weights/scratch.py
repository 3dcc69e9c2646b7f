"""Memory into which units are decoded while they are open."""

from __future__ import annotations

from collections.abc import Callable

import torch


class ScratchPool:
    """Reused memory for decoding, a piece for each unit that is open; newly allocated pages would cause page faults in every pass.

    Args:
        size_bytes: The size of a piece.
        pieces: The most pieces that there may be.
        allocate: A function that returns uint8 memory of a given size where computing happens.
    """

    def __init__(self, size_bytes: int, pieces: int, allocate: Callable[[int], torch.Tensor]) -> None:
        self._size_bytes, self._pieces, self._allocate = size_bytes, pieces, allocate
        self._free: list[torch.Tensor] = []
        self._num_taken = 0

    @property
    def has_room(self) -> bool:
        """Whether one more unit may be decoded, by the memory that is accounted for."""
        return self._num_taken < self._pieces

    def take(self) -> torch.Tensor:
        self._num_taken += 1
        return self._free.pop() if self._free else self._allocate(self._size_bytes)

    def give_back(self, scratch: torch.Tensor) -> None:
        self._num_taken -= 1
        self._free.append(scratch)
