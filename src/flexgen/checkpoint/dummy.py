"""Random checkpoints from a config alone, for benchmarks and tests of models whose weights are not on this machine.

The files look like those of a repository (original tensor names, per-expert tensors, shards, index), so that reading them
takes the same work as reading the real ones.  Memory stays bounded: no tensor is ever built.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import mmap
import os
from collections.abc import Collection, Iterator, Sequence
from copy import deepcopy
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from flexgen.checkpoint.repository import encode_header, meta_model, saved_tensors, sharded
from flexgen.errors import StorageError
from flexgen.formats.base import NamedTensor
from flexgen.formats.table import stated_format, without_quantization
from flexgen.hub.model_files import INDEX_FILE

_STANDARD_DEVIATION = 0.02
_SCALE = 2.0**-6  # of all blocks, where weights are encoded
_ZEROS, _MIDDLES = ("qzeros", "weight_zero_point"), 0x77777777  # zero points of integer codes: of 4 bits each, about in the middle
# A prime number of elements: repeated through a matrix, no two rows of a matrix get the same numbers.
_BLOCK_ELEMENTS = 4_194_301
_BUFFER_BYTES = 16 << 20


def write_random_checkpoint(
    config: PreTrainedConfig, folder: Path, dtype: torch.dtype, *, seed: int = 0, shard_bytes: int = 2 * 10**9
) -> int:
    """Write config.json and safetensors files with random weights for `config` into `folder`.

    Matrices get normal(0, 0.02) numbers (a block of them, repeated), biases and integers 0, other vectors 1.  Tied
    weights are written once.  Weights are encoded in the format that the config states.  The files are readable by their owner only.

    Args:
        config: The config of a causal language model.
        folder: The folder to write to; it is created if necessary, and must not hold weights yet.
        dtype: The dtype of all floating-point tensors.
        seed: The seed of the random numbers.
        shard_bytes: The most bytes of one file, unless a single tensor takes more.

    Returns:
        The bytes of all tensors.

    Raises:
        StorageError: A file exists already or cannot be written.
        UnsupportedModelError: The format of the weights is not known, or not from the config alone.
    """
    model = meta_model(without_quantization(config), dtype)
    encoded = _encoded(model, config, dtype)
    files = sharded([part for parts in encoded for part in parts], shard_bytes)
    numbers = _Numbers(dtype, seed, scales={part.name for parts in encoded for part in parts[1:]})
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
        described.architectures, described.dtype = [type(model).__name__], dtype
        _write_text(folder / "config.json", described.to_json_string())
    except OSError as error:
        raise StorageError(f"{folder}: a random checkpoint of {total_bytes} bytes could not be written: {error}") from error
    return total_bytes


def checkpoint_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Return the bytes of all tensors that `write_random_checkpoint` would write."""
    model = meta_model(without_quantization(config), dtype)
    return sum(part.nbytes for parts in _encoded(model, config, dtype) for part in parts)


def _encoded(model: PreTrainedModel, config: PreTrainedConfig, dtype: torch.dtype) -> list[list[NamedTensor]]:
    """Return what is stored for each tensor of a repository in the format that the config states: numbers or codes, then their scales."""
    tensors, number_format = saved_tensors(model, dtype), stated_format(config)
    return [[tensor] if number_format is None else number_format.encode(tensor) for tensor in tensors]


class _Numbers:
    """The random bytes of tensors, in portions."""

    def __init__(self, dtype: torch.dtype, seed: int, scales: Collection[str]) -> None:
        self._scales = scales
        block = torch.empty(_BLOCK_ELEMENTS).normal_(0, _STANDARD_DEVIATION, generator=torch.Generator().manual_seed(seed))
        self._random = {dtype: _bytes_of(block.to(dtype))}
        codes = (block / _SCALE).to(torch.float8_e4m3fn)
        self._random[torch.float8_e4m3fn] = _bytes_of(codes)
        for packed in (torch.uint8, torch.int8):  # two codes of 4 bits each: of E2M1 those up to 1.5
            self._random[packed] = _bytes_of(codes.view(torch.uint8) * 37 & 0xBB)
        words = torch.randint(-(1 << 31), 1 << 31, (_BLOCK_ELEMENTS,), dtype=torch.int64, generator=torch.Generator().manual_seed(seed))
        self._random[torch.int32] = _bytes_of(words.to(torch.int32))
        self._begin = 0  # where the last tensor begins in the block, in elements

    def portions(self, tensor: NamedTensor) -> Iterator[memoryview]:
        """Yield the bytes of `tensor` in portions."""
        if len(tensor.shape) > 1 and tensor.dtype in self._random and not self._is_constant(tensor.name):
            # Each tensor begins at another position of the block, far from the previous one.
            self._begin = (self._begin + _BLOCK_ELEMENTS * 5 // 8) % _BLOCK_ELEMENTS
            source, begin = self._random[tensor.dtype], self._begin * tensor.dtype.itemsize
        else:
            source, begin = _bytes_of(self._constant(tensor).expand(min(math.prod(tensor.shape), _BLOCK_ELEMENTS)).contiguous()), 0
        left = tensor.nbytes
        while left:
            portion = source[begin : begin + left]
            yield portion
            left -= len(portion)
            begin = 0

    def _is_constant(self, name: str) -> bool:
        return "bias" in name or name in self._scales

    def _constant(self, tensor: NamedTensor) -> torch.Tensor:
        """Return what all numbers of a tensor are, (1,)."""
        if tensor.name.endswith(_ZEROS) and tensor.dtype == torch.int32:
            return torch.tensor([_MIDDLES], dtype=torch.int32)
        if tensor.name in self._scales and not tensor.name.endswith("_scale_2"):  # which multiplies the scales
            power = tensor.dtype == torch.uint8  # of two, in a plain byte
            return torch.tensor([127 + int(math.log2(_SCALE)) if power else _SCALE]).to(tensor.dtype)
        return torch.tensor([1 if tensor.dtype.is_floating_point and "bias" not in tensor.name else 0], dtype=tensor.dtype)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data


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
