"""A moment's look at the machine beside its profile."""

from __future__ import annotations

import pytest
import torch
from machines import machine_of

from flexgen.base.quantities import MIB
from flexgen.errors import StorageError
from flexgen.profile import check as module
from flexgen.profile.busy import BusyCores
from flexgen.profile.check import MachineCheck
from flexgen.report.progress import CheckedMachine


def check_of(machine, tmp_path=None, **changes):
    values = {"machine": machine, "device": "cpu", "dtype": "float32", "max_bytes": 8 * MIB, "job_seconds": 5.0}
    return MachineCheck(**(values | changes))


def machine(flops=1e9, **changes):
    return machine_of(dense={"float32": [(16, flops), (64, flops)]}, **changes)


def test_rates_are_those_of_now_over_the_profiles():
    """A profile that says a thousandth of what any processor does, and one that says a thousand times as much."""
    assert check_of(machine(1e6)).now()["compute"] > 1
    assert check_of(machine(1e18)).now()["compute"] < 1


def test_both_ends_of_a_run(monkeypatch):
    check = check_of(machine())
    rates = iter([{"compute": 0.9}, {"compute": 0.4}])
    monkeypatch.setattr(MachineCheck, "now", lambda self: next(rates))
    monkeypatch.setattr(BusyCores, "by_others", lambda self: 1.25)
    check.start()
    found = check.end()
    assert found == CheckedMachine(start={"compute": 0.9}, end={"compute": 0.4}, busy_cores=1.25)
    assert found.mean() == {"compute": pytest.approx(0.65)}
    assert CheckedMachine(start={}, end={"disk_read": 0.5}, busy_cores=0.0).mean() == {"disk_read": 0.5}


def test_the_disk_is_looked_at_where_weights_stream_from_it(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "LEAST_FILE_BYTES", 4 * MIB)
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(4 * MIB - 1))
    assert set(check_of(machine(), weights=path).now()) == {"compute"}
    path.write_bytes(bytes(12 * MIB))
    assert check_of(machine(disk_read=1.0), weights=path).now()["disk_read"] > 1
    assert check_of(machine(disk_read=1e18), weights=path).now()["disk_read"] < 1
    assert set(check_of(machine(), weights=tmp_path / "gone").now()) == {"compute"}


@pytest.mark.parametrize("error", [StorageError("torn"), RuntimeError("out of memory"), MemoryError(), OSError(5, "lost")])
def test_what_cannot_be_looked_at_stops_no_run(monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(MachineCheck, "_products", fail)
    assert check_of(machine()).now() == {}


def test_it_stays_within_its_memory_and_changes_no_random_state(monkeypatch):
    sizes = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight: sizes.append(weight.nbytes) or linear(x, weight))
    state = torch.get_rng_state()
    check_of(machine(1e15), max_bytes=24 * MIB).now()
    assert 4 * MIB <= max(sizes) <= 8 * MIB
    assert torch.equal(torch.get_rng_state(), state)
