"""Random checkpoints from a config alone, for benchmarks and tests of models whose weights are not on this machine.

The files look like those of a repository (original tensor names, per-expert tensors, shards, index), in the number format that the config
states, so that reading them takes the same work as reading the real ones.  Memory stays bounded: no large tensor is ever built.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from flexgen.checkpoint.repository import RepositoryTensors, encode_header, sharded
from flexgen.errors import StorageError
from flexgen.formats.base import RANDOM_DEVIATION, NamedTensor
from flexgen.hub.model_files import INDEX_FILE

# A prime number of elements: repeated through a matrix, no two rows of a matrix get the same numbers.
_BLOCK_ELEMENTS = 4_194_301
_BUFFER_BYTES = 16 << 20
_SAMPLED_BYTES = 4 << 20  # of a part of an encoded tensor


def write_random_checkpoint(
    config: PreTrainedConfig, folder: Path, dtype: torch.dtype, *, seed: int = 0, shard_bytes: int = 2 * 10**9
) -> int:
    """Write config.json and safetensors files with random weights for `config` into `folder`.

    Matrices get normal(0, 0.02) numbers (a block of them, repeated), biases and integers 0, other vectors 1.  What the config's number
    format encodes gets random codes and scales (some rows of them, repeated) that are decoded to numbers of about that size.  Tied weights
    are written once.  The files are readable by their owner only.

    Args:
        config: The config of a causal language model.
        folder: The folder to write to; it is created if necessary, and must not hold weights yet.
        dtype: The dtype of all floating-point tensors that are not encoded.
        seed: The seed of the random numbers.
        shard_bytes: The most bytes of one file, unless a single tensor takes more.

    Returns:
        The bytes of all tensors.

    Raises:
        StorageError: A file exists already or cannot be written.
        UnsupportedModelError: Random weights in the format that the config states cannot be made.
    """
    stored = RepositoryTensors.of(config, dtype)
    files = sharded(stored.tensors, shard_bytes)
    numbers = _Numbers(stored, dtype, seed)
    total_bytes = sum(tensor.nbytes for tensors in files.values() for tensor in tensors)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, tensors in files.items():
            with _NewFile(folder / name) as file:
                _write_shard(file, tensors, numbers)
        if len(files) > 1:
            weight_map = {tensor.name: name for name, tensors in files.items() for tensor in tensors}
            index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
            _write_text(folder / INDEX_FILE, json.dumps(index, indent=2))
        described = deepcopy(config)
        described.architectures, described.dtype = [stored.architecture], dtype
        _write_text(folder / "config.json", described.to_json_string())
    except OSError as error:
        raise StorageError(f"{folder}: a random checkpoint of {total_bytes} bytes could not be written: {error}") from error
    return total_bytes


def checkpoint_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Return the bytes of all tensors that `write_random_checkpoint` would write."""
    return sum(tensor.nbytes for tensor in RepositoryTensors.of(config, dtype).tensors)


class _Numbers:
    """The random bytes of tensors, in portions."""

    def __init__(self, stored: RepositoryTensors, dtype: torch.dtype, seed: int) -> None:
        self._number_format, self._encoded = stored.number_format, stored.encoded
        self._generator = torch.Generator().manual_seed(seed)
        block = torch.empty(_BLOCK_ELEMENTS).normal_(0, RANDOM_DEVIATION, generator=self._generator)
        self._random = _bytes_of(block.to(dtype))
        self._begin = 0  # where the last tensor begins in the block, in elements

    def portions(self, tensor: NamedTensor) -> Iterator[memoryview]:
        """Yield the bytes of `tensor` in portions."""
        if tensor.name in self._encoded:
            source, begin = _bytes_of(self._sampled(tensor)), 0
        elif len(tensor.shape) > 1 and tensor.dtype.is_floating_point and "bias" not in tensor.name:
            # Each tensor begins at another position of the block, far from the previous one.
            self._begin = (self._begin + _BLOCK_ELEMENTS * 5 // 8) % _BLOCK_ELEMENTS
            source, begin = self._random, self._begin * tensor.dtype.itemsize
        else:
            value = 1 if tensor.dtype.is_floating_point and "bias" not in tensor.name else 0
            source, begin = _bytes_of(torch.full((min(math.prod(tensor.shape), _BLOCK_ELEMENTS),), value, dtype=tensor.dtype)), 0
        left = tensor.nbytes
        while left:
            portion = source[begin : begin + left]
            yield portion
            left -= len(portion)
            begin = 0

    def _sampled(self, tensor: NamedTensor) -> torch.Tensor:
        """Return random numbers for an encoded tensor's part, or for so many rows of it as make a block."""
        assert self._number_format is not None
        if tensor.shape:
            row_bytes = max(tensor.nbytes // max(tensor.shape[0], 1), 1)
            rows = min(tensor.shape[0], max(_SAMPLED_BYTES // row_bytes, 1))
            tensor = replace(tensor, shape=(rows, *tensor.shape[1:]))
        return self._number_format.sample(tensor, self._generator).contiguous()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _write_shard(file: _NewFile, tensors: Sequence[NamedTensor], numbers: _Numbers) -> None:
    header = encode_header(tensors)
    file.write(len(header).to_bytes(8, "little") + header)
    for tensor in tensors:
        for portion in numbers.portions(tensor):
            file.write(portion)


def _write_text(path: Path, text: str) -> None:
    with _NewFile(path) as file:
        file.write(text.encode())


class _NewFile:
    """A new file readable by its owner only, written in large pieces that bypass the page cache where the file system allows it.

    Through the page cache, writing a benchmark's checkpoint takes three times as long and evicts everything else from it.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o600)
        self._set_direct(True)
        self._buffer = mmap.mmap(-1, _BUFFER_BYTES)  # page-aligned, as direct writes require
        self._filled = 0

    def __enter__(self) -> _NewFile:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        try:
            if kind is None:
                self._set_direct(False)  # the rest is not a whole number of pages
                self._flush()
        finally:
            os.close(self._descriptor)
            self._buffer.close()

    def write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            portion = rest[: _BUFFER_BYTES - self._filled]
            self._buffer[self._filled : self._filled + len(portion)] = portion
            self._filled += len(portion)
            rest = rest[len(portion) :]
            if self._filled == _BUFFER_BYTES:
                self._flush()

    def _flush(self) -> None:
        with memoryview(self._buffer) as buffer:
            done = 0
            while done < self._filled:
                done += os.write(self._descriptor, buffer[done : self._filled])
        self._filled = 0

    def _set_direct(self, direct: bool) -> None:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        wanted = flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT
        with contextlib.suppress(OSError):  # the file system may not support direct writes
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, wanted)
