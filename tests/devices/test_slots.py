"""Slots of memory: none is handed out before all guards of its last use have passed."""

from __future__ import annotations

import random
import threading

import pytest
import torch

from flexgen.devices.slots import SLOT_ALIGNMENT, SMALLEST_BLOCK_BYTES, Slot, Slots
from flexgen.errors import CapacityError


class Guard:
    """Passes when it is told to, or waited for."""

    def __init__(self) -> None:
        self.passed = self.waited = False

    def done(self) -> bool:
        return self.passed

    def wait(self) -> None:
        self.passed = self.waited = True


class Memory:
    """Counts what is allocated."""

    def __init__(self, limit: int = 1 << 30) -> None:
        self.sizes: list[int] = []
        self.limit = limit

    def __call__(self, size_bytes: int) -> torch.Tensor:
        if sum(self.sizes) + size_bytes > self.limit:
            raise CapacityError("too much")
        self.sizes.append(size_bytes)
        return torch.empty(size_bytes, dtype=torch.uint8)


def span(slot: Slot) -> tuple[int, int]:
    return slot.memory.data_ptr(), slot.memory.data_ptr() + slot.memory.nbytes


def overlap(one: Slot, other: Slot) -> bool:
    (begin, end), (first, last) = span(one), span(other)
    return begin < last and first < end


@pytest.mark.parametrize("seed", range(5))
def test_slots_in_use_or_guarded_share_no_bytes(seed: int) -> None:
    choose, memory = random.Random(seed), Memory()
    slots = Slots(memory, 40_000)
    taken: list[Slot] = []
    guarded: list[tuple[Slot, list[Guard]]] = []
    for _ in range(400):
        if taken and choose.random() < 0.5:
            slot = taken.pop(choose.randrange(len(taken)))
            guards = [Guard() for _ in range(choose.randrange(3))]
            slots.give_back(slot, *guards)
            guarded.append((slot, guards))
        elif len(taken) < 12:
            wanted = choose.choice([0, 1, 300, 5000, 9000])
            slot = slots.take(wanted)
            assert slot.memory.nbytes >= wanted
            assert slot.offset % SLOT_ALIGNMENT == 0
            assert not any(overlap(slot, other) for other in taken)
            assert all(guard.passed for other, guards in guarded if overlap(slot, other) for guard in guards)
            taken.append(slot)
        for _, guards in guarded:
            for guard in guards:
                guard.passed |= choose.random() < 0.1
    assert sum(memory.sizes) < 12 * 9000 + 40_000 + SMALLEST_BLOCK_BYTES * 2


def test_memory_that_suffices_never_grows() -> None:
    memory = Memory()
    slots = Slots(memory, 4096)
    for _ in range(50):
        pair = slots.take(2048), slots.take(2000)
        for slot in pair:
            slots.give_back(slot)
    assert memory.sizes == [4096]


def test_it_waits_for_guards_rather_than_growing() -> None:
    memory = Memory()
    slots, guards = Slots(memory, 4096), [Guard(), Guard()]
    pair = slots.take(2048), slots.take(2048)
    for slot, guard in zip(pair, guards, strict=True):
        slots.give_back(slot, guard)
    again = slots.take(2048)
    assert sum(guard.waited for guard in guards) == 1
    assert overlap(again, pair[[guard.waited for guard in guards].index(True)])
    assert memory.sizes == [4096]


def test_what_has_passed_is_not_waited_for() -> None:
    slots, guards = Slots(Memory(), 4096), [Guard(), Guard()]
    first, second = slots.take(2048), slots.take(2048)
    slots.give_back(first, guards[0])
    slots.give_back(second, guards[1])
    guards[1].passed = True
    assert overlap(slots.take(2048), second)
    assert not guards[0].waited


def test_it_grows_where_others_hold_everything() -> None:
    """They may need the thread that takes a slot, which therefore never waits for them."""
    memory = Memory()
    slots = Slots(memory)
    first, second = slots.take(60_000), slots.take(60_000)
    assert not overlap(first, second)
    assert memory.sizes == [1 << 16, 1 << 16]
    assert slots.take(1 << 20).memory.nbytes == 1 << 20
    assert memory.sizes[2:] == [1 << 20]


def test_a_budget_that_is_exceeded_is_said_and_leaves_the_rest_usable() -> None:
    slots = Slots(Memory(limit=4096), 4096)
    slot = slots.take(4096)
    with pytest.raises(CapacityError):
        slots.take(1)
    slots.give_back(slot)
    assert slots.take(4096).memory.nbytes == 4096


def test_threads_take_and_give_back_at_the_same_time() -> None:
    slots, problems = Slots(Memory(), 1 << 16), list[str]()

    def work(number: int) -> None:
        for _ in range(200):
            slot = slots.take(1000)
            slot.memory.fill_(number)
            if not bool((slot.memory == number).all()):
                problems.append(f"thread {number} found the bytes of another")
            slots.give_back(slot)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
