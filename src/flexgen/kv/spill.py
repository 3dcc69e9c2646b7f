"""The spill file: pages of KV on disk.

The pages of one layer are stored together, and those of a sequence in runs, so that reads are large.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from flexgen.io.aligned import AlignedBuffer
from flexgen.io.direct_io import ALIGNMENT, File
from flexgen.io.pool import Ticket
from flexgen.kv.pages import KVGroup, PageMemory, Pool, layer_pages, with_tail
from flexgen.kv.slots import StagedPage
from flexgen.kv.tails import Tails

logger = logging.getLogger(__name__)

NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW


class StagedGroup:
    """The pages of one layer in one layer group, for one micro-batch, in host memory.

    Attributes:
        index: The index of the group.
        memory: The bytes of the pages.
    """

    def __init__(self, index: int, group: KVGroup, num_slots: int) -> None:
        self.index = index
        self.memory = PageMemory(group, 1, num_slots, lambda size: AlignedBuffer(size).tensor)
        self._views = tuple(each.view(-1).numpy().data for each in (self.memory.keys, self.memory.values))

    def bytes_of(self, start: int, count: int) -> tuple[memoryview, memoryview]:
        """Return the memory of the keys and of the values in `count` slots starting at `start`."""
        sizes = self.memory.keys.shape[2], self.memory.values.shape[2]
        keys, values = (view[start * size : (start + count) * size] for view, size in zip(self._views, sizes, strict=True))
        return keys, values


class StagedLayer:
    """The pages of one layer for one micro-batch, in host memory.

    Args:
        groups: The layer groups.
        index: The index of the layer's group.
        num_slots: The number of slots of each group.

    Attributes:
        groups: The pages in the layer's group, and the tails of these, if it has tails.
        pages: The pages as their format reads them.
        ticket: The read that fills them.
    """

    def __init__(self, groups: Sequence[KVGroup], index: int, num_slots: Sequence[int]) -> None:
        self.groups = [StagedGroup(each, groups[each], num_slots[each]) for each in with_tail(groups, index)]
        self.pages = layer_pages([each.memory for each in self.groups], 0)
        self.ticket: Ticket | None = None


class DiskPool(Pool):
    """Pages in a spill file, which holds for each group and layer the key pages and then the value pages.

    Args:
        groups: The layer groups.
        num_pages: The number of pages of each group.
        folder: The folder of the file, which is unlinked immediately.
        tail_bytes: The memory for pages that are not full yet.
        verify: Whether to compare the bytes that are read with those that were written.
    """

    def __init__(
        self, groups: Sequence[KVGroup], num_pages: Sequence[int], folder: Path, *, tail_bytes: int = 0, verify: bool = False
    ) -> None:
        super().__init__(groups, num_pages)
        self.tails = Tails(groups, tail_bytes)
        odd = [size for group in groups for size in (group.key_page_bytes, group.value_page_bytes) if size % ALIGNMENT]
        if odd:
            logger.warning("KV pages of %d bytes are no multiple of %d: they go through the page cache, which is slower", odd[0], ALIGNMENT)
        path = folder / f"kv-{os.getpid()}-{id(self):x}.spill"
        self.file = File(path, flags=NEW_FILE, direct=not odd, unlinked=True, verify=verify)
        self._bases: list[int] = []
        total = 0
        for group, count in zip(groups, num_pages, strict=True):
            self._bases.append(total)
            total += count * group.page_bytes
        self.file.truncate(total)

    def give_back(self, group: int, pages: Sequence[int]) -> None:
        self.tails.forget(group, pages)
        super().give_back(group, pages)

    def parts(self, place: int, staged: StagedLayer, pages: Sequence[Sequence[StagedPage]]) -> list[tuple[File, int, memoryview]]:
        """Return ranges of the file and the memory for them, for some pages of a layer; ranges that are adjacent in both are merged.

        Args:
            place: The index of the layer within its group.
            staged: The memory.
            pages: For each layer group, the pages and their slots.
        """
        return [part for each in staged.groups for part in self._parts(place, each, pages[each.index])]

    def _parts(self, place: int, staged: StagedGroup, pages: Sequence[StagedPage]) -> list[tuple[File, int, memoryview]]:
        group = staged.index
        layout, count = self.groups[group], self.num_pages[group]
        key_bytes, value_bytes = layout.key_page_bytes, layout.value_page_bytes
        first_key = self._bases[group] + place * count * (key_bytes + value_bytes)
        first_value = first_key + count * key_bytes
        parts = []
        for start, length in _runs(pages):
            keys, values = staged.bytes_of(start.slot, length)
            parts.append((self.file, first_key + start.page * key_bytes, keys))
            parts.append((self.file, first_value + start.page * value_bytes, values))
        return parts

    def close(self) -> None:
        self.file.close()


def _runs(pages: Sequence[StagedPage]) -> list[tuple[StagedPage, int]]:
    """Return (first page, count) for runs that are consecutive both in the file and in staging."""
    runs: list[tuple[StagedPage, int]] = []
    for each in pages:
        if runs:
            first, count = runs[-1]
            if each.page == first.page + count and each.slot == first.slot + count:
                runs[-1] = (first, count + 1)
                continue
        runs.append((each, 1))
    return runs
