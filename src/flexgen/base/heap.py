"""What the C library does with freed memory: this knows glibc, and does nothing where another one is used."""

from __future__ import annotations

import contextlib
import ctypes

from flexgen.base.quantities import MIB

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGEST_MMAP_THRESHOLD = 32 * MIB  # to which glibc raises it by itself as such pieces are freed; the other is twice as large then
_LARGEST_INT = 2**31 - 1


def keep_freed(limit_bytes: int) -> None:
    """Let freed memory at the end of the heap stay with the process, up to a limit.

    A pass frees the outputs of one layer and allocates those of the next: what is given back to the system in between comes again as page
    faults.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        library.mallopt(_TRIM_THRESHOLD, min(max(limit_bytes, 2 * _LARGEST_MMAP_THRESHOLD), _LARGEST_INT))


def give_back_freed() -> None:
    """Give freed memory back to the system, now and when it becomes more than glibc keeps by itself."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)
        library.malloc_trim(0)
