"""Copies through staging memory, to a device and back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from flexgen.devices.base import Event
from flexgen.devices.sim import SimEvent
from flexgen.devices.staging import Staging
from tests.devices.counting import CountingDevice

ARENA = 1 << 16


class WatchedDevice(CountingDevice):
    """Knows the memory that it gives out, and refuses what waits for computing."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[torch.Tensor] = []

    def allocate_host(self, size_bytes: int) -> torch.Tensor:
        self.given.append(super().allocate_host(size_bytes))
        return self.given[-1]

    def gave(self, tensor: torch.Tensor) -> bool:
        return any(arena.data_ptr() <= tensor.data_ptr() < arena.data_ptr() + arena.nbytes for arena in self.given)

    def copy_in(self, destination: torch.Tensor, source: torch.Tensor, after: Event | None = None) -> SimEvent:
        raise AssertionError("a bulk copy, which may wait for a marker of computing")


@pytest.fixture
def device() -> Iterator[WatchedDevice]:
    device = WatchedDevice()
    yield device
    device.close()


def test_copies_pass_through_memory_of_the_device_again_and_again(device: WatchedDevice) -> None:
    staging = Staging(device, ARENA, ARENA)
    for seed in range(20):
        torch.manual_seed(seed)
        sources = torch.randn(3, 5).bfloat16().T, torch.randn(7, dtype=torch.float64), torch.empty(0, 4)
        with staging.to_host(*(source.to(device.device) for source in sources)).arrived() as copies:
            assert all(torch.equal(copy, source) for copy, source in zip(copies, sources, strict=True))
            assert all(device.gave(copy) for copy in copies if copy.numel())
        taken = staging.to_device(*sources).take()
        assert all(torch.equal(copy.cpu(), source) for copy, source in zip(taken, sources, strict=True))
    assert (device.num_out, device.num_in) == (20, 20), "tensors cross together, and no copy takes a marker"
    assert (len(device.given), device.used_bytes) == (1, ARENA), "the memory that it began with was enough"


def test_sources_may_change_at_once(device: WatchedDevice) -> None:
    staging, source = Staging(device, ARENA), torch.zeros(9)
    copies = []
    for number in range(5):
        copies.append(staging.to_device(source.fill_(number)))
    assert [each.take()[0].tolist() for each in copies] == [[number] * 9 for number in range(5)]


def test_what_was_taken_stays_when_slots_are_used_again(device: WatchedDevice) -> None:
    staging = Staging(device, 1024)
    taken = [staging.to_device(torch.full((100,), float(number))).take()[0] for number in range(30)]
    assert [each.sum().item() for each in taken] == [100.0 * number for number in range(30)]
    assert device.used_bytes == 1024


def test_taking_does_not_wait_for_the_device(device: WatchedDevice) -> None:
    staging, before = Staging(device, ARENA), device.synchronisations
    for _ in range(20):
        staging.to_device(torch.ones(100)).take()
        staging.to_host(torch.ones(100, device=device.device))
    assert device.synchronisations == before


def test_copies_that_wait_together_share_no_memory(device: WatchedDevice) -> None:
    staging = Staging(device)
    waiting = [staging.to_host(torch.full((9000,), float(number), device=device.device)) for number in range(5)]
    for number, copies in enumerate(waiting):
        with copies.arrived() as (copy,):
            assert copy.tolist() == [number] * 9000
    assert len(device.given) == 5, "it grows where it has to"


def test_without_a_device_nothing_is_copied() -> None:
    staging, tensor = Staging(None), torch.ones(3)
    with staging.to_host(tensor).arrived() as (copy,):
        assert copy is tensor
    assert staging.to_device(tensor).take()[0] is tensor
