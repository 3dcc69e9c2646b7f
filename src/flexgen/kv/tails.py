"""The last pages of sequences whose KV is on disk, kept in memory until they are full, so that each page is written once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from flexgen.kv.pages import KVGroup, PageMemory, allocate_memory

Moves = tuple[torch.Tensor, torch.Tensor]  # (rows of staging, slots here)


class Tails:
    """A slot per sequence, for as many as the memory holds; the pages of others are written with every new token.

    Slots are taken and forgotten by the thread that plans passes; between those, a worker moves bytes.

    Args:
        groups: The layer groups.
        num_bytes: Memory for tails, over all layers.
    """

    def __init__(self, groups: Sequence[KVGroup], num_bytes: int) -> None:
        count = num_bytes // max(sum(group.page_bytes for group in groups), 1)
        self._memory = [PageMemory(group, len(group.layers), count, allocate_memory) for group in groups]
        self._free = [list(range(count)) for _ in groups]
        self._slots: list[dict[int, int]] = [{} for _ in groups]  # page -> slot

    def slot(self, group: int, page: int) -> int | None:
        """The slot of a page; None when it is not here."""
        return self._slots[group].get(page)

    def keep(self, group: int, page: int) -> int | None:
        """A slot for the page, its own if it has one; None when all are taken."""
        slots, free = self._slots[group], self._free[group]
        if page not in slots and free:
            slots[page] = free.pop()
        return slots.get(page)

    def forget(self, group: int, pages: Iterable[int]) -> None:
        """Free the slots of pages that are on disk now, or no longer needed."""
        for page in pages:
            if (slot := self._slots[group].pop(page, None)) is not None:
                self._free[group].append(slot)

    def load(self, group: int, place: int, staging: PageMemory, moves: Moves) -> None:
        """Copy slots to rows of staging.

        Args:
            group: Index of the layer group.
            place: Of the layer within the group.
            staging: Pages of that layer alone.
            moves: From where to where.
        """
        rows, slots = moves
        if len(rows):
            here = self._memory[group]
            staging.keys[0].index_copy_(0, rows, here.keys[place].index_select(0, slots))
            staging.values[0].index_copy_(0, rows, here.values[place].index_select(0, slots))

    def store(self, group: int, place: int, staging: PageMemory, moves: Moves) -> None:
        """Copy rows of staging to slots; arguments as for `load`."""
        rows, slots = moves
        if len(rows):
            here = self._memory[group]
            here.keys[place].index_copy_(0, slots, staging.keys[0].index_select(0, rows))
            here.values[place].index_copy_(0, slots, staging.values[0].index_select(0, rows))
