"""The last pages of sequences whose KV is on disk, kept in memory until they are full, so that each page is written once.

Pages of a format that has tails are never here; its tails are, and are not written at all while there is room.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch

from flexgen.io.aligned import allocate_memory
from flexgen.kv.pages import KVGroup, PageMemory

Moves = tuple[torch.Tensor, torch.Tensor]  # (rows of staging, slots of the tails)


class Tails:
    """Slots for unfinished pages, one per sequence for as many sequences as fit; the other pages are written with every new token.

    The thread that plans passes takes and frees slots; while a pass runs, a worker moves the bytes.

    Args:
        groups: The layer groups.
        num_bytes: The memory for tails, over all layers.
    """

    def __init__(self, groups: Sequence[KVGroup], num_bytes: int) -> None:
        count = num_bytes // max(sum(group.page_bytes for group in groups if not group.stores_whole_pages), 1)
        counts = [0 if group.stores_whole_pages else count for group in groups]
        self._memory = [PageMemory(group, len(group.layers), each, allocate_memory) for group, each in zip(groups, counts, strict=True)]
        self._free = [list(range(each)) for each in counts]
        self._slots: list[dict[int, int]] = [{} for _ in groups]  # page -> slot
        self._owners: list[dict[int, int]] = [{} for _ in groups]  # page -> the sequence whose last page it is

    def slot(self, group: int, page: int) -> int | None:
        """Return the slot of a page; None if the page has none."""
        return self._slots[group].get(page)

    def keep(self, group: int, page: int, sequence: int) -> int | None:
        """Return a slot for the last page of a sequence, its own if it has one; None if all are taken."""
        slots, free = self._slots[group], self._free[group]
        if page not in slots and free:
            slots[page] = free.pop()
        if page in slots:
            self._owners[group][page] = sequence
        return slots.get(page)

    def forget(self, group: int, pages: Iterable[int]) -> None:
        """Free the slots of pages that are on disk now, or no longer needed."""
        for page in pages:
            if (slot := self._slots[group].pop(page, None)) is not None:
                del self._owners[group][page]
                self._free[group].append(slot)

    def end(self, sequences: Collection[int]) -> None:
        """Free the slots of sequences whose pages were given back elsewhere."""
        for group, owners in enumerate(self._owners):
            self.forget(group, [page for page, owner in owners.items() if owner in sequences])

    def load(self, group: int, place: int, staging: PageMemory, moves: Moves) -> None:
        """Copy slots to rows of staging.

        Args:
            group: The index of the layer group.
            place: The index of the layer within the group.
            staging: Pages of that layer alone.
            moves: The rows of staging and the slots, in pairs.
        """
        rows, slots = moves
        if len(rows):
            here = self._memory[group]
            staging.keys[0].index_copy_(0, rows, here.keys[place].index_select(0, slots))
            staging.values[0].index_copy_(0, rows, here.values[place].index_select(0, slots))

    def store(self, group: int, place: int, staging: PageMemory, moves: Moves) -> None:
        """Copy rows of staging to slots; the arguments are those of `load`."""
        rows, slots = moves
        if len(rows):
            here = self._memory[group]
            here.keys[place].index_copy_(0, slots, staging.keys[0].index_select(0, rows))
            here.values[place].index_copy_(0, slots, staging.values[0].index_select(0, rows))
