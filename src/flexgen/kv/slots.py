"""Slots of staging for a micro-batch whose KV is on disk: which pages are read into them, and where they are written afterwards.

A page that several sequences of the micro-batch share has one slot, and is read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from flexgen.kv.pages import KVGroup
from flexgen.kv.tails import Moves, Tails
from flexgen.passes.plan import Slice


@dataclass(frozen=True, slots=True)
class StagedPage:
    """A page of the spill file and its slot."""

    page: int
    slot: int


class GroupSlots:
    """The slots of a micro-batch in one layer group.

    Args:
        index: The index of the group.
        group: The group; a page that it stores whole has a slot only once it is complete.
        slices: The slices of the micro-batch.
        tails: The memory of pages that are not full; its slots are reserved for pages that will not be full after this pass.

    Attributes:
        tables: The page table of each slice, with slots in place of pages.
        read: The pages with earlier tokens that are on disk.
        written: The pages that are written to disk.
        filled: The page ids of tails that are written to disk.
        loaded: The pages that are copied from the tails.
        kept: The pages that are copied to the tails.
    """

    def __init__(self, index: int, group: KVGroup, slices: Sequence[Slice], tails: Tails) -> None:
        self._index, self._group, self._tails = index, group, tails
        self._slots: dict[int, int] = {}  # page -> slot
        self.read: list[StagedPage] = []
        self.written: list[StagedPage] = []
        self.filled: list[int] = []
        self._loaded: list[tuple[int, int]] = []
        self._kept: list[tuple[int, int]] = []
        self.tables = [self._table(each) for each in slices]
        self.loaded, self.kept = _moves(self._loaded), _moves(self._kept)

    @property
    def num_slots(self) -> int:
        return max(len(self._slots), 1)

    @property
    def stored(self) -> list[StagedPage]:
        """The pages that are on disk once the pass has written."""
        kept = {slot for slot, _ in self._kept}
        return [StagedPage(page, slot) for page, slot in self._slots.items() if slot not in kept]

    def _table(self, each: Slice) -> list[int]:
        size, end = self._group.page_tokens, each.start + each.length
        if self._group.tail_of is not None:
            return self._tail(each)
        first = min(self._group.geometry.first_visible(each.start), each.start) // size
        stop = self._group.num_pages(end)
        table = [-1] * first
        for position in range(first, stop):
            page = each.tables[self._index][position]
            begin, behind = position * size, (position + 1) * size
            if self._group.stores_whole_pages and behind > end:
                break
            if page not in self._slots:
                self._slots[page] = len(self._slots)
                has_new = behind > each.start
                has_old = begin < each.start and not (has_new and self._group.stores_whole_pages)
                self._move(each.sequence, page, has_old=has_old, has_new=has_new, is_full=behind <= end)
            table.append(self._slots[page])
        return table

    def _tail(self, each: Slice) -> list[int]:
        """Return the table of a tail: one slot."""
        (page,) = each.tables[self._index]
        self._slots[page] = len(self._slots)
        self._move(each.sequence, page, has_old=each.start % self._group.page_tokens > 0, has_new=True, is_full=False)
        return [self._slots[page]]

    def _move(self, sequence: int, page: int, *, has_old: bool, has_new: bool, is_full: bool) -> None:
        """Record where a page of a sequence comes from and where it is stored afterwards."""
        slot, tail = self._slots[page], self._tails.slot(self._index, page)
        if tail is not None:
            self._loaded.append((slot, tail))
        elif has_old:
            self.read.append(StagedPage(page, slot))
        if not has_new:
            return
        if not is_full and (kept := self._tails.keep(self._index, page, sequence)) is not None:
            self._kept.append((slot, kept))
            return
        self.written.append(StagedPage(page, slot))
        if tail is not None:
            self.filled.append(page)


class BatchSlots:
    """The slots of a micro-batch.

    Args:
        groups: The layer groups.
        slices: The slices of the micro-batch, with tables of pages.
        tails: The memory of pages that are not full; its slots are reserved for pages that will not be full after this pass.

    Attributes:
        groups: The slots of each layer group.
        num_slots: The number of slots in each layer group.
        slices: The slices with tables of slots.
        reads: Whether some tokens were stored by earlier passes.
    """

    def __init__(self, groups: Sequence[KVGroup], slices: Sequence[Slice], tails: Tails) -> None:
        self.groups = [GroupSlots(index, group, slices, tails) for index, group in enumerate(groups)]
        self.num_slots = [group.num_slots for group in self.groups]
        self.slices = [replace(each, tables=tuple(tuple(group.tables[n]) for group in self.groups)) for n, each in enumerate(slices)]
        self.reads = any(each.start for each in slices)


def _moves(pairs: Sequence[tuple[int, int]]) -> Moves:
    rows, slots = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).T
    return rows, slots
