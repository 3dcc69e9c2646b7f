"""Slots of staging for a micro-batch whose KV is on disk: which pages are read into them, and where they go afterwards.

A page that several sequences of the micro-batch share has one slot, and is read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from flexgen.kv.pages import KVGroup
from flexgen.kv.tails import Moves, Tails
from flexgen.kv.views import KVSlice


@dataclass(frozen=True, slots=True)
class StagedPage:
    """A page of the spill file and its slot."""

    page: int
    slot: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSlots:
    """The slots of one layer group.

    Attributes:
        pages: All pages of the micro-batch, by slot.
        read: Pages with earlier tokens that are on disk.
        written: Pages that go to disk.
        filled: Page ids of tails that go to disk.
        loaded: Pages that come from the tails.
        kept: Pages that go to the tails.
        tables: The page table of each slice, with slots in place of pages.
    """

    pages: list[StagedPage]
    read: list[StagedPage]
    written: list[StagedPage]
    filled: list[int]
    loaded: Moves
    kept: Moves
    tables: list[list[int]]

    @property
    def num_slots(self) -> int:
        return max(len(self.pages), 1)

    @property
    def stored(self) -> list[StagedPage]:
        """Pages that are on disk once the pass has written."""
        kept = set(self.kept[0].tolist())
        return [each for each in self.pages if each.slot not in kept]


class BatchSlots:
    """The slots of a micro-batch.

    Args:
        groups: The layer groups.
        slices: Of the micro-batch, with tables of pages.
        tails: Where pages are kept that are not full; slots there are taken for those that stay so.

    Attributes:
        groups: The slots of each layer group.
        slices: The slices with tables of slots.
        reads: Whether there are earlier tokens.
    """

    def __init__(self, groups: Sequence[KVGroup], slices: Sequence[KVSlice], tails: Tails) -> None:
        self.groups = [_Builder(index, group, tails).build(slices) for index, group in enumerate(groups)]
        self.slices = [replace(each, tables=[group.tables[n] for group in self.groups]) for n, each in enumerate(slices)]
        self.reads = any(each.start for each in slices)


@dataclass(slots=True)
class _Builder:
    """Gives pages their slots, one after the other."""

    index: int
    group: KVGroup
    tails: Tails
    slots: dict[int, int] = field(default_factory=dict)  # page -> slot
    read: list[StagedPage] = field(default_factory=list)
    written: list[StagedPage] = field(default_factory=list)
    filled: list[int] = field(default_factory=list)
    loaded: list[tuple[int, int]] = field(default_factory=list)
    kept: list[tuple[int, int]] = field(default_factory=list)

    def build(self, slices: Sequence[KVSlice]) -> GroupSlots:
        tables = [self._table(each) for each in slices]
        return GroupSlots(
            pages=[StagedPage(page, slot) for page, slot in self.slots.items()],
            read=self.read, written=self.written, filled=self.filled, loaded=_moves(self.loaded), kept=_moves(self.kept), tables=tables,
        )  # fmt: skip

    def _table(self, each: KVSlice) -> list[int]:
        size, end = self.group.page_tokens, each.start + each.length
        first = min(self.group.geometry.first_visible(each.start), each.start) // size
        stop = self.group.num_pages(end)
        table = [-1] * first
        for position in range(first, stop):
            page = each.tables[self.index][position]
            if page not in self.slots:
                self.slots[page] = len(self.slots)
                begin, behind = position * size, (position + 1) * size
                self._move(page, has_old=begin < each.start, has_new=behind > each.start, is_full=behind <= end)
            table.append(self.slots[page])
        return table

    def _move(self, page: int, *, has_old: bool, has_new: bool, is_full: bool) -> None:
        """Note where a page comes from and where it goes."""
        slot, tail = self.slots[page], self.tails.slot(self.index, page)
        if tail is not None:
            self.loaded.append((slot, tail))
        elif has_old:
            self.read.append(StagedPage(page, slot))
        if not has_new:
            return
        if not is_full and (kept := self.tails.keep(self.index, page)) is not None:
            self.kept.append((slot, kept))
            return
        self.written.append(StagedPage(page, slot))
        if tail is not None:
            self.filled.append(page)


def _moves(pairs: Sequence[tuple[int, int]]) -> Moves:
    rows, slots = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).T
    return rows, slots
