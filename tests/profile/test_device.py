"""What is measured of a CUDA device, over stand-ins: the slowdowns of what goes on at the same time, rows, launches, decoding."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from machines import machine_of

from flexgen.base.quantities import MIB
from flexgen.plan.machine import Rate, read_machine
from flexgen.profile import decoding, measure
from flexgen.profile.beside import Slowdowns, at_once, repeated, slowdown_of_each, slowdowns_beside
from flexgen.profile.compute import (
    DENSE_ROWS,
    DEVICE_ROWS,
    QUEUED,
    dense_rates,
    device_elementwise_rate,
    launch_seconds,
    queued,
)
from flexgen.profile.decoding import device_rate, example, with_formats

NOWHERE = torch.device("meta")  # computes nothing, as fast as it is asked to


class Together:
    """Two workers of which each knows whether the other is at work."""

    def __init__(self, slower: tuple[float, float]) -> None:
        self._slower, self._busy = slower, threading.Barrier(2)
        self.alone = True

    def one(self, seconds: float) -> float:
        return self._rate(100.0, self._slower[0])

    def other(self, seconds: float) -> float:
        return self._rate(8.0, self._slower[1])

    def _rate(self, rate: float, slower: float) -> float:
        try:
            self._busy.wait(timeout=0.2)
        except threading.BrokenBarrierError:
            self._busy.reset()
            return rate
        return rate / slower


def test_each_is_compared_with_itself_alone() -> None:
    workers = Together((4.0, 1.25))
    assert at_once(workers.one, workers.other, 0.0) == (25.0, 6.4)
    assert slowdown_of_each(workers.one, workers.other, 0.0, 3) == (4.0, 1.25)
    faster = Together((0.5, 2.0))
    assert slowdown_of_each(faster.one, faster.other, 0.0, 1) == (1.0, 2.0), "nothing is slowed down by less than nothing"


def test_work_per_second() -> None:
    done: list[int] = []
    rate = repeated(lambda: done.append(time.sleep(0.002) or 1), 5.0)(0.05)
    assert 2 <= len(done) <= 25
    assert 0 < rate <= 5.0 / 0.002
    assert repeated(lambda: None)(0.0) > 0, "once at least"


class Event:
    def __init__(self, device: LinkedDevice) -> None:
        self._device = device

    def wait(self) -> None:
        self._device.outstanding -= 1


class LinkedDevice:
    """A device in host memory that counts copies."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes, self.outstanding, self.copies = budget_bytes, 0, {"in": 0, "out": 0}
        self.most_outstanding, self.closed = 0, False

    def allocate(self, size_bytes: int) -> torch.Tensor:
        self.budget_bytes -= size_bytes
        assert self.budget_bytes >= 0
        return torch.zeros(size_bytes, dtype=torch.uint8)

    def allocate_host(self, size_bytes: int) -> torch.Tensor:
        return torch.zeros(size_bytes, dtype=torch.uint8)

    def copy_in(self, destination: torch.Tensor, source: torch.Tensor) -> Event:
        return self._copied("in", destination, source)

    def copy_out(self, destination: torch.Tensor, source: torch.Tensor) -> Event:
        return self._copied("out", destination, source)

    def _copied(self, way: str, destination: torch.Tensor, source: torch.Tensor) -> Event:
        destination.copy_(source)
        self.copies[way] += 1
        self.outstanding += 1
        self.most_outstanding = max(self.most_outstanding, self.outstanding)
        return Event(self)

    def close(self) -> None:
        self.closed = True


def test_all_pairs_beside_a_device(tmp_path: Path) -> None:
    device: Any = LinkedDevice(3 * MIB)
    found = slowdowns_beside(device, tmp_path, torch.float32, 6 * MIB, 0.3, rounds=1)
    assert all(each >= 1 for each in dataclasses.astuple(found))
    assert min(device.copies.values()) >= 2
    assert not list(tmp_path.iterdir()), "what was measured with was left behind"


def test_a_cuda_machine_is_measured_beside_its_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = LinkedDevice(1 << 30)
    found = Slowdowns(duplex=1.1, link=1.2, host=1.3, disk=1.4, compute=1.5)
    monkeypatch.setattr(measure, "open_device", lambda name, budget: device if name == "cuda" else None)
    monkeypatch.setattr(measure, "slowdowns_beside", lambda *_, **__: found)
    monkeypatch.setattr(measure, "slowdowns", lambda *_, **__: (2.0, 3.0))
    assert measure._slowdowns("cuda", tmp_path, torch.float32, MIB, quick=True) == found
    assert device.closed
    cpu = measure._slowdowns("cpu", tmp_path, torch.float32, MIB, quick=True)
    assert cpu == Slowdowns(duplex=1.0, link=1.0, host=1.0, disk=2.0, compute=3.0)


def test_a_device_computes_more_rows_and_is_waited_for_seldom() -> None:
    curve = dense_rates(NOWHERE, torch.bfloat16, 1 << 40, 0.5)
    assert [rows for rows, _ in curve] == [float(rows) for rows in (*DENSE_ROWS, *DEVICE_ROWS)]
    assert max(DEVICE_ROWS) == 16_384
    assert [rows for rows, _ in dense_rates(NOWHERE, torch.bfloat16, 1 << 29, 0.5)][-1] == 8192.0, "as many as fit"
    for where, rows, calls in ((NOWHERE, 16, QUEUED), (NOWHERE, 16_384, 1), (torch.device("cpu"), 16, 1)):
        made: list[int] = []
        run, number = queued(lambda made=made: made.append(1) or torch.empty(0), where, rows)
        run()
        assert number == len(made) == calls


def test_rates_on_a_device_count_all_queued_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten calls in the time of one are ten times the rate."""
    seconds = 0.01
    monkeypatch.setattr("flexgen.profile.compute.measured_rate", lambda amount, run, budget: Rate(amount / seconds, amount / seconds))
    cpu, there = (device_elementwise_rate(torch.device(where), torch.float32, MIB, 0.01) for where in ("cpu", "meta"))
    assert there.typical == pytest.approx(QUEUED * cpu.typical)


def test_the_cost_of_a_launch() -> None:
    assert 0 < launch_seconds(torch.device("cpu"), 0.01) < 1e-2


def test_decoding_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured when a model first needs it, beside the host's rate, and only where the device decodes."""
    number_format, encoding = example("mxfp4", 1 << 16)
    monkeypatch.setattr(decoding, "FORMAT_SECONDS", 0.01)
    rate = device_rate(number_format, encoding, torch.float32, torch.device("cpu"))
    assert rate is not None
    assert rate.typical > 1e5
    asked: list[str] = []
    monkeypatch.setattr(decoding, "device_rate", lambda stored, *_: asked.append(stored.name) or Rate(5e9, 4e9))
    machine = with_formats(machine_of(device="cuda", casts={"mxfp4 float32": 1e9}), "float32", ["mxfp4"], MIB)
    assert machine.device_casts == {"mxfp4 float32": Rate(5e9, 4e9)}
    assert machine.casts == {"mxfp4 float32": Rate(1e9, 1e9)}, "known already"
    assert with_formats(machine, "float32", ["mxfp4"], MIB) is machine
    cpu = machine_of(casts={"mxfp4 float32": 1e9})
    assert with_formats(cpu, "float32", ["mxfp4"], MIB) is cpu
    assert len(asked) == 1


def test_the_host_decodes_what_does_not_cross_as_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    number_format, encoding = example("mxfp4", 1 << 16)
    monkeypatch.setattr(type(encoding.format), "carried_as_stored", False)
    assert device_rate(number_format, encoding, torch.float32, torch.device("cpu")) is None


def test_descriptions_of_machines_need_no_slowdowns() -> None:
    fields: dict[str, Any] = dataclasses.asdict(machine_of())
    for name in ("duplex_slowdown", "link_slowdown", "host_slowdown", "device_casts", "source"):
        del fields[name]
    del fields["overheads"]["per_operation"]
    assert read_machine(json.dumps(fields)) == machine_of()
