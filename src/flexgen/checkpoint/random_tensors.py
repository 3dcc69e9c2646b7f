"""The numbers of random weights, as bytes that can be asked for at any place: blocks of a few MiB, repeated through each tensor."""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from flexgen.checkpoint.headers import PREFIX_BYTES
from flexgen.checkpoint.repository import RepositoryTensors, encode_header
from flexgen.formats.base import RANDOM_DEVIATION, NamedTensor

Bytes = npt.NDArray[np.uint8]

# A prime number of elements: repeated through a matrix, no two rows of a matrix get the same numbers.
_BLOCK_ELEMENTS = 4_194_301
_SAMPLED_BYTES = 4 << 20  # of a part of an encoded tensor
_KEPT_BLOCKS = 4  # blocks of parts of encoded tensors, since several threads read the tensors of a unit at once


class RandomTensors:
    """The random bytes of tensors.  Thread-safe.

    Matrices get normal(0, 0.02) numbers (a block of them, repeated), biases and integers 0, other vectors 1.  What is encoded gets random
    codes and scales (some rows of them, repeated) that are decoded to numbers of about that size.  All are finite.

    Args:
        stored: The tensors.
        dtype: The dtype of all floating-point tensors that are not encoded.
        seed: The seed of the random numbers.

    Raises:
        UnsupportedModelError: Random numbers in the format of the tensors cannot be made.
    """

    def __init__(self, stored: RepositoryTensors, dtype: torch.dtype, seed: int) -> None:
        self._number_format, self._encoded, self._seed = stored.number_format, stored.encoded, seed
        generator = torch.Generator().manual_seed(seed)
        self._normal = _bytes_of(torch.empty(_BLOCK_ELEMENTS).normal_(0, RANDOM_DEVIATION, generator=generator).to(dtype))
        # Each matrix begins at another position of the block, far from the one before.
        matrices = [tensor.name for tensor in stored.tensors if self._is_plain_matrix(tensor)]
        step = _BLOCK_ELEMENTS * 5 // 8
        self._begins = {name: place * step % _BLOCK_ELEMENTS * dtype.itemsize for place, name in enumerate(matrices, start=1)}
        self._block = functools.lru_cache(maxsize=_KEPT_BLOCKS)(self._make_block)
        if (encoded := next((tensor for tensor in stored.tensors if tensor.name in stored.encoded), None)) is not None:
            self._block(encoded)  # a format that cannot is refused now, not by a thread that reads

    def copy(self, tensor: NamedTensor, start: int, out: Bytes) -> None:
        """Write the bytes of a tensor from byte `start` on to `out`."""
        begin = self._begins.get(tensor.name)
        block = self._block(tensor) if begin is None else self._normal
        at = ((begin or 0) + start) % max(len(block), 1)
        while len(out):
            portion = block[at : at + len(out)]
            out[: len(portion)] = portion
            out, at = out[len(portion) :], 0

    def _is_plain_matrix(self, tensor: NamedTensor) -> bool:
        is_matrix = len(tensor.shape) > 1 and tensor.dtype.is_floating_point and "bias" not in tensor.name
        return is_matrix and tensor.name not in self._encoded

    def _make_block(self, tensor: NamedTensor) -> Bytes:
        """Return the bytes that are repeated through a tensor that is no plain matrix."""
        if tensor.name in self._encoded:
            return _bytes_of(self._sampled(tensor))
        value = 1 if tensor.dtype.is_floating_point and "bias" not in tensor.name else 0
        return _bytes_of(torch.full((min(math.prod(tensor.shape), _BLOCK_ELEMENTS),), value, dtype=tensor.dtype))

    def _sampled(self, tensor: NamedTensor) -> torch.Tensor:
        """Return random numbers for an encoded tensor's part, or for so many rows of it as make a block."""
        assert self._number_format is not None
        generator = torch.Generator().manual_seed(self._seed + zlib.crc32(tensor.name.encode()))
        if tensor.shape:
            row_bytes = max(tensor.nbytes // max(tensor.shape[0], 1), 1)
            rows = min(tensor.shape[0], max(_SAMPLED_BYTES // row_bytes, 1))
            tensor = replace(tensor, shape=(rows, *tensor.shape[1:]))
        return self._number_format.sample(tensor, generator).contiguous()


class RandomContents:
    """The bytes of a safetensors file that holds random tensors one after the other.

    Args:
        tensors: The tensors, in the order of the file.
        numbers: Their bytes.

    Attributes:
        head: The length of the header and the header.
        size_bytes: The bytes of the file.
    """

    def __init__(self, tensors: Sequence[NamedTensor], numbers: RandomTensors) -> None:
        header = encode_header(tensors)
        self.head = len(header).to_bytes(PREFIX_BYTES, "little") + header
        self._tensors, self._numbers = tensors, numbers
        # Where each tensor begins, and where the last one ends.
        self._begins = list(itertools.accumulate((tensor.nbytes for tensor in tensors), initial=len(self.head)))
        self.size_bytes = self._begins[-1]

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset` on; those past the end of the file are left as they are."""
        out: Any = np.frombuffer(view, dtype=np.uint8)[: max(self.size_bytes - offset, 0)]
        if offset < len(self.head) and len(out):
            head = np.frombuffer(self.head, dtype=np.uint8)[offset : offset + len(out)]
            out[: len(head)] = head
            out, offset = out[len(head) :], offset + len(head)
        while len(out):
            place = bisect.bisect_right(self._begins, offset) - 1
            portion = out[: self._begins[place + 1] - offset]
            self._numbers.copy(self._tensors[place], offset - self._begins[place], portion)
            out, offset = out[len(portion) :], offset + len(portion)


def _bytes_of(tensor: torch.Tensor) -> Bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy()
