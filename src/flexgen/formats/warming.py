"""Decoding a little of each kind before anything is planned, so that compiling belongs to loading and its memory to the process."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from flexgen.formats.base import Encoding


def smallest_of_each_kind(encodings: Iterable[Encoding]) -> tuple[Encoding, ...]:
    """Return an encoding for each kind of decoder and of its parts' dtypes, the smallest one."""
    found: dict[object, Encoding] = {}
    for each in encodings:
        kind = type(each.format), len(each.shape), tuple(part.tensor.dtype for part in each.parts)
        if kind not in found or math.prod(each.shape) < math.prod(found[kind].shape):
            found[kind] = each
    return tuple(found.values())


def warm_up(encoding: Encoding, dtype: torch.dtype) -> None:
    """Decode one row of zeros on the host, or the whole of it where rows are not stored apart."""
    rows = 1 if encoding.by_rows else encoding.shape[0]
    parts = [torch.zeros(each.nbytes, dtype=torch.uint8).view(each.dtype) for each in encoding.ranges(0, rows)]
    encoding.format.decode(parts, 0, torch.empty((rows, *encoding.shape[1:]), dtype=dtype))
