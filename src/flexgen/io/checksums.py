"""Sums of what blocks of a file held when they were last written or first read, to notice a later read that brings something else."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BLOCK_BYTES = 4096
BYTES_PER_BLOCK = 9  # of memory


class BlockSums:
    """A sum of each 4 KiB block of a file; any single flipped bit changes it.

    Blocks that are moved in part are neither noted nor checked; the last block may be short.  Different threads may use different
    blocks at the same time.

    Args:
        size_bytes: Size of the file.
        known: Whether the file is new and reads as zeros.
    """

    def __init__(self, size_bytes: int, *, known: bool = False) -> None:
        self._size_bytes = size_bytes
        count = -(-size_bytes // BLOCK_BYTES)
        self._sums = np.zeros(count, dtype=np.uint64)
        self._known = np.full(count, known)

    def note(self, view: memoryview, offset: int) -> None:
        """Remember the sums of what was just written from `offset` on."""
        start, sums = self._summed(view, offset)
        stop = start + len(sums)
        self._sums[start:stop], self._known[start:stop] = sums, True
        end = offset + len(view)
        if offset % BLOCK_BYTES:
            self._known[offset // BLOCK_BYTES] = False
        if end % BLOCK_BYTES and end != self._size_bytes:
            self._known[end // BLOCK_BYTES] = False

    def agree(self, view: memoryview, offset: int) -> bool:
        """Return whether what was just read is what was there before.  Blocks that are seen for the first time are remembered."""
        start, sums = self._summed(view, offset)
        places = slice(start, start + len(sums))
        known = self._known[places]
        same = bool(np.array_equal(sums[known], self._sums[places][known]))
        if same and not known.all():
            self._sums[places], self._known[places] = sums, True
        return same

    def _summed(self, view: memoryview, offset: int) -> tuple[int, npt.NDArray[np.uint64]]:
        """Return the number of the first whole block in the view, and the sums of all whole blocks."""
        view = view[-offset % BLOCK_BYTES :]
        start, count = -(-offset // BLOCK_BYTES), len(view) // BLOCK_BYTES
        whole = view[: count * BLOCK_BYTES]
        sums = np.frombuffer(whole, dtype=np.uint64).reshape(count, BLOCK_BYTES // 8).sum(axis=1, dtype=np.uint64)
        tail = view[count * BLOCK_BYTES :]
        if len(tail) and (start + count) * BLOCK_BYTES + len(tail) == self._size_bytes:
            sums = np.append(sums, np.frombuffer(bytes(tail) + bytes(-len(tail) % 8), dtype=np.uint64).sum(dtype=np.uint64))
        return start, sums
