"""Memory that is freed and allocated again costs no page faults once glibc was told to keep it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from flexgen.base.heap import give_back_freed, keep_freed

def faults(rounds=3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        pieces = [torch.zeros(16 * 2**20, dtype=torch.uint8) + 1 for _ in range(12)]
        del pieces
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

own = faults()
keep_freed(400 * 2**20)
faults()
kept = faults()
give_back_freed()
print(own, kept, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="knows glibc only")
def test_freed_memory_is_kept() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    own, kept, given_back = map(int, done.stdout.split())
    assert kept < own / 10
    assert kept < given_back / 10
