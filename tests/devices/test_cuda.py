"""The CUDA device over streams and events that record what becomes of them."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from flexgen.devices import cuda
from flexgen.devices.cuda import CudaDevice
from flexgen.devices.open import open_device
from tests.devices.fake_cudart import PAGE, FakeRuntime


class FakeEvent:
    def __init__(self, **how: Any) -> None:
        self.how = how


class FakeStream:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        return event or FakeEvent()

    def wait_stream(self, other: FakeStream) -> None:
        pass


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    """The runtime of devices that are opened."""
    runtime, current = FakeRuntime(), FakeStream(torch.device("cuda", 0))
    fakes = {
        "Stream": FakeStream, "Event": FakeEvent, "stream": lambda stream: contextlib.nullcontext(), "synchronize": lambda device: None,
        "current_stream": lambda device: current,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(cuda, "cuda_runtime", lambda: runtime)
    return runtime


def test_threads_that_wait_for_copies_sleep(runtime: FakeRuntime) -> None:
    device = CudaDevice(0)
    source, destination = torch.arange(5), torch.zeros(5, dtype=torch.int64)
    events = [device.copy_in(destination, source), device.copy_out(destination, source)]
    assert [event.event.how for event in events] == [{"blocking": True}] * 2
    assert (device.bytes_in, device.bytes_out) == (40, 40)


def test_closing_unpins_host_memory(runtime: FakeRuntime) -> None:
    device = CudaDevice(0)
    assert device.allocate_host(PAGE + 1).shape == (PAGE + 1,)
    assert sum(runtime.registered.values()) == 2 * PAGE
    device.close()
    assert not runtime.registered


def test_closing_unpins_host_memory_after_an_error_of_the_device(runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    device = CudaDevice(0)
    device.allocate_host(PAGE)

    def failing(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", failing)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        device.close()
    assert not runtime.registered


def test_without_a_runtime_memory_is_not_pinned(
    runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cuda, "cuda_runtime", lambda: None)
    device = CudaDevice(0)
    assert device.allocate_host(PAGE).fill_(1).sum().item() == PAGE
    device.close()
    assert [record.message for record in caplog.records] == [
        "cannot pin host memory, because no CUDA runtime library of torch's was found: copies will be slower"
    ]
    assert not runtime.registered


class FakeMemory:
    """The memory of the process, and what it was limited to."""

    def __init__(self) -> None:
        self.limits = list[int | None]()

    def limit(self, process_bytes: int) -> None:
        self.limits.append(process_bytes)

    def lift_limit(self) -> None:
        self.limits.append(None)

    def peak_bytes(self) -> int:
        return 77


def test_the_limit_of_the_process_lasts_as_long_as_the_device(runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = FakeMemory()
    monkeypatch.setattr(cuda, "cuda_memory", lambda: memory)
    device = CudaDevice(1 << 30)
    assert device.peak_bytes() == device.used_bytes == 0
    device.limit(2 << 30)
    assert device.peak_bytes() == 77
    device.close()
    assert memory.limits == [2 << 30, None]


def test_the_cpu_has_no_device_of_its_own() -> None:
    assert open_device("cpu", 0) is None
