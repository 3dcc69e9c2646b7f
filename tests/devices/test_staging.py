"""Copies through staging memory, to a device and back."""

from __future__ import annotations

import torch

from flexgen.devices.sim import SimulatedDevice
from flexgen.devices.staging import Staging, StagingBuffers


class CountingDevice(SimulatedDevice):
    """Counts the host memory that it gives out, and which of it copies use."""

    def __init__(self) -> None:
        super().__init__(1 << 20, max_delay_seconds=0.0001)
        self.given: list[torch.Tensor] = []

    def allocate_host(self, size_bytes: int) -> torch.Tensor:
        self.given.append(super().allocate_host(size_bytes))
        return self.given[-1]

    def gave(self, tensor: torch.Tensor) -> bool:
        return any(arena.data_ptr() <= tensor.data_ptr() < arena.data_ptr() + arena.nbytes for arena in self.given)


def test_copies_pass_through_memory_of_the_device_again_and_again() -> None:
    device = CountingDevice()
    staging = Staging(device)
    for seed in range(4):
        torch.manual_seed(seed)
        sources = torch.randn(3, 5).bfloat16().T, torch.randn(7, dtype=torch.float64)
        with staging.to_host(*(source.to(device.device) for source in sources)).arrived() as copies:
            assert all(torch.equal(copy, source) for copy, source in zip(copies, sources, strict=True))
            assert all(device.gave(copy) for copy in copies)
        for non_blocking in (False, True):
            copies = staging.to_device(*sources, non_blocking=non_blocking)
            assert all(torch.equal(copy.cpu(), source) for copy, source in zip(copies, sources, strict=True))
    assert len(device.given) == 1, "the copies of one time after the other share a buffer"
    device.close()


def test_copies_that_wait_together_share_no_memory() -> None:
    device = CountingDevice()
    staging = Staging(device)
    waiting = [staging.to_host(torch.full((9,), float(number), device=device.device)) for number in range(5)]
    for number, copies in enumerate(waiting):
        with copies.arrived() as (copy,):
            assert copy.tolist() == [number] * 9
    assert len(device.given) == 5
    device.close()


def test_buffers_grow() -> None:
    sizes: list[int] = []

    def allocate(size_bytes: int) -> torch.Tensor:
        sizes.append(size_bytes)
        return torch.empty(size_bytes, dtype=torch.uint8)

    buffers = StagingBuffers(allocate)
    for wanted in (100, 128, 20, 0, 129, 200, 100):
        buffer = buffers.take(wanted)
        assert buffer.nbytes >= wanted
        buffers.give_back(buffer)
    assert sizes == [128, 256]


def test_without_a_device_nothing_is_copied() -> None:
    staging, tensor = Staging(None), torch.ones(3)
    with staging.to_host(tensor).arrived() as (copy,):
        assert copy is tensor
    assert staging.to_device(tensor)[0] is tensor
