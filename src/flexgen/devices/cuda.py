"""CUDA devices: streams for bulk copies in, for urgent ones and for copies out, and host memory that is pinned."""

from __future__ import annotations

import functools
import logging
import time
from typing import Any

import torch

from flexgen.devices.arena import HostArena
from flexgen.devices.base import Arenas, Event
from flexgen.devices.chunks import Chunks
from flexgen.devices.cuda_memory import CudaMemory, cuda_memory
from flexgen.devices.cudart import cuda_runtime

logger = logging.getLogger(__name__)

HIGH = -1  # the priority of a stream; others have 0
LONG_AGO_SECONDS = 1.0


class CudaEvent:
    """The completion of a copy on a stream, or a marker of computing; threads that wait for it sleep, since attention needs the cores."""

    def __init__(self, event: Any) -> None:
        self.event = event

    def done(self) -> bool:
        return self.event.query()

    def wait(self) -> None:
        self.event.synchronize()


class _EventTimes:
    """The times of events, in seconds of the host's clock.

    CUDA tells how long after another event one was, as float32 milliseconds, so the other one must not be long ago.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._since = self.record(stream)
        self._since.synchronize()
        self._seconds = time.perf_counter()

    @staticmethod
    def record(stream: torch.cuda.Stream) -> Any:
        return stream.record_event(torch.cuda.Event(enable_timing=True))

    def seconds(self, event: Any) -> float:
        after = self._since.elapsed_time(event) / 1e3
        seconds = self._seconds + after
        if after > LONG_AGO_SECONDS:
            self._since, self._seconds = event, seconds
        return seconds


class CudaMoment:
    """A moment in computing."""

    def __init__(self, event: Any, times: _EventTimes) -> None:
        self._event, self._times = event, times

    def done(self) -> bool:
        return self._event.query()

    def seconds(self) -> float:
        self._event.synchronize()
        return self._times.seconds(self._event)


class CudaDevice(Arenas):
    """A CUDA device, which computes on the current stream."""

    def __init__(self, budget_bytes: int, index: int = 0) -> None:
        super().__init__(budget_bytes)
        self.device = torch.device("cuda", index)
        self._bulk = torch.cuda.Stream(self.device)
        self._urgent = torch.cuda.Stream(self.device, priority=HIGH)
        self._out = torch.cuda.Stream(self.device)
        self._chunks = Chunks(functools.partial(self._copy, self._bulk))
        runtime = cuda_runtime()
        if runtime is None:
            logger.warning("cannot pin host memory, because no CUDA runtime library of torch's was found: copies will be slower")
        self._host = HostArena(runtime)
        self._memory: CudaMemory | None = None  # while there is a limit
        self._times: _EventTimes | None = None  # once there are moments

    def limit(self, process_bytes: int) -> None:
        self._memory = cuda_memory()
        if self._memory is not None:
            self._memory.limit(process_bytes)

    def peak_bytes(self) -> int:
        return self.used_bytes if self._memory is None else self._memory.peak_bytes()

    def allocate(self, size_bytes: int) -> torch.Tensor:
        self._charge(size_bytes)
        memory = torch.empty(size_bytes, dtype=torch.uint8, device=self.device)
        self.marker().wait()  # torch may return memory of tensors that are gone, while computing with them is still queued
        return memory

    def allocate_host(self, size_bytes: int) -> torch.Tensor:
        return self._host.allocate(size_bytes)

    def copy_in(self, destination: torch.Tensor, source: torch.Tensor, after: Event | None = None) -> CudaEvent:
        self.bytes_in += source.nbytes
        if after is not None:
            assert isinstance(after, CudaEvent)
            self._bulk.wait_event(after.event)
        return self._chunks.copy(destination, source)

    def copy_in_urgently(self, destination: torch.Tensor, source: torch.Tensor) -> CudaEvent:
        self.bytes_in += source.nbytes
        return self._copy(self._urgent, destination, source)

    def copy_out(self, destination: torch.Tensor, source: torch.Tensor) -> CudaEvent:
        self.bytes_out += source.nbytes
        self._out.wait_stream(torch.cuda.current_stream(self.device))
        return self._copy(self._out, destination, source)

    @staticmethod
    def _copy(stream: torch.cuda.Stream, destination: torch.Tensor, source: torch.Tensor) -> CudaEvent:
        """Start a copy on a stream, and return its completion."""
        with torch.cuda.stream(stream):
            destination.copy_(source, non_blocking=True)
            return _recorded(stream)

    def marker(self) -> CudaEvent:
        return _recorded(torch.cuda.current_stream(self.device))

    def moment(self) -> CudaMoment:
        stream = torch.cuda.current_stream(self.device)
        self._times = self._times or _EventTimes(stream)
        return CudaMoment(self._times.record(stream), self._times)

    def await_in(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        torch.cuda.current_stream(self.device).wait_event(event.event)

    def close(self) -> None:
        try:
            torch.cuda.synchronize(self.device)
        finally:  # an earlier error of the device is raised here
            self._host.close()
            if self._memory is not None:
                self._memory.lift_limit()


def _recorded(stream: torch.cuda.Stream) -> CudaEvent:
    """Return the end of everything on a stream so far."""
    return CudaEvent(stream.record_event(torch.cuda.Event(blocking=True)))
