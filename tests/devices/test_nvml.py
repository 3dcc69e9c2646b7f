"""The management library over one that writes what it is asked for, as the driver's does."""

from __future__ import annotations

from typing import Any

import pytest

from flexgen.devices import nvml as module
from flexgen.devices.nvml import Memory, nvml, used_bytes


class FakeNvml:
    """A library that knows one card."""

    def __init__(self, *, starts: bool = True, tells: bool = True) -> None:
        self.starts, self.tells, self.open = starts, tells, 0

    def nvmlInit_v2(self) -> int:
        self.open += self.starts
        return 0 if self.starts else 9

    def nvmlShutdown(self) -> int:
        self.open -= 1
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any, /) -> int:
        if uuid != b"GPU-one":
            return 6
        handle._obj.value = 7
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any, /) -> int:
        assert handle.value == 7
        if not self.tells:
            return 3
        found: Memory = memory._obj
        found.total, found.free, found.used = 24 << 30, 20 << 30, 4 << 30
        return 0


def test_memory_in_use() -> None:
    library = FakeNvml()
    assert used_bytes(library, "GPU-one") == 4 << 30
    assert library.open == 0


@pytest.mark.parametrize(
    ("library", "uuid"), [(FakeNvml(starts=False), "GPU-one"), (FakeNvml(tells=False), "GPU-one"), (FakeNvml(), "GPU-a-part")]
)
def test_what_the_library_does_not_know(library: FakeNvml, uuid: str) -> None:
    assert used_bytes(library, uuid) is None
    assert library.open == 0


def test_a_system_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NAMES", ("libnvidia-ml-of-no-one.so", "libc.so.6"))
    assert nvml() is None
