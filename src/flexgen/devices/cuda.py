"""CUDA devices: a stream per direction, and host memory that is pinned in place."""

from __future__ import annotations

import ctypes
import logging
from typing import Any, Protocol

import torch

from flexgen.base.quantities import format_size
from flexgen.devices.base import Arenas, Event
from flexgen.io.aligned import AlignedBuffer

logger = logging.getLogger(__name__)


class CudaRuntime(Protocol):
    """The functions of libcudart that are called; each returns an error code, 0 for success."""

    def cudaHostRegister(self, address: Any, size_bytes: Any, flags: Any) -> int: ...
    def cudaHostUnregister(self, address: Any) -> int: ...
    def cudaGetLastError(self) -> int: ...


def cuda_runtime() -> CudaRuntime:
    """Return the runtime library that torch has loaded; torch itself does not offer cudaGetLastError."""
    torch.cuda.init()
    assert torch.version.cuda is not None
    return ctypes.CDLL(f"libcudart.so.{torch.version.cuda.partition('.')[0]}")  # type: ignore[return-value]


class PinnedMemory:
    """Host memory in whole pages, registered with CUDA in place, since torch's own allocator rounds sizes up to powers of two.

    If registering fails, the memory is returned unpinned, and a warning says once that copies will be slower.
    """

    def __init__(self, runtime: CudaRuntime) -> None:
        self._runtime = runtime
        self._registered: list[AlignedBuffer] = []
        self._warned = False

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """Return memory that stays registered until `close`; no two registrations share a page."""
        buffer = AlignedBuffer(size_bytes)
        address = ctypes.c_void_p(buffer.tensor.data_ptr())
        code = self._runtime.cudaHostRegister(address, ctypes.c_size_t(buffer.size_bytes), ctypes.c_uint(0))
        if code == 0:
            self._registered.append(buffer)
        else:
            self._runtime.cudaGetLastError()  # clears the error, which the next launch would raise otherwise
            self._warn(f"cannot pin {format_size(size_bytes)} of host memory (error {code}): copies will be slower")
        return buffer.tensor[:size_bytes]

    def close(self) -> None:
        """Unregister all memory; tensors that still refer to it then use ordinary memory."""
        while self._registered:
            buffer = self._registered.pop()
            code = self._runtime.cudaHostUnregister(ctypes.c_void_p(buffer.tensor.data_ptr()))
            if code != 0:
                self._runtime.cudaGetLastError()
                self._warn(f"cannot unpin {format_size(buffer.size_bytes)} of host memory (error {code})")

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(message)


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
        self._pinned = PinnedMemory(cuda_runtime())

    def allocate(self, size_bytes: int) -> torch.Tensor:
        self._charge(size_bytes)
        return torch.empty(size_bytes, dtype=torch.uint8, device=self.device)

    def allocate_host(self, size_bytes: int) -> torch.Tensor:
        return self._pinned.allocate(size_bytes)

    def copy_in(self, destination: torch.Tensor, source: torch.Tensor, after: Any = None) -> CudaEvent:
        self.bytes_in += source.nbytes
        if after is not None:
            self._in.wait_event(after)
        with torch.cuda.stream(self._in):
            destination.copy_(source, non_blocking=True)
            return CudaEvent(self._in.record_event())

    def copy_out(self, destination: torch.Tensor, source: torch.Tensor) -> CudaEvent:
        self.bytes_out += source.nbytes
        self._out.wait_stream(torch.cuda.current_stream(self.device))
        source.record_stream(self._out)
        with torch.cuda.stream(self._out):
            destination.copy_(source, non_blocking=True)
            return CudaEvent(self._out.record_event())

    def marker(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event()

    def await_in(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        torch.cuda.current_stream(self.device).wait_event(event.event)

    def close(self) -> None:
        torch.cuda.synchronize(self.device)
        self._pinned.close()
