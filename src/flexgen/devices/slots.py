"""Memory for copies, in slots that are taken and given back in any order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from flexgen.base.quantities import align_up, power_of_two
from flexgen.devices.base import Event

SLOT_ALIGNMENT = 256
SMALLEST_BLOCK_BYTES = 1 << 16


@dataclass(slots=True, eq=False)
class Slot:
    """A part of a block of memory.

    Attributes:
        block: The index of the block.
        offset: The position in the block.
        memory: The memory, uint8.
        guards: What has to happen before the memory is used again; None while the slot is taken.
    """

    block: int
    offset: int
    memory: torch.Tensor
    guards: Sequence[Event] | None = None

    @property
    def end(self) -> int:
        return self.offset + self.memory.nbytes


class Slots:
    """Memory from which slots are taken.  Thread-safe.

    Whoever takes a slot never waits for another to be given back, which could need the thread that waits: memory grows instead.

    Args:
        allocate: A function that makes uint8 memory of a given size, which is kept for good.
        size_bytes: The bytes to begin with.
    """

    def __init__(self, allocate: Callable[[int], torch.Tensor], size_bytes: int = 0) -> None:
        self._allocate = allocate
        self._lock = threading.Lock()
        self._blocks = [allocate(size_bytes)] if size_bytes else []
        self._slots: list[Slot] = []  # by block and offset; those that are taken, and those whose guards were not seen to have passed

    def take(self, size_bytes: int) -> Slot:
        """Return a slot of at least this size.

        Where all memory is taken or guarded, it waits for guards, which pass without the help of any thread; if not even these leave room,
        there is more memory from then on.

        Raises:
            CapacityError: More memory would exceed the budget that `allocate` keeps.
        """
        size_bytes = align_up(max(size_bytes, 1), SLOT_ALIGNMENT)
        while True:
            with self._lock:
                self._slots = [slot for slot in self._slots if slot.guards is None or not all(guard.done() for guard in slot.guards)]
                slot = self._fitted(size_bytes)
                guarded = next((each for each in self._slots if each.guards is not None), None)
                if slot is None and guarded is None:
                    self._blocks.append(self._allocate(power_of_two(max(size_bytes, SMALLEST_BLOCK_BYTES))))
                    slot = self._fitted(size_bytes)
                if slot is not None:
                    return slot
            assert guarded is not None
            for guard in guarded.guards or ():
                guard.wait()

    def _fitted(self, size_bytes: int) -> Slot | None:
        """Return a slot at the first place where it fits."""
        place = 0
        for block, memory in enumerate(self._blocks):
            offset = 0
            while place < len(self._slots) and self._slots[place].block == block:
                if offset + size_bytes <= self._slots[place].offset:
                    break
                offset = self._slots[place].end
                place += 1
            if offset + size_bytes <= memory.nbytes:
                slot = Slot(block, offset, memory[offset : offset + size_bytes])
                self._slots.insert(place, slot)
                return slot
        return None

    def give_back(self, slot: Slot, *guards: Event) -> None:
        """Allow the memory of a slot to be used again, once all of `guards` have happened."""
        slot.guards = guards
