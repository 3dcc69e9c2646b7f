"""Random stored numbers: what a repository in a format might hold, for measuring how fast it is decoded.  Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from flexgen.errors import EngineError
from flexgen.formats.base import Encoding, NamedTensor, NumberFormat, StoredTensor


def encoded_as(number_format: NumberFormat, tensor: NamedTensor) -> Encoding:
    """Return how a repository in a format would store a tensor; its files do not exist.

    Raises:
        EngineError: The format does not encode this tensor.
    """
    stored = {
        each.name: StoredTensor(name=each.name, path=Path(), offset=0, nbytes=each.nbytes, dtype=each.dtype, shape=each.shape)
        for each in number_format.encode(tensor)
    }
    found = number_format.find(stored)
    if tensor.name not in found:
        raise EngineError(f"{number_format.name} does not encode {tensor.name} of shape {tensor.shape}")
    return found[tensor.name]


def sampled_parts(number_format: NumberFormat, encoding: Encoding, *, seed: int = 0) -> Sequence[torch.Tensor]:
    """Return random numbers for all rows of a tensor that a format encodes, one flat tensor for each part, as `decode` takes them.

    Raises:
        UnsupportedModelError: Random weights in this format cannot be made.
    """
    generator = torch.Generator().manual_seed(seed)
    named = [NamedTensor(part.tensor.name, part.tensor.shape, part.tensor.dtype) for part in encoding.parts]
    return [number_format.sample(each, generator).flatten() for each in named]
