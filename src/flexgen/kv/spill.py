"""The spill files: pages of KV on disk.

The pages of one layer are stored together, and those of a sequence in runs, so that reads are large.  Pages in a low-bit format are padded
to what direct I/O moves, with keys and values in one piece.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from flexgen.io.aligned import AlignedBuffer
from flexgen.io.direct_io import ALIGNMENT, File
from flexgen.io.pool import Ticket
from flexgen.kv.pages import KVGroup, PageMemory, Pool, layer_pages, of_positions, on_disk, with_tail
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
        self._planes = [(each.view(-1).numpy().data, each.shape[2]) for each in self.memory.planes]

    def bytes_of(self, start: int, count: int) -> list[memoryview]:
        """Return the memory of each plane in `count` slots starting at `start`."""
        return [view[start * size : (start + count) * size] for view, size in self._planes]


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
    """Pages in spill files, one for each group, which hold for each layer the key pages and then the value pages, or both in one.

    Args:
        groups: The layer groups, in any layout.
        num_pages: The number of pages of each group.
        folder: The folder of the files, which are unlinked immediately.
        tail_bytes: The memory for pages that are not full yet.
        verify: Whether to compare the bytes that are read with those that were written.
    """

    def __init__(
        self, groups: Sequence[KVGroup], num_pages: Sequence[int], folder: Path, *, tail_bytes: int = 0, verify: bool = False
    ) -> None:
        super().__init__(on_disk(groups), num_pages, reserves_ahead=[True] * len(groups))  # so that reads are large
        self.tails = Tails(self.groups, tail_bytes)
        odd = [size for group in of_positions(self.groups) for size in group.plane_bytes if size % ALIGNMENT]
        if odd:
            logger.warning("KV pages of %d bytes go through the page cache, which is slower: no multiple of %d is near", odd[0], ALIGNMENT)
        self.files: list[File] = []
        with contextlib.ExitStack() as undo:
            for index, (group, count) in enumerate(zip(self.groups, num_pages, strict=True)):
                path = folder / f"kv-{os.getpid()}-{id(self):x}-{index}.spill"
                direct = not any(size % ALIGNMENT for size in group.plane_bytes)
                file = File(path, flags=NEW_FILE, direct=direct, unlinked=True, verify=verify)
                undo.callback(file.close)
                file.truncate(count * group.page_bytes)
                self.files.append(file)
            undo.pop_all()

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
        layout, count, file = self.groups[staged.index], self.num_pages[staged.index], self.files[staged.index]
        sizes = layout.plane_bytes
        begin = place * count * sum(sizes)
        begins = [begin + count * sum(sizes[:plane]) for plane in range(len(sizes))]
        return [
            (file, first + start.page * size, memory)
            for start, length in _runs(pages)
            for first, size, memory in zip(begins, sizes, staged.bytes_of(start.slot, length), strict=True)
        ]

    def close(self) -> None:
        for file in self.files:
            file.close()


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
