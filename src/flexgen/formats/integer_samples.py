"""Random stored numbers of the formats of integer codes: every code is as likely as every other, and all scales are equal."""

from __future__ import annotations

import math

import torch

from flexgen.formats.base import RANDOM_DEVIATION, NamedTensor

_WORD_BITS = 32
_NO_GROUP = -1  # as the group of a column: groups are of adjacent columns


def sample_integers(stored: NamedTensor, bits: int, generator: torch.Generator) -> torch.Tensor:
    """Return random numbers of a part, as `NumberFormat.sample` does.

    Args:
        stored: The stored tensor; the last part of its name says what it holds.
        bits: The bits of a code.
        generator: The source of random numbers.
    """
    field = stored.name.rpartition(".")[2]
    if field in ("scales", "weight_scale"):
        return torch.full(stored.shape, RANDOM_DEVIATION * math.sqrt(12) / (1 << bits), dtype=stored.dtype)
    if field in ("qzeros", "weight_zero_point"):
        return _middles(stored, bits, generator)
    if stored.dtype.is_floating_point:  # scales of inputs
        return torch.ones(stored.shape, dtype=stored.dtype)
    if field in ("g_idx", "weight_shape", "weight_g_idx"):
        return torch.full(stored.shape, _NO_GROUP if field == "weight_g_idx" else 0, dtype=stored.dtype)
    return _any(stored, generator)


def _middles(stored: NamedTensor, bits: int, generator: torch.Generator) -> torch.Tensor:
    """Return zero points near the middle of all codes; where they cross the borders of words, any."""
    if stored.dtype != torch.int32:
        return torch.zeros(stored.shape, dtype=stored.dtype)
    if _WORD_BITS % bits:
        return _any(stored, generator)
    middle = (1 << (bits - 1)) - 1
    word = sum(middle << shift for shift in range(0, _WORD_BITS, bits))
    return torch.full(stored.shape, word, dtype=torch.int32)


def _any(stored: NamedTensor, generator: torch.Generator) -> torch.Tensor:
    """Return integers of which each is as likely as every other."""
    *rest, last = stored.shape
    drawn = torch.randint(256, (*rest, last * stored.dtype.itemsize), dtype=torch.uint8, generator=generator)
    return drawn.view(stored.dtype)
