"""The memory that this process takes on a CUDA card, by the driver's count: its context, libraries and kernels, and torch's allocator."""

from __future__ import annotations

import functools
from typing import Protocol

import torch

from flexgen.base.quantities import MIB
from flexgen.devices.nvml import nvml, used_bytes
from flexgen.plan.machine import CUDA_BYTES

LATER_BYTES = 64 * MIB  # for kernels that are loaded after the first products
LEAST_BYTES = 96 * MIB  # no context with libraries takes less


class MemoryCounts(Protocol):
    """What the driver and torch say of one card's memory.

    Attributes:
        sees_before: Whether the memory in use can be known before this process has a context on the card.
    """

    sees_before: bool

    def used(self) -> int:
        """Return the bytes in use on the card, by all programs."""
        ...

    def free_and_total(self) -> tuple[int, int]:
        """Return the bytes that are free, and all of them, as CUDA counts; this makes a context."""
        ...

    def multiply(self) -> None:
        """Compute the first products, for which context and libraries are loaded."""
        ...

    def reserved(self) -> int:
        """Return the bytes that torch's allocator holds, in use or not."""
        ...

    def peak_reserved(self) -> int:
        """Return the most bytes that it has held since `forget_peak`."""
        ...

    def forget_peak(self) -> None: ...

    def limit(self, share: float) -> None:
        """Let torch's allocator hold no more than this share of the card's memory."""
        ...


class CudaMemory:
    """The memory of this process on a card, measured from before its first product.

    Args:
        counts: What is asked.

    Attributes:
        overhead_bytes: What CUDA's context, libraries and kernels take beside the tensors.
        total_bytes: The memory of the card.
    """

    def __init__(self, counts: MemoryCounts) -> None:
        self._counts = counts
        before = counts.used()
        counts.multiply()
        if not counts.sees_before or counts.used() - before < LEAST_BYTES:
            before -= CUDA_BYTES  # a context that was there counts as one of the usual size
        self._others_bytes, self.total_bytes = before, counts.free_and_total()[1]
        self.overhead_bytes = max(self.taken_bytes(), 0) + LATER_BYTES
        self._reserved_at_first = counts.reserved()

    def taken_bytes(self) -> int:
        """Return the bytes that this process has taken, by the driver's count; what other programs took or freed since counts, too."""
        return self._counts.used() - self._others_bytes

    def free_bytes(self) -> int:
        """Return the bytes that no program has taken."""
        return self._counts.free_and_total()[0]

    def limit(self, process_bytes: int) -> None:
        """Let this process take no more than so many bytes, and begin to measure how many it takes."""
        tensors = process_bytes - self.overhead_bytes + self._reserved_at_first
        self._counts.limit(min(max(tensors, 0) / self.total_bytes, 1.0))
        self._counts.forget_peak()

    def lift_limit(self) -> None:
        """Let torch's allocator take what the card has."""
        self._counts.limit(1.0)

    def peak_bytes(self) -> int:
        """Return the most bytes that this process has taken since `limit`: beside torch's allocator what is taken now, which only grows."""
        beside = max(self.taken_bytes() - self._counts.reserved(), 0)
        return beside + self._counts.peak_reserved()


class TorchCounts:
    """The counts of a card, from torch and from NVIDIA's management library."""

    def __init__(self, index: int = 0) -> None:
        self._index, self._library, self._uuid = index, nvml(), ""
        is_fresh = not torch.cuda.is_initialized()  # otherwise the program may have a context already
        if self._library is not None:
            self._uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
            if used_bytes(self._library, self._uuid) is None:
                self._library = None
        self.sees_before = is_fresh and self._library is not None

    def used(self) -> int:
        used = None if self._library is None else used_bytes(self._library, self._uuid)
        if used is not None:
            return used
        free, total = self.free_and_total()
        return total - free

    def free_and_total(self) -> tuple[int, int]:
        return torch.cuda.mem_get_info(self._index)

    def multiply(self) -> None:
        for dtype in (torch.float32, torch.float16):
            numbers = torch.ones(256, 256, dtype=dtype, device=torch.device("cuda", self._index))
            torch.nn.functional.linear(numbers, numbers @ numbers, numbers[0]).softmax(-1)
        torch.cuda.synchronize(self._index)

    def reserved(self) -> int:
        return torch.cuda.memory_reserved(self._index)

    def peak_reserved(self) -> int:
        return torch.cuda.max_memory_reserved(self._index)

    def forget_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._index)

    def limit(self, share: float) -> None:
        torch.cuda.set_per_process_memory_fraction(share, self._index)


@functools.cache
def cuda_memory() -> CudaMemory | None:
    """Return the memory of this process on the first card, which is measured once; None where torch sees no card."""
    return CudaMemory(TorchCounts()) if torch.cuda.is_available() else None
