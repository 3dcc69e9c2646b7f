"""A ring buffer of bytes: slots are allocated in order and may be released in any order."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from flexgen.errors import EngineError


@dataclass(slots=True, eq=False)
class Slot:
    """A slot of `size` contiguous bytes at `offset`."""

    offset: int
    size: int
    released: bool = False


class ByteRing:
    """The allocation of a ring buffer; it holds no memory and is not thread-safe (its owner locks).

    A slot never wraps; if the rest of the buffer is too small for it, the rest is skipped.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._slots: deque[Slot] = deque()
        self._head = 0  # where the next slot would begin

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def used_bytes(self) -> int:
        """The bytes of all slots that are not free again."""
        return sum(slot.size for slot in self._slots)

    def take(self, size_bytes: int) -> Slot | None:
        """Return the next slot, or None while there is no room.

        Raises:
            EngineError: The slot is larger than the ring.
        """
        if size_bytes > self.capacity_bytes:
            raise EngineError(f"a slot of {size_bytes} bytes cannot fit a ring of {self.capacity_bytes}")
        if not self._slots:
            offset = 0
        else:
            tail = self._slots[0].offset
            if self._head > tail:
                offset = self._head if self._head + size_bytes <= self.capacity_bytes else 0
                if offset == 0 and size_bytes > tail:
                    return None
            else:  # wrapped: free bytes lie between head and tail
                if self._head + size_bytes > tail:
                    return None
                offset = self._head
        slot = Slot(offset, size_bytes)
        self._slots.append(slot)
        self._head = offset + size_bytes
        return slot

    def give_back(self, slot: Slot) -> None:
        """Release a slot; its bytes are reused once every older slot is released too."""
        if slot.released:
            raise EngineError("a ring slot was released twice")
        slot.released = True
        while self._slots and self._slots[0].released:
            self._slots.popleft()
