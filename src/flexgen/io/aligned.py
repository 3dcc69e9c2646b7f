"""Memory and byte ranges aligned to pages, as direct I/O needs them."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flexgen.base.quantities import align_up

ALIGNMENT = 4096
HUGE_PAGE = 2 << 20
SMALLEST_HUGE_BYTES = 4 * HUGE_PAGE
SMALLEST_APART_BYTES = 1 << 20


class AlignedBuffer:
    """Page-aligned anonymous host memory, as a uint8 tensor and as a memoryview.

    Large buffers ask for huge pages: a direct read then pins and maps 512 times fewer pages, which is most of its CPU time.
    The memory goes back when the last view of it is gone.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = max(align_up(size_bytes, ALIGNMENT), ALIGNMENT)
        huge = self.size_bytes >= SMALLEST_HUGE_BYTES
        self._map = mmap.mmap(-1, self.size_bytes + (HUGE_PAGE if huge else 0), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = 0
        if huge:
            start = -torch.frombuffer(self._map, dtype=torch.uint8, count=1).data_ptr() % HUGE_PAGE
            with contextlib.suppress(OSError):  # a kernel without huge pages
                self._map.madvise(mmap.MADV_HUGEPAGE, start, self.size_bytes - self.size_bytes % HUGE_PAGE)
        self.view = memoryview(self._map)[start : start + self.size_bytes]
        self.tensor = torch.frombuffer(self.view, dtype=torch.uint8)


def allocate_memory(size_bytes: int) -> torch.Tensor:
    """Return host memory that is kept for long, uint8 (size_bytes,).

    From 1 MiB on it is apart from the heap, in which it would lie between tensors that come and go, and leave gaps.
    """
    if size_bytes < SMALLEST_APART_BYTES:
        return torch.empty(size_bytes, dtype=torch.uint8)
    return AlignedBuffer(size_bytes).tensor[:size_bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """A byte range of a file, aligned at both ends, and its place in a staging buffer.

    Attributes:
        path: The file.
        offset: Offset of the first byte in the file.
        size: Number of bytes.
        position: Offset of the first byte in the staging buffer.
    """

    path: Path
    offset: int
    size: int
    position: int


def plan_extents(ranges: Sequence[tuple[Path, int, int]], max_gap: int = 128 << 10) -> tuple[list[Extent], list[int], int]:
    """Plan aligned reads that cover byte ranges of files.

    Args:
        ranges: (path, offset, size) of each range as stored; they need not be aligned or sorted.
        max_gap: Most bytes that are read without need rather than starting a new extent.

    Returns:
        The extents, the position of each range within the staging buffer, and the size of the staging buffer.
    """
    order = sorted(range(len(ranges)), key=lambda index: (str(ranges[index][0]), ranges[index][1]))
    extents: list[Extent] = []
    positions = [0] * len(ranges)
    total = 0
    for index in order:
        path, offset, size = ranges[index]
        start, stop = offset - offset % ALIGNMENT, align_up(offset + size, ALIGNMENT)
        last = extents[-1] if extents else None
        if last is not None and last.path == path and start <= last.offset + last.size + max_gap:
            grown = max(last.offset + last.size, stop) - last.offset
            extents[-1] = Extent(path=path, offset=last.offset, size=grown, position=last.position)
            total = last.position + grown
        else:
            extents.append(Extent(path=path, offset=start, size=stop - start, position=total))
            total += stop - start
        positions[index] = extents[-1].position + offset - extents[-1].offset
    return extents, positions, total
