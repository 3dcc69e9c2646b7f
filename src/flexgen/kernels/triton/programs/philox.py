"""Exponentially distributed numbers from streams of Philox-4x64-10, which Triton has."""

from __future__ import annotations

import triton
import triton.language as tl

WORDS = tl.constexpr(4)  # numbers that a counter gives
STEP = tl.constexpr(2.0**-52)  # between numbers of 52 bits


@triton.jit
def store_numbers(bits, out, ids, size):
    """Store what unsigned numbers of 64 bits are as numbers of the exponential distribution."""
    between = ((bits >> 12).to(tl.int64).to(tl.float64) + 0.5) * STEP  # 0 and 1, both excluded
    tl.store(out + ids, -tl.log(between), mask=ids < size)


@triton.jit(do_not_specialize=["size"])
def exponential_rows(seeds, positions, out, size, COUNTERS: tl.constexpr):
    """Fill a part of a row: program_id(0) of the rows, program_id(1) of runs of COUNTERS counters."""
    row = tl.program_id(0).to(tl.int64)
    counters = tl.program_id(1).to(tl.int64) * COUNTERS + tl.arange(0, COUNTERS)
    zero, own = tl.zeros([COUNTERS], tl.int64), out + row * size
    first, second, third, fourth = tl.philox(tl.load(seeds + row), counters + 1, zero + tl.load(positions + row), zero, zero)
    store_numbers(first, own, counters * WORDS, size)
    store_numbers(second, own, counters * WORDS + 1, size)
    store_numbers(third, own, counters * WORDS + 2, size)
    store_numbers(fourth, own, counters * WORDS + 3, size)
