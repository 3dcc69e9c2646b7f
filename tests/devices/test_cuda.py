"""The CUDA device over streams and events that record what becomes of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flexgen.devices import cuda
from flexgen.devices.chunks import CHUNK_BYTES, OUTSTANDING_BYTES
from flexgen.devices.cuda import CudaDevice
from flexgen.devices.open import open_device
from flexgen.devices.serial import SerialDevice
from tests.devices.fake_cudart import PAGE, FakeRuntime


class FakeEvent:
    def __init__(self, **how: Any) -> None:
        self.how, self.waited = how, False
        self.milliseconds = 0.0  # when it happens
        self.stream: FakeStream | None = None

    def synchronize(self) -> None:
        self.waited = True

    def query(self) -> bool:
        return self.waited

    def elapsed_time(self, later: FakeEvent) -> float:
        assert self.how == later.how == {"enable_timing": True}
        return later.milliseconds - self.milliseconds


class FakeStream:
    """Records what it is told, in order; `made` are those that the device made."""

    made: list[FakeStream]
    inside: FakeStream | None = None  # the one in which copies are started

    def __init__(self, device: torch.device, priority: int = 0) -> None:
        self.device, self.priority = device, priority
        self.told: list[tuple[str, Any]] = []
        FakeStream.made.append(self)

    def record_event(self, event: FakeEvent) -> FakeEvent:
        event.stream = self
        self.told.append(("record", event))
        return event

    def wait_event(self, event: FakeEvent) -> None:
        assert isinstance(event, FakeEvent)
        assert event.stream is not None, "an event that nobody recorded has happened"
        self.told.append(("wait", event))

    def wait_stream(self, other: FakeStream) -> None:
        self.told.append(("wait", other))

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        FakeStream.inside, before = self, FakeStream.inside
        yield
        FakeStream.inside = before


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    """The runtime of devices that are opened."""
    FakeStream.made = []
    runtime, current, really = FakeRuntime(), FakeStream(torch.device("cuda", 0)), torch.Tensor.copy_
    fakes = {
        "Stream": FakeStream, "Event": FakeEvent, "stream": FakeStream.entered, "synchronize": lambda device: None,
        "current_stream": lambda device: current,
    }  # fmt: skip

    def copy(destination: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if FakeStream.inside is not None:
            FakeStream.inside.told.append(("copy" if non_blocking else "blocking copy", source.nbytes))
        return really(destination, source)

    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    monkeypatch.setattr(cuda, "cuda_runtime", lambda: runtime)
    return runtime


def told(stream: FakeStream) -> list[str]:
    return [what for what, _ in stream.told]


def test_threads_that_wait_for_copies_sleep(runtime: FakeRuntime) -> None:
    device = CudaDevice(0)
    source, destination = torch.arange(5), torch.zeros(5, dtype=torch.int64)
    copies = [device.copy_in, device.copy_in_urgently, device.copy_out]
    events = [*(copy(destination, source) for copy in copies), device.marker()]
    assert [event.event.how for event in events] == [{"blocking": True}] * 4
    assert (device.bytes_in, device.bytes_out) == (80, 40)


def test_each_kind_of_copy_has_a_stream_and_only_what_must_wait_waits(runtime: FakeRuntime) -> None:
    device = CudaDevice(0)
    computing, bulk, urgent, out = FakeStream.made
    source, destination = torch.arange(5), torch.zeros(5, dtype=torch.int64)
    marker = device.marker()
    copies = [
        device.copy_in(destination, source, marker),
        device.copy_in_urgently(destination, source),
        device.copy_out(destination, source),
    ]
    assert [event.event.stream for event in (marker, *copies)] == [computing, bulk, urgent, out]
    assert [told(stream) for stream in (bulk, urgent, out)] == [["wait", "copy", "record"], ["copy", "record"], ["wait", "copy", "record"]]
    assert bulk.told[0][1] is marker.event
    assert out.told[0][1] is computing
    assert urgent.priority < bulk.priority, "lower numbers go first"
    device.await_in(copies[1])
    assert computing.told[-1] == ("wait", copies[1].event)


def test_without_overlap_the_host_waits_for_computing_and_for_the_copy(runtime: FakeRuntime) -> None:
    device = SerialDevice(CudaDevice(0))
    computing, *streams = FakeStream.made
    source, destination = torch.arange(5), torch.zeros(5, dtype=torch.int64)
    for copy in (device.copy_in, device.copy_in_urgently, device.copy_out):
        copy(destination, source)
    recorded = [event for stream in (computing, *streams) for what, event in stream.told if what == "record"]
    assert len(recorded) == 6
    assert all(event.waited for event in recorded)


def test_a_large_copy_is_cut_and_its_thread_sleeps_for_chunks_only(runtime: FakeRuntime) -> None:
    device = CudaDevice(0)
    _, bulk, _, _ = FakeStream.made
    source = torch.zeros(OUTSTANDING_BYTES + 2 * CHUNK_BYTES - 5, dtype=torch.uint8)
    event = device.copy_in(torch.empty_like(source), source, device.marker())
    sizes = [size for what, size in bulk.told if what == "copy"]
    assert sum(sizes) == source.nbytes
    assert max(sizes) == CHUNK_BYTES
    assert told(bulk) == ["wait", *["copy", "record"] * len(sizes)]
    recorded = [event for what, event in bulk.told if what == "record"]
    assert [each.waited for each in recorded] == [True] * 2 + [False] * 3
    assert event.event is recorded[-1]


def test_new_memory_is_not_used_by_queued_computing(runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch may hand out what a tensor that is gone has left, while computing with it has not begun."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: empty(size, dtype=dtype))
    device = CudaDevice(100)
    device.allocate(100)
    ((_, event),) = FakeStream.made[0].told
    assert event.waited


def test_moments_have_the_time_of_the_host(runtime: FakeRuntime) -> None:
    """CUDA tells milliseconds since another event, which is the first one only for so long."""
    before = time.perf_counter()
    device = CudaDevice(0)
    moments = [device.moment() for _ in range(4)]
    since = time.perf_counter()
    assert not moments[0].done()
    for moment, milliseconds in zip(moments, (1.5, 900.0, 5000.0, 5001.0), strict=True):
        moment._event.milliseconds = milliseconds
    first, *others = (moment.seconds() for moment in moments)
    assert before <= first - 1.5e-3 <= since
    assert [each - first for each in others] == pytest.approx([0.8985, 4.9985, 4.9995])
    assert all(moment.done() for moment in moments), "waited for"
    assert device._times is not None
    assert device._times._since is moments[2]._event


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
