"""CUDA devices: a stream per direction, and host memory that is pinned."""

from __future__ import annotations

import logging
from typing import Any

import torch

from flexgen.devices.arena import HostArena
from flexgen.devices.base import Arenas, Event
from flexgen.devices.cuda_memory import CudaMemory, cuda_memory
from flexgen.devices.cudart import cuda_runtime

logger = logging.getLogger(__name__)


class CudaEvent:
    """The completion of a copy on a stream."""

    def __init__(self, event: Any) -> None:
        self.event = event

    def done(self) -> bool:
        return self.event.query()

    def wait(self) -> None:
        self.event.synchronize()


class CudaDevice(Arenas):
    """A CUDA device, which computes on the current stream."""

    def __init__(self, budget_bytes: int, index: int = 0) -> None:
        super().__init__(budget_bytes)
        self.device = torch.device("cuda", index)
        self._in = torch.cuda.Stream(self.device)
        self._out = torch.cuda.Stream(self.device)
        runtime = cuda_runtime()
        if runtime is None:
            logger.warning("cannot pin host memory, because no CUDA runtime library of torch's was found: copies will be slower")
        self._host = HostArena(runtime)
        self._memory: CudaMemory | None = None  # while there is a limit

    def limit(self, process_bytes: int) -> None:
        self._memory = cuda_memory()
        if self._memory is not None:
            self._memory.limit(process_bytes)

    def peak_bytes(self) -> int:
        return self.used_bytes if self._memory is None else self._memory.peak_bytes()

    def allocate(self, size_bytes: int) -> torch.Tensor:
        self._charge(size_bytes)
        return torch.empty(size_bytes, dtype=torch.uint8, device=self.device)

    def allocate_host(self, size_bytes: int) -> torch.Tensor:
        return self._host.allocate(size_bytes)

    def copy_in(self, destination: torch.Tensor, source: torch.Tensor, after: Any = None) -> CudaEvent:
        self.bytes_in += source.nbytes
        if after is not None:
            self._in.wait_event(after)
        with torch.cuda.stream(self._in):
            destination.copy_(source, non_blocking=True)
            return self._completion(self._in)

    def copy_out(self, destination: torch.Tensor, source: torch.Tensor) -> CudaEvent:
        self.bytes_out += source.nbytes
        self._out.wait_stream(torch.cuda.current_stream(self.device))
        source.record_stream(self._out)
        with torch.cuda.stream(self._out):
            destination.copy_(source, non_blocking=True)
            return self._completion(self._out)

    def _completion(self, stream: torch.cuda.Stream) -> CudaEvent:
        """Return the completion of all copies on a stream so far; threads that wait for it sleep, since computing needs the cores."""
        return CudaEvent(stream.record_event(torch.cuda.Event(blocking=True)))

    def marker(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event()

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
