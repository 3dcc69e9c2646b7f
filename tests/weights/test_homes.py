"""Memory of units in host memory beside a device."""

from __future__ import annotations

import torch

from flexgen.weights.homes import allocate_homes


def test_units_share_pieces_up_to_a_size() -> None:
    """Each lies wholly in one piece, since a copy must not reach over the border of two."""
    asked: list[torch.Tensor] = []

    def allocate(size_bytes: int) -> torch.Tensor:
        asked.append(torch.zeros(size_bytes, dtype=torch.uint8))
        return asked[-1]

    sizes = {7: 30, 1: 60, 2: 10, 3: 1, 4: 250, 5: 40, 6: 60}
    memory = allocate_homes(sizes, allocate, piece_bytes=100)
    assert [piece.nbytes for piece in asked] == [100, 1, 250, 100]
    assert {unit: each.nbytes for unit, each in memory.items()} == sizes
    for unit, each in memory.items():
        each.fill_(unit)
    assert [piece.unique_consecutive().tolist() for piece in asked] == [[7, 1, 2], [3], [4], [5, 6]], "none overlaps another"


def test_no_units_need_no_memory() -> None:
    assert allocate_homes({}, torch.empty) == {}
