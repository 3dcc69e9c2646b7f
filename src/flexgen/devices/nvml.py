"""NVIDIA's management library, by ctypes: it tells how much of a card's memory is in use without making a CUDA context, as CUDA would."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any, Protocol

NAMES = ("libnvidia-ml.so.1", "libnvidia-ml.so")  # the driver brings it


class Nvml(Protocol):
    """The functions that are called; all return an error code, 0 for success."""

    def nvmlInit_v2(self) -> int: ...
    def nvmlShutdown(self) -> int: ...
    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any, /) -> int: ...
    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any, /) -> int: ...


class Memory(ctypes.Structure):
    """The memory of a card in bytes."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def nvml() -> Nvml | None:
    """Return the library of the driver; None if there is none with the functions that are needed."""
    for name in NAMES:
        with contextlib.suppress(OSError, AttributeError):
            return _declared(ctypes.CDLL(name))
    return None


def used_bytes(library: Nvml, uuid: str) -> int | None:
    """Return the bytes in use, by all programs, on the card of this UUID; None if the library does not know it, as for a part of a card."""
    if library.nvmlInit_v2():
        return None
    try:
        handle, memory = ctypes.c_void_p(), Memory()
        if library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)):
            return None
        return None if library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) else int(memory.used)
    finally:
        library.nvmlShutdown()


def _declared(library: Any) -> Nvml:
    """Return the library with the types of its functions declared."""
    library.nvmlInit_v2.argtypes = library.nvmlShutdown.argtypes = []
    library.nvmlDeviceGetHandleByUUID.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    library.nvmlDeviceGetMemoryInfo.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    return library
