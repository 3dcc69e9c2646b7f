"""Copies of the simulated device run when it suits them, within what events and markers allow."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from flexgen.devices import sim as module
from flexgen.devices.base import POISON
from flexgen.devices.sim import SimEvent, SimulatedDevice
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
    sim.copy_out(result, computed := arena + 1).wait()
    sim.copy_in(arena, source(3))
    del computed


def test_a_marker_that_the_host_has_seen_is_needed_no_more(sim: SimulatedDevice) -> None:
    arena = sim.allocate(SIZE)
    used = arena + 1
    marker = sim.marker()
    with pytest.raises(EngineError, match="later marker"):
        sim.copy_in_urgently(arena, source(3))
    assert any(marker.done() for _ in range(50))
    sim.copy_in_urgently(arena, source(3))
    used = arena + 1
    sim.marker().wait()
    sim.copy_in(arena, source(3))
    del used


@pytest.mark.parametrize("copy", [SimulatedDevice.copy_in, SimulatedDevice.copy_in_urgently])
def test_copies_in_end_in_arenas(sim: SimulatedDevice, copy: Callable[..., SimEvent]) -> None:
    """Computing may have used other memory a moment ago, for what is freed already."""
    with pytest.raises(EngineError, match="end in arenas"):
        copy(sim, torch.empty(SIZE, dtype=torch.uint8, device=sim.device), source(3))


def test_the_source_of_a_copy_out_is_kept(sim: SimulatedDevice) -> None:
    """Freed memory is used again by what is computed next."""
    computed, result = sim.allocate(SIZE) + 1, source(0)
    event = sim.copy_out(result, computed)
    del computed
    with pytest.raises(EngineError, match="was freed before"):
        event.wait()


def test_streams_keep_their_order_and_do_not_wait_for_each_other() -> None:
    orders = set()
    for seed in range(20):
        sim = SimulatedDevice(1 << 20, seed=seed, max_delay_seconds=0)
        arenas, results = [sim.allocate(SIZE) for _ in range(6)], [source(0) for _ in range(2)]
        events = [
            [sim.copy_in(arena, source(3)) for arena in arenas[:2]],
            [sim.copy_in_urgently(arena, source(3)) for arena in arenas[2:4]],
            [sim.copy_out(result, arena) for result, arena in zip(results, arenas[4:], strict=True)],
        ]
        ran = [[each.copied is not None for each in stream] for stream in events]
        assert all(each == sorted(each, reverse=True) for each in ran), "the first comes first"
        orders.add(str(ran))
        sim.close()
    assert len(orders) > 4


class Gate:
    """Holds a thread that waits for a chunk until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened, really = threading.Event(), threading.Event(), SimEvent.wait

        def wait(event: SimEvent) -> None:
            if threading.current_thread() is not threading.main_thread():
                self.reached.set()
                assert self.opened.wait(20)
            really(event)

        monkeypatch.setattr(SimEvent, "wait", wait)


def test_an_urgent_copy_overtakes_a_bulk_copy(sim: SimulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the thread that feeds the chunks sleeps: the urgent one is submitted last and complete first, and both events are right."""
    gate, size = Gate(monkeypatch), 4 * module.OUTSTANDING_BYTES
    large, small = sim.allocate(size), sim.allocate(SIZE)
    weights = torch.arange(size, dtype=torch.int64).to(torch.uint8)
    events: list[SimEvent] = []
    link = threading.Thread(target=lambda: events.append(sim.copy_in(large, weights)))
    link.start()
    assert gate.reached.wait(20)
    urgent = sim.copy_in_urgently(small, source(7))
    sim.await_in(urgent)
    assert small.tolist() == [7] * SIZE
    urgent.wait()
    assert urgent.done()
    assert not events, "the bulk copy is not even submitted whole"
    assert large[-SIZE:].tolist() == [POISON] * SIZE
    gate.opened.set()
    link.join(20)
    (bulk,) = events
    assert not torch.equal(large.cpu(), weights), "its last chunks are outstanding"
    sim.await_in(bulk)
    assert torch.equal(large.cpu(), weights)


def test_closing_completes_a_bulk_copy_of_which_chunks_are_outstanding(sim: SimulatedDevice) -> None:
    arena, weights = sim.allocate(1 << 19), torch.ones(1 << 19, dtype=torch.uint8)
    event = sim.copy_in(arena, weights)
    assert not event.settled
    sim.close()
    assert event.done()
    assert bool((arena.raw == 1).all())


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
