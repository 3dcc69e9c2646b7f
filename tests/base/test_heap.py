"""Freed memory goes back to the system, and the user's own limits stay."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap has limits to set")

# Blocks of 20 MiB are freed below small ones that live on; prints whether limits were set, and the bytes that stayed.
PROGRAM = """
import ctypes
import psutil
from flexgen.base.heap import limit_heap

was_set = limit_heap()
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
c.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def filled(size):
    block = c.malloc(size)
    c.memset(block, 1, size)
    return block

before = psutil.Process().memory_info().rss
c.free(filled(20 << 20))
for _ in range(2):
    blocks = [(filled(20 << 20), filled(100 << 10)) for _ in range(10)]
    for large, _ in blocks:
        c.free(large)
print(was_set, psutil.Process().memory_info().rss - before)
"""


def run(**environment: str) -> tuple[bool, int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=clean | environment, capture_output=True, text=True, check=True)
    was_set, kept = done.stdout.split()
    return was_set == "True", int(kept)


def test_large_blocks_are_given_back():
    was_set, kept = run()
    assert was_set
    assert kept < 40 << 20


def test_the_users_limits_stay():
    was_set, kept = run(MALLOC_MMAP_THRESHOLD_=str(32 << 20))
    assert not was_set
    assert kept > 100 << 20
