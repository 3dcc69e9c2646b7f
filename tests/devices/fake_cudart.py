"""A CUDA runtime without CUDA, which registers memory by pages and remembers errors as CUDA's own does."""

from __future__ import annotations

import ctypes

OUT_OF_MEMORY, ALREADY_REGISTERED, NOT_REGISTERED = 2, 712, 713
MESSAGES = {
    OUT_OF_MEMORY: b"out of memory",
    ALREADY_REGISTERED: b"part or all of the requested memory range is already mapped",
    NOT_REGISTERED: b"pointer does not correspond to a registered memory region",
}
PAGE = 4096


class FakeRuntime:
    """The functions of libcudart that register memory.

    Args:
        limit: The bytes that can be registered.

    Attributes:
        registered: The bytes of each registration, by address.
        num_registered: How many have succeeded.
        absent_pages: The pages of registered memory that were not in memory before that.
        last_error: What the next launch would raise.
    """

    def __init__(self, limit: int = 1 << 40) -> None:
        self.limit, self.last_error = limit, 0
        self.registered: dict[int, int] = {}
        self.num_registered = self.absent_pages = 0

    def cudaHostRegister(self, address: int, size_bytes: int, flags: int, /) -> int:
        first, behind = address // PAGE, -(-(address + size_bytes) // PAGE)
        if any(first < -(-(begin + size) // PAGE) and begin // PAGE < behind for begin, size in self.registered.items()):
            return self._failed(ALREADY_REGISTERED)
        if sum(self.registered.values()) + size_bytes > self.limit:
            return self._failed(OUT_OF_MEMORY)
        self.registered[address] = size_bytes
        self.num_registered += 1
        self.absent_pages += _absent(first * PAGE, behind - first)
        return 0

    def cudaHostUnregister(self, address: int, /) -> int:
        return 0 if self.registered.pop(address, None) is not None else self._failed(NOT_REGISTERED)

    def cudaGetLastError(self) -> int:
        error, self.last_error = self.last_error, 0
        return error

    def cudaGetErrorString(self, code: int, /) -> bytes:
        return MESSAGES[code]

    def _failed(self, code: int) -> int:
        self.last_error = code
        return code


def _absent(address: int, pages: int) -> int:
    found = (ctypes.c_ubyte * pages)()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(pages * PAGE), found) == 0
    return sum(not each & 1 for each in found)
