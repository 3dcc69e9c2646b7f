"""The byte ring against a model: a list of live intervals."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen.base.ring import ByteRing, Slot
from flexgen.errors import EngineError

CAPACITY = 100


@given(st.lists(st.one_of(st.integers(1, CAPACITY), st.floats(0, 0.999)), max_size=60))
def test_slots_never_overlap_and_room_comes_back_in_order(steps):
    """An integer takes that many bytes; a fraction releases the live slot at that place."""
    ring = ByteRing(CAPACITY)
    unreleased: list[Slot] = []
    held: list[Slot] = []  # as the ring must see it: a released slot keeps its bytes until every older one is released
    for step in steps:
        if isinstance(step, int):
            slot = ring.take(step)
            if slot is None:
                assert held, "an empty ring has room for everything up to its capacity"
                continue
            assert slot.size == step
            assert 0 <= slot.offset <= slot.offset + step <= CAPACITY
            assert all(slot.offset + step <= old.offset or old.offset + old.size <= slot.offset for old in held)
            unreleased.append(slot)
            held.append(slot)
        elif unreleased:
            ring.give_back(unreleased.pop(int(step * len(unreleased))))
            while held and held[0].released:
                held.pop(0)
        assert len(ring) == len(held)


@given(st.integers(1, CAPACITY), st.lists(st.integers(1, CAPACITY), min_size=1, max_size=20))
def test_a_slot_fits_once_all_older_ones_are_released(first, sizes):
    ring = ByteRing(CAPACITY)
    last = ring.take(first)
    for size in sizes:
        slot = ring.take(size)
        assert last is not None
        ring.give_back(last)
        last = slot or ring.take(size)
        assert last is not None
        assert last.size == size


def test_half_a_ring_is_always_one_ahead():
    """Slots of at most half the capacity: while one is in use, the next one fits (the prefetch never stalls)."""
    ring = ByteRing(CAPACITY)
    last = ring.take(50)
    for size in [50, 30, 50, 1, 49, 50, 20, 50] * 4:
        following = ring.take(size)
        if following is None:  # the end of the buffer was skipped
            assert last is not None
            ring.give_back(last)
            following, last = ring.take(size), None
        assert following is not None
        if last is not None:
            ring.give_back(last)
        last = following


def test_what_can_never_fit_is_an_error():
    with pytest.raises(EngineError, match="101 bytes cannot fit a ring of 100"):
        ByteRing(CAPACITY).take(101)


def test_released_twice():
    ring = ByteRing(CAPACITY)
    slot = ring.take(10)
    assert slot is not None
    ring.give_back(slot)
    with pytest.raises(EngineError, match="twice"):
        ring.give_back(slot)
