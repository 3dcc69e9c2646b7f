"""What crosses a link on its way to attention on the host, and back."""

from __future__ import annotations

import threading

import pytest
import torch

from flexgen.devices.sim import SimulatedDevice
from flexgen.kv.worker import BounceBuffers, Link, Worker


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
    link = Link(device)
    for seed in range(4):
        torch.manual_seed(seed)
        sources = torch.randn(3, 5).bfloat16().T, torch.randn(7, dtype=torch.float64)
        with link.to_host(*(source.to(device.device) for source in sources)).arrived() as copies:
            assert all(torch.equal(copy, source) for copy, source in zip(copies, sources, strict=True))
            assert all(device.gave(copy) for copy in copies)
        assert torch.equal(link.to_device(sources[0]).cpu(), sources[0])
    assert len(device.given) == 1, "the copies of one time after the other share a buffer"
    device.close()


def test_copies_that_wait_together_share_no_memory() -> None:
    device = CountingDevice()
    link = Link(device)
    waiting = [link.to_host(torch.full((9,), float(number), device=device.device)) for number in range(5)]
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

    buffers = BounceBuffers(allocate)
    for wanted in (100, 128, 20, 0, 129, 200, 100):
        buffer = buffers.take(wanted)
        assert buffer.nbytes >= wanted
        buffers.give_back(buffer)
    assert sizes == [128, 256]


def test_without_a_device_nothing_is_copied() -> None:
    link, tensor = Link(None), torch.ones(3)
    with link.to_host(tensor).arrived() as (copy,):
        assert copy is tensor
    assert link.to_device(tensor) is tensor


def test_a_worker_keeps_order_and_the_first_error() -> None:
    worker, seen = Worker("flexgen-test-worker"), []

    def failing() -> None:
        raise ValueError("first")

    worker.submit(lambda: seen.append(1))
    worker.submit(failing)
    worker.submit(lambda: seen.append(2))
    with pytest.raises(ValueError, match="first"):
        worker.drain()
    assert seen == [1, 2]
    worker.close()
    assert "flexgen-test-worker" not in {thread.name for thread in threading.enumerate()}
