"""The last pages of sequences whose KV is on disk, kept in memory until they are full: so each page is written once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from flexgen.kv.cache import KVGroup

Moves = tuple[torch.Tensor, torch.Tensor]  # (rows of staging, slots here)


class Tails:
    """A slot per sequence, as many as the memory holds.  What has none is written with every new token.

    Slots are taken and forgotten by the thread that plans passes; between those, a worker moves bytes.

    Args:
        num_bytes: of memory for them, over all layers.
    """

    def __init__(self, groups: Sequence[KVGroup], num_bytes: int) -> None:
        count = num_bytes // max(sum(group.page_bytes for group in groups), 1)
        # (layers, slots, bytes of a page) per group
        self._keys = [torch.empty(len(group.layers), count, group.key_page_bytes, dtype=torch.uint8) for group in groups]
        self._values = [torch.empty(len(group.layers), count, group.value_page_bytes, dtype=torch.uint8) for group in groups]
        self._free = [list(range(count)) for _ in groups]
        self._slots: list[dict[int, int]] = [{} for _ in groups]  # page -> slot

    def slot(self, group: int, page: int) -> int | None:
        """Where the page is, if it is here and not on disk."""
        return self._slots[group].get(page)

    def keep(self, group: int, page: int) -> int | None:
        """A slot for the page, its own if it has one; None where there is none left."""
        slots, free = self._slots[group], self._free[group]
        if page not in slots and free:
            slots[page] = free.pop()
        return slots.get(page)

    def forget(self, group: int, pages: Iterable[int]) -> None:
        """These pages are on disk now, or wanted no longer."""
        for page in pages:
            if (slot := self._slots[group].pop(page, None)) is not None:
                self._free[group].append(slot)

    def load(self, group: int, layer: int, keys: torch.Tensor, values: torch.Tensor, moves: Moves) -> None:
        """Copy slots to rows of staging.

        Args:
            layer: place within the group. keys, values: (rows, bytes of a page).
        """
        rows, slots = moves
        if len(rows):
            keys.index_copy_(0, rows, self._keys[group][layer].index_select(0, slots))
            values.index_copy_(0, rows, self._values[group][layer].index_select(0, slots))

    def store(self, group: int, layer: int, keys: torch.Tensor, values: torch.Tensor, moves: Moves) -> None:
        """Copy rows of staging to slots; arguments as of `load`."""
        rows, slots = moves
        if len(rows):
            self._keys[group][layer].index_copy_(0, slots, keys.index_select(0, rows))
            self._values[group][layer].index_copy_(0, slots, values.index_select(0, rows))
