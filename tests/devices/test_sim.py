"""Copies of the simulated device run when it suits them, within what events and markers allow."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from flexgen.devices import sim as module
from flexgen.devices.base import POISON
from flexgen.devices.sim import SimulatedDevice
from flexgen.errors import CapacityError, EngineError

SIZE = 64


@pytest.fixture
def sim(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedDevice]:
    """As late as can be."""
    monkeypatch.setattr(module, "EARLY", 0.0)
    device = SimulatedDevice(1 << 20, max_delay_seconds=0)
    yield device
    device.close()


def source(value: int) -> torch.Tensor:
    return torch.full((SIZE,), value, dtype=torch.uint8)


def test_a_destination_holds_poison_until_computing_waits(sim: SimulatedDevice) -> None:
    arena = sim.allocate(SIZE)
    event = sim.copy_in(arena, source(3))
    assert arena.tolist() == [POISON] * SIZE
    sim.await_in(event)
    assert arena.tolist() == [3] * SIZE


def test_a_host_destination_holds_poison_until_its_event(sim: SimulatedDevice) -> None:
    arena, result = sim.allocate(SIZE), source(0)
    arena.fill_(5)
    event = sim.copy_out(result, arena)
    assert result.tolist() == [POISON] * SIZE
    event.wait()
    assert event.done()
    assert result.tolist() == [5] * SIZE


def test_asking_is_enough_in_the_end(sim: SimulatedDevice) -> None:
    arena = sim.allocate(SIZE)
    event = sim.copy_in(arena, source(3))
    answers = [event.done() for _ in range(50)]
    assert answers == sorted(answers)
    assert answers[-1]


def test_a_source_that_is_used_again_too_early_shows(sim: SimulatedDevice) -> None:
    arena, slot = sim.allocate(SIZE), source(3)
    event = sim.copy_in(arena, slot)
    slot.fill_(4)  # the next unit
    sim.await_in(event)
    assert arena.tolist() != [3] * SIZE


def test_a_source_that_is_used_again_before_the_host_knows_is_refused(sim: SimulatedDevice) -> None:
    """Computing waits for the copy; the host does not know when that was."""
    slot = source(3)
    event = sim.copy_in(sim.allocate(SIZE), slot)
    sim.await_in(event)
    slot.fill_(4)
    with pytest.raises(EngineError, match="source of a copy"):
        event.wait()


def test_a_source_may_be_used_again_after_a_synchronisation(sim: SimulatedDevice) -> None:
    arena, slot = sim.allocate(SIZE), source(3)
    event = sim.copy_in(arena, slot)
    sim.await_in(event)
    assert arena.sum().item() == 3 * SIZE  # the host waits for computing, which waited for the copy
    slot.fill_(4)
    event.wait()


def test_a_copy_over_what_computing_uses_needs_a_marker(sim: SimulatedDevice) -> None:
    arena = sim.allocate(2 * SIZE)
    before = sim.marker()
    used = arena[:SIZE] + 1
    with pytest.raises(EngineError, match="later marker"):
        sim.copy_in(arena[:SIZE], source(3))
    with pytest.raises(EngineError, match="later marker"):
        sim.copy_in(arena[:SIZE], source(3), before)
    sim.copy_in(arena[SIZE:], source(3), before)
    sim.copy_in(arena[:SIZE], source(3), sim.marker())
    del used


def test_waiting_for_a_result_is_as_good_as_a_marker(sim: SimulatedDevice) -> None:
    arena, result = sim.allocate(SIZE), source(0)
    sim.copy_out(result, arena + 1).wait()
    sim.copy_in(arena, source(3))


def test_memory_of_the_allocator_needs_a_marker(sim: SimulatedDevice) -> None:
    """Computing may have used it a moment ago, for what is freed already."""
    destination = torch.empty(SIZE, dtype=torch.uint8, device=sim.device)
    with pytest.raises(EngineError, match="needs a marker"):
        sim.copy_in(destination, source(3))
    sim.copy_in(destination, source(3), sim.marker()).wait()
    assert destination.tolist() == [3] * SIZE


def test_a_direction_keeps_its_order_and_directions_do_not_wait_for_each_other() -> None:
    orders = set()
    for seed in range(20):
        sim = SimulatedDevice(1 << 20, seed=seed, max_delay_seconds=0)
        arenas, results = [sim.allocate(SIZE) for _ in range(4)], [source(0) for _ in range(4)]
        ins = [sim.copy_in(arena, source(3)) for arena in arenas[:2]]
        outs = [sim.copy_out(result, arena) for result, arena in zip(results[:2], arenas[2:], strict=True)]
        ran = [[each.copied is not None for each in events] for events in (ins, outs)]
        assert all(each == sorted(each, reverse=True) for each in ran), "the first comes first"
        orders.add(str(ran))
        sim.close()
    assert len(orders) > 2


def test_closing_completes_all_copies(sim: SimulatedDevice) -> None:
    result = source(0)
    arena = sim.allocate(SIZE)
    sim.copy_out(result, arena.fill_(5))
    sim.close()
    assert result.tolist() == [5] * SIZE


def test_arenas_stay_within_the_budget(sim: SimulatedDevice) -> None:
    sim.allocate(1 << 19)
    with pytest.raises(CapacityError, match="raise device_mem, or move a share of weights= or of kv= to the host"):
        sim.allocate((1 << 19) + 1)
    assert sim.used_bytes == 1 << 19


def test_host_memory_begins_at_a_page(sim: SimulatedDevice) -> None:
    assert all(sim.allocate_host(size).data_ptr() % 4096 == 0 for size in (1, 5000, 1 << 20))
