"""Asynchronous copies between host memory and a device: streams and events, or a hostile thread for tests.

A backend owns the device's arenas and its links.  On a CPU device there is no backend: host memory is where
computing happens.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from typing import Any, Protocol

import torch

from flexgen.base.quantities import format_size
from flexgen.errors import CapacityError
from flexgen.io.aligned import AlignedBuffer

logger = logging.getLogger(__name__)

POISON = 0xFF  # as floating point: NaN in every format


class Event(Protocol):
    """Completion of one copy."""

    def done(self) -> bool: ...

    def wait(self) -> None: ...


class Backend(Protocol):
    """A device with its own memory.

    Attributes:
        device: where computed tensors live. bytes_in, bytes_out: copied so far. budget_bytes, used_bytes: of the arenas.
    """

    device: torch.device
    bytes_in: int
    bytes_out: int
    budget_bytes: int
    used_bytes: int

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """A uint8 arena on the device; raises CapacityError beyond the budget."""
        ...

    def allocate_host(self, size_bytes: int) -> torch.Tensor:
        """A uint8 arena in host memory that the links reach fast, page-aligned."""
        ...

    def copy_in(self, destination: torch.Tensor, source: torch.Tensor, after: Any = None) -> Event:
        """Host to device, of equal bytes; starts once `after` (a marker) has passed."""
        ...

    def copy_out(self, destination: torch.Tensor, source: torch.Tensor) -> Event:
        """Device to host, of what has been computed so far."""
        ...

    def marker(self) -> Any:
        """A point in the device's computing: what was submitted before it has passed when the marker has."""
        ...

    def await_in(self, event: Event) -> None:
        """Make computing wait for a copy (the host may go on)."""
        ...

    def close(self) -> None: ...


class _Arenas:
    """The budget of a device."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.bytes_in = 0
        self.bytes_out = 0

    def _charge(self, size_bytes: int) -> None:
        if self.used_bytes + size_bytes > self.budget_bytes:
            raise CapacityError(
                f"the device needs {format_size(self.used_bytes + size_bytes)}, its budget is {format_size(self.budget_bytes)}: "
                "raise --device-mem or move a share of --weights or --kv to the host"
            )
        self.used_bytes += size_bytes


class SimEvent:
    """Set by the simulated link's thread."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def done(self) -> bool:
        return self._event.is_set()

    def wait(self) -> None:
        self._event.wait()


class SimulatedDevice(_Arenas):
    """A separate arena of host memory behind a hostile link: copies run on their own thread, complete late and out
    of order, and their destinations hold poison until their event."""

    def __init__(self, budget_bytes: int, *, seed: int = 0, max_delay_seconds: float = 0.001) -> None:
        super().__init__(budget_bytes)
        self.device = torch.device("cpu")
        self._random = random.Random(seed)
        self._max_delay_seconds = max_delay_seconds
        self._jobs: queue.Queue[tuple[torch.Tensor, torch.Tensor, SimEvent] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="flexgen-sim-link", daemon=True)
        self._thread.start()

    def allocate(self, size_bytes: int) -> torch.Tensor:
        self._charge(size_bytes)
        return torch.full((size_bytes,), POISON, dtype=torch.uint8)

    def allocate_host(self, size_bytes: int) -> torch.Tensor:
        return AlignedBuffer(size_bytes).tensor[:size_bytes]

    def copy_in(self, destination: torch.Tensor, source: torch.Tensor, after: Any = None) -> SimEvent:
        self.bytes_in += source.nbytes
        return self._start(destination, source)

    def copy_out(self, destination: torch.Tensor, source: torch.Tensor) -> SimEvent:
        self.bytes_out += source.nbytes
        return self._start(destination, source)

    def _start(self, destination: torch.Tensor, source: torch.Tensor) -> SimEvent:
        event = SimEvent()
        destination.view(torch.uint8).fill_(POISON)
        self._jobs.put((destination, source, event))
        return event

    def marker(self) -> None:
        return None

    def await_in(self, event: Event) -> None:
        event.wait()

    def _work(self) -> None:
        waiting: list[tuple[torch.Tensor, torch.Tensor, SimEvent]] = []
        open_queue = True
        while open_queue or waiting:
            try:
                job = self._jobs.get(block=not waiting, timeout=None)
                if job is None:
                    open_queue = False
                else:
                    waiting.append(job)
                if not self._jobs.empty() and len(waiting) < 4:
                    continue
            except queue.Empty:
                pass
            if waiting:
                time.sleep(self._random.uniform(0, self._max_delay_seconds))
                destination, source, event = waiting.pop(self._random.randrange(len(waiting)))
                destination.copy_(source)
                event.set()

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()


class CudaEvent:
    """A CUDA event."""

    def __init__(self, event: Any) -> None:
        self.event = event

    def done(self) -> bool:
        return self.event.query()

    def wait(self) -> None:
        self.event.synchronize()


class CudaDevice(_Arenas):
    """A CUDA device: one stream per direction, pinned host arenas."""

    def __init__(self, budget_bytes: int, index: int = 0) -> None:
        super().__init__(budget_bytes)
        self.device = torch.device("cuda", index)
        self._in = torch.cuda.Stream(self.device)
        self._out = torch.cuda.Stream(self.device)
        self._pin_failed = False

    def allocate(self, size_bytes: int) -> torch.Tensor:
        self._charge(size_bytes)
        return torch.empty(size_bytes, dtype=torch.uint8, device=self.device)

    def allocate_host(self, size_bytes: int) -> torch.Tensor:
        arena = AlignedBuffer(size_bytes).tensor[:size_bytes]
        # Registered in place: torch's own pinned allocator rounds sizes up to powers of two.
        runtime: Any = torch.cuda.cudart()
        code = runtime.cudaHostRegister(arena.data_ptr(), size_bytes, 0)
        if int(code) != 0 and not self._pin_failed:
            self._pin_failed = True
            logger.warning("cannot pin %s of host memory (error %s): copies will be slower", format_size(size_bytes), int(code))
        return arena

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


def open_backend(device: str, device_bytes: int) -> Backend | None:
    """The device of that name with a budget of so many bytes; None for "cpu", where computing happens in host memory."""
    if device == "cuda":
        return CudaDevice(device_bytes)
    return SimulatedDevice(device_bytes) if device == "sim" else None
