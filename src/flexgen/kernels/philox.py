"""The random numbers by which tokens are drawn: on the host one row at a time, on a device all rows of a batch, from the same bits.

The number of an id depends on (seed, position, id) only.  They are streams of the counter-based generator Philox-4x64-10 (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011): the key is the seed, and the counter begins at a place of the position's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from flexgen.kernels.triton_support import in_triton

UINT64 = (1 << 64) - 1
_ROUNDS = 10
_WORDS = 4  # of 64 bits that a counter gives
_MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
_KEY_STEPS = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
_LOW = (1 << 32) - 1
_DROPPED_BITS = 12  # of 64, so that 52 and a half lie exactly between 0 and 2**52


def exponentials(seed: int, position: int, ids: np.ndarray | int) -> np.ndarray:
    """Return positive numbers, float64, drawn from the exponential distribution of mean 1.

    Args:
        seed: The seed; its lowest 64 bits count.
        position: The position in the sequence, at least 0.
        ids: The ids, ascending, or the number of ids from 0 on.
    """
    size = ids if isinstance(ids, int) else int(ids[-1]) + 1
    bits = np.random.Philox(key=seed & UINT64, counter=position << 64).random_raw(size)
    if not isinstance(ids, int):
        bits = bits[ids]
    return -np.log(((bits >> np.uint64(_DROPPED_BITS)) + 0.5) * 2.0**-52)  # of numbers between 0 and 1, both excluded


def exponential_rows(seeds: Tensor, positions: Tensor, size: int) -> Tensor:
    """Return the numbers of `exponentials` for the ids from 0 on of several rows, float64 (rows, size), where the seeds are.

    Args:
        seeds: The lowest 64 bits of the seeds, int64 (rows, 1).
        positions: The positions, int64 (rows, 1).
        size: The number of ids.
    """
    bits = (random_bits(seeds, positions, size) >> _DROPPED_BITS) & ((1 << (64 - _DROPPED_BITS)) - 1)
    return ((bits.double() + 0.5) * 2.0**-52).log().neg()


@functools.cache
def exponential_rows_on(device: torch.device) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Return what computes `exponential_rows` on a device: a kernel in Triton where there can be one, which is a single launch."""
    if not in_triton(device, "random numbers", otherwise="in torch's operations"):
        return exponential_rows
    from flexgen.kernels.triton.random_numbers import exponential_rows as compiled

    return compiled


def random_bits(seeds: Tensor, positions: Tensor, size: int) -> Tensor:
    """Return the first numbers of the streams of several rows, unsigned integers of 64 bits as int64 (rows, size).

    Words that all ids, or all rows, have in common are (rows, 1) or (1, counters) for as long as they are the same.

    Args:
        seeds: The lowest 64 bits of the seeds, int64 (rows, 1).
        positions: The positions, int64 (rows, 1).
        size: The number of ids.
    """
    counters = torch.arange(1, -(-size // _WORDS) + 1, device=seeds.device)[None]  # NumPy counts before it draws
    zero = counters.new_zeros(1, 1)
    words, keys = (counters, positions, zero, zero), (seeds, zero)
    for number in range(_ROUNDS):
        if number:
            keys = keys[0] + signed(_KEY_STEPS[0]), keys[1] + signed(_KEY_STEPS[1])
        first, second = _product(words[0], _MULTIPLIERS[0]), _product(words[2], _MULTIPLIERS[1])
        words = second[0] ^ words[1] ^ keys[0], second[1], first[0] ^ words[3] ^ keys[1], first[1]
    return torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :size]


def signed(number: int) -> int:
    """Return the number in [-2**63, 2**63) that has the same lowest 64 bits."""
    return ((number & UINT64) ^ (1 << 63)) - (1 << 63)


def _product(numbers: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the higher and the lower 64 bits of the products of unsigned 64-bit numbers and a factor, all as int64, which wraps.

    Higher bits are summed from products of 32-bit halves, none of whose sums has more than 64 bits.
    """
    low, high = numbers & _LOW, (numbers >> 32) & _LOW
    factor_low, factor_high = factor & _LOW, factor >> 32
    middle = high * factor_low + ((low * factor_low >> 32) & _LOW)
    other = low * factor_high + (middle & _LOW)
    return high * factor_high + ((middle >> 32) & _LOW) + ((other >> 32) & _LOW), numbers * signed(factor)
