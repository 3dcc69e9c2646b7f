"""Pinning host memory, with a CUDA runtime that remembers errors as CUDA's own does."""

from __future__ import annotations

from typing import Any

import pytest

from flexgen.devices.cuda import PinnedMemory
from flexgen.devices.open import open_device

ALREADY_REGISTERED, OUT_OF_MEMORY = 712, 2
PAGE = 4096


class FakeRuntime:
    """Registrations by page.

    Attributes:
        limit: bytes that can be registered.
        last_error: what the next launch would raise.
    """

    def __init__(self, limit: int = 1 << 30) -> None:
        self.limit, self.last_error = limit, 0
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: Any, size_bytes: Any, flags: Any) -> int:
        start, size = address.value, size_bytes.value
        pages = {page for begin, length in self.registered.items() for page in range(begin // PAGE, -(-(begin + length) // PAGE))}
        if pages & set(range(start // PAGE, -(-(start + size) // PAGE))):
            self.last_error = ALREADY_REGISTERED
        elif sum(self.registered.values()) + size > self.limit:
            self.last_error = OUT_OF_MEMORY
        else:
            self.registered[start] = size
            return 0
        return self.last_error

    def cudaHostUnregister(self, address: Any) -> int:
        del self.registered[address.value]
        return 0

    def cudaGetLastError(self) -> int:
        error, self.last_error = self.last_error, 0
        return error


def test_small_arenas_share_no_page() -> None:
    runtime = FakeRuntime()
    memory = PinnedMemory(runtime)
    arenas = [memory.allocate(size) for size in (1, 100, 5000, PAGE)]
    assert [arena.numel() for arena in arenas] == [1, 100, 5000, PAGE]
    assert len(runtime.registered) == 4


def test_a_failed_registration_leaves_no_error_behind(caplog: pytest.LogCaptureFixture) -> None:
    runtime = FakeRuntime(limit=PAGE)
    memory = PinnedMemory(runtime)
    arenas = [memory.allocate(PAGE) for _ in range(3)]
    assert [arena.fill_(1).sum().item() for arena in arenas] == [PAGE] * 3, "it is ordinary memory"
    assert runtime.last_error == 0
    assert [record.message for record in caplog.records] == ["cannot pin 4.0 KiB of host memory (error 2): copies will be slower"], (
        "said once"
    )
    memory.close()
    assert not runtime.registered


def test_closing_unregisters_everything() -> None:
    """So that an engine which is opened again can pin the same memory."""
    runtime = FakeRuntime()
    for _ in range(3):
        memory = PinnedMemory(runtime)
        kept = [memory.allocate(3 * PAGE) for _ in range(4)]
        assert len(runtime.registered) == len(kept)
        memory.close()
        assert not runtime.registered


def test_the_cpu_has_no_device_of_its_own() -> None:
    assert open_device("cpu", 0) is None
