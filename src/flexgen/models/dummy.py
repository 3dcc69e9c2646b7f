"""A checkpoint with random weights, from a config alone: for benchmarks and tests of models one has no weights of.

The files look like those of a repository (original tensor names, per-expert tensors, shards, index), so that whoever reads
them does the work it would do on the real ones.  Memory stays bounded: no tensor is ever built.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from flexgen.errors import StorageError
from flexgen.models.folder import INDEX_FILE, SINGLE_FILE
from flexgen.models.headers import DTYPES
from flexgen.sizes import align_up

_STANDARD_DEVIATION = 0.02
# A prime number of elements: repeated through a matrix, no row meets the same numbers twice.
_BLOCK_ELEMENTS = 4_194_301
_BUFFER_BYTES = 16 << 20
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_random_checkpoint(
    config: PreTrainedConfig, folder: Path, dtype: torch.dtype, *, seed: int = 0, shard_bytes: int = 2 * 10**9
) -> int:
    """Write config.json and safetensors files with random weights for `config` into `folder`.

    Matrices get normal(0, 0.02) numbers (a block of them, repeated), biases and integers 0, other vectors 1.  Tied
    weights are written once.  Files are readable by their owner only.

    Args:
        config: of a causal language model.
        folder: created if need be; must not hold weights yet.
        dtype: of all floating-point tensors.
        shard_bytes: tensors of one file take at most this much, unless a single one takes more.

    Returns:
        bytes of all tensors.

    Raises:
        StorageError: when a file exists already or cannot be written.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    shards = _shards(_tensors(model, dtype), shard_bytes)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE_FILE]
    numbers = _Numbers(dtype, seed)
    total_bytes = sum(tensor.nbytes for shard in shards for tensor in shard)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, shard in zip(names, shards, strict=True):
            with _NewFile(folder / name) as file:
                _write_shard(file, shard, numbers)
        if len(shards) > 1:
            weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
            _write_text(folder / INDEX_FILE, json.dumps(index, indent=2))
        described = deepcopy(config)
        described.architectures, described.dtype = [type(model).__name__], dtype
        _write_text(folder / "config.json", described.to_json_string())
    except OSError as error:
        raise StorageError(f"{folder}: a random checkpoint of {total_bytes} bytes could not be written: {error}") from error
    return total_bytes


def checkpoint_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of all tensors that `write_random_checkpoint` would write."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return sum(tensor.nbytes for tensor in _tensors(model, dtype))


def _tensors(model: PreTrainedModel, dtype: torch.dtype) -> list[_Tensor]:
    """What `save_pretrained` would store, without the numbers."""
    ignored = model._keys_to_ignore_on_save or ()
    state = {name: x for name, x in model.state_dict().items() if name not in ignored}
    state = revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))
    return [_Tensor(name, tuple(x.shape), dtype if x.is_floating_point() else x.dtype) for name, x in state.items()]


def _shards(tensors: Iterable[_Tensor], shard_bytes: int) -> list[list[_Tensor]]:
    shards: list[list[_Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


class _Numbers:
    """The bytes of tensors, in portions."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        block = torch.empty(_BLOCK_ELEMENTS).normal_(0, _STANDARD_DEVIATION, generator=torch.Generator().manual_seed(seed))
        self._random = _bytes_of(block.to(dtype))
        self._begin = 0  # of the last tensor, in elements

    def portions(self, tensor: _Tensor) -> Iterator[memoryview]:
        """The bytes of `tensor`, one after the other."""
        if len(tensor.shape) > 1 and tensor.dtype.is_floating_point and "bias" not in tensor.name:
            # Each tensor begins elsewhere in the block, far from the one before.
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


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data


def _write_shard(file: _NewFile, tensors: Iterable[_Tensor], numbers: _Numbers) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded = encoded.ljust(align_up(len(encoded), 8))
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for tensor in tensors:
        for portion in numbers.portions(tensor):
            file.write(portion)


def _write_text(path: Path, text: str) -> None:
    with _NewFile(path) as file:
        file.write(text.encode())


class _NewFile:
    """A new file for its owner alone, written in large pieces past the page cache where the file system can do that.

    (Through the page cache a benchmark's checkpoint takes three times as long, and pushes everything else out of it.)
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o600)
        self._set_direct(True)
        self._buffer = mmap.mmap(-1, _BUFFER_BYTES)  # page-aligned, as direct writes ask
        self._filled = 0

    def __enter__(self) -> _NewFile:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        try:
            if kind is None:
                self._set_direct(False)  # what is left is no whole number of pages
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
        with contextlib.suppress(OSError):  # a file system without direct writes
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, wanted)
