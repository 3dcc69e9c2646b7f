"""What is done about measurements that others disturbed."""

from __future__ import annotations

import pytest
from machines import OVERHEADS, machine_of

from flexgen.plan.machine import DiskRequest, Rate, read_machine
from flexgen.profile.repeat import MOST_TIMES, agree, best_of, is_disturbed, settled

QUIET, BUSY = 0.05, 1.4


class Measured:
    """Gives machines in turn, and counts what is told."""

    def __init__(self, *machines):
        self._machines = iter(machines)
        self.num_measured, self.told = 0, []

    def __call__(self):
        self.num_measured += 1
        return next(self._machines)

    def settled(self, *before):
        return settled(self, before, self.told.append)


def machine(rate=1.0, busy=QUIET, **changes):
    return machine_of(disk_read=2e9 * rate, host_memory=30e9 * rate, dense={"bfloat16": [(64, 5e11 * rate)]}, busy_cores=busy, **changes)


def test_a_quiet_measurement_is_taken_as_it_is():
    for before in ([], [machine(0.9)], [machine(1.1)]):
        measured = Measured(machine())
        assert measured.settled(*before) == machine()
        assert (measured.num_measured, measured.told) == (1, [])


def test_a_disturbed_one_is_joined_with_what_was_known():
    now, before = machine(0.6, BUSY, disk_write=3e9), machine()
    measured = Measured(now)
    found = measured.settled(before)
    assert measured.num_measured == 1
    assert found.dense == before.dense
    assert (found.disk_read, found.disk_write, found.busy_cores) == (before.disk_read, now.disk_write, QUIET)
    assert "1.4 cores busy meanwhile: of each rate, the better of now and before is kept (3 of" in measured.told[0]
    assert not is_disturbed(found)


def test_a_disturbed_one_without_another_is_repeated_until_two_agree():
    measured = Measured(machine(0.5, BUSY), machine(0.9, BUSY), machine(0.95, BUSY), machine(2))
    assert measured.settled() == machine(0.95, BUSY)
    assert measured.num_measured == 3
    assert measured.told[-1].startswith("two measurements agree: of each rate, the best is kept")
    measured = Measured(machine(0.5, BUSY), machine(), machine(0.98), machine(2))
    assert measured.settled() == machine()
    assert measured.told[-1].startswith("two measurements agree: they replace")


def test_it_is_not_repeated_for_ever():
    measured = Measured(*[machine(1 + step, BUSY) for step in (0, 0.5, 0, 0.5)])
    assert measured.settled() == machine(1.5, BUSY)
    assert measured.num_measured == MOST_TIMES
    assert "3 measurements differ by more than 10%: of each rate, the best is kept" in measured.told[-1]


def test_a_machine_that_has_become_slower_is_believed_the_second_time():
    measured = Measured(machine(0.6), machine(0.62))
    assert measured.settled(machine()) == machine(0.62)
    assert "two measurements agree: they replace what was measured before" in measured.told[-1]
    measured = Measured(machine(0.6), machine(0.8), machine(0.7))
    assert measured.settled(machine()) == machine()
    assert "those from before included" in measured.told[-1]


def test_the_best_of_several():
    costs = DiskRequest(seconds=1e-5, core_seconds=3e-5)
    first = machine(disk_slowdown=1.5, host_to_device=None, attention={"bfloat16": Rate(5.0, 3.0, 0.1)}, name="now", date="2026-02-02")
    other = machine(0.5, compute_slowdown=1.2, disk_request=costs, attention={"bfloat16": Rate(9.0, 2.0, 0.5), "float32": 1.0})
    best = best_of([first, other])
    assert best.attention == {"bfloat16": Rate(9.0, 3.0, 0.1)}
    assert (best.disk_slowdown, best.compute_slowdown) == (1.0, 1.0)
    assert best.disk_request == DiskRequest(seconds=1e-5, core_seconds=2e-5)
    assert best.overheads == OVERHEADS
    assert (best.name, best.date, best.host_to_device) == ("now", "2026-02-02", None)
    assert best.dense == first.dense
    assert read_machine(best.to_json()) == best


@pytest.mark.parametrize(("rate", "same"), [(1.05, True), (0.92, True), (1.2, False), (0.8, False)])
def test_agreement(rate, same):
    assert agree(machine(), machine(rate)) is same
    assert agree(machine(), machine(disk_write=9e9))
