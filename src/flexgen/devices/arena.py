"""Host memory for copies to and from a device, which lasts as long as the device is open."""

from __future__ import annotations

import logging
import threading

import torch

from flexgen.base.quantities import format_size
from flexgen.devices.cudart import NOT_REGISTERED, CudaRuntime
from flexgen.io.aligned import ALIGNMENT, AlignedBuffer

logger = logging.getLogger(__name__)


class HostArena:
    """Blocks of whole pages in host memory, each registered with CUDA in one piece.  Thread-safe.

    No tensor that is handed out reaches over the border of two registrations, which a copy must not do, and no two registrations share
    a page.  If a block cannot be registered, it is handed out as ordinary memory, and a warning says once that copies will be slower.

    Args:
        runtime: The CUDA runtime; None leaves all memory unregistered.

    Attributes:
        size_bytes: The bytes of all blocks, which is what they take of the host's memory.
    """

    def __init__(self, runtime: CudaRuntime | None) -> None:
        self._runtime = runtime
        self._lock = threading.Lock()
        self._registered: list[AlignedBuffer] = []
        self._warned = False
        self.size_bytes = 0

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """Return a block, uint8 (size_bytes,), which begins at a page and stays registered until `close`."""
        block = AlignedBuffer(size_bytes)
        with self._lock:
            self.size_bytes += block.size_bytes
        if self._runtime is not None:
            # Each page is written to by one of torch's threads, since registering would have one thread fetch them all.
            block.tensor[::ALIGNMENT].zero_()
            self._register(block, self._runtime)
        return block.tensor[:size_bytes]

    def _register(self, block: AlignedBuffer, runtime: CudaRuntime) -> None:
        # The block is noted first: an interrupt during the call, which may take seconds, is raised when it returns.
        self._registered.append(block)
        code = runtime.cudaHostRegister(block.tensor.data_ptr(), block.size_bytes, 0)
        if code:
            runtime.cudaGetLastError()
            self._registered.remove(block)
            self._warn(f"cannot pin {format_size(block.size_bytes)} of host memory ({_why(runtime, code)}): copies will be slower")

    def close(self) -> None:
        """Unregister all blocks; tensors that still refer to them then use ordinary memory."""
        while self._registered and self._runtime is not None:
            block = self._registered.pop()
            code = self._runtime.cudaHostUnregister(block.tensor.data_ptr())
            if code:
                self._runtime.cudaGetLastError()
                if code != NOT_REGISTERED:  # an interrupt came while it was being registered
                    self._warn(f"cannot unpin {format_size(block.size_bytes)} of host memory ({_why(self._runtime, code)})")

    def _warn(self, message: str) -> None:
        with self._lock:
            first, self._warned = not self._warned, True
        if first:
            logger.warning(message)


def _why(runtime: CudaRuntime, code: int) -> str:
    return f"CUDA error {code}, {runtime.cudaGetErrorString(code).decode(errors='replace')}"
