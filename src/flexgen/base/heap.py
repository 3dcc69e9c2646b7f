"""The C library's heap: how much freed memory it keeps."""

from __future__ import annotations

import contextlib
import ctypes
import os

# Numbers of glibc's parameters, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Tensors from this size on are mapped, and unmapped when they are freed.
MAPPED_BYTES = 8 << 20
# The heap keeps at most about this many free bytes at its end.
KEPT_BYTES = 32 << 20
_SET_BY_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def limit_heap() -> bool:
    """Make the heap of this process give back what is freed, and return whether the limits are set.

    Without limits glibc raises the size from which on memory is mapped to that of the largest tensor freed so far, at most 32 MiB, and the
    end of the heap that it keeps to twice as much.  Tensors of a pass then lie in a heap of more than twice the bytes that are live,
    which no budget has room for.  The limits are left as they are if the user set any of them in the environment, and other C libraries
    have none.
    """
    if any(name in os.environ for name in _SET_BY_USER):
        return False
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES))
    return False


def trim_heap() -> None:
    """Give freed memory back to the system, where the C library can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
