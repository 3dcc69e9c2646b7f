"""The weights that are converted: their identity, their headers, and their numbers, read in portions ahead of their use."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flexgen.base.quantities import MIB, align_up
from flexgen.checkpoint.files import Headers
from flexgen.checkpoint.pieces import whole
from flexgen.checkpoint.sources import ParameterSource
from flexgen.checkpoint.stored import stored_headers
from flexgen.errors import CheckpointError, UnsupportedModelError
from flexgen.formats.base import StoredTensor
from flexgen.formats.table import check_supported_number_format, refuse_quantization, stated_format
from flexgen.hub.config import read_config
from flexgen.hub.diagnose import other_quantization
from flexgen.hub.model_files import ModelFiles, weight_files, weight_stamps
from flexgen.io.aligned import ALIGNMENT, AlignedBuffer
from flexgen.io.direct_io import FileSet
from flexgen.quantize.rounding import ROUNDED_AS_STORED

# Numbers of a block, in float32 16 MiB: of two blocks, of the bytes read for one, and of what two become, 64 MiB are in memory.
BLOCK_ELEMENTS = 4 * MIB
_COPIED_BYTES = 8 * MIB


def identity_of(files: ModelFiles) -> str:
    """Return what tells the weights of a model from others: its commit, or names, sizes and times of files, with its config.

    Raises:
        UnsupportedModelError: See `check_convertible`.
    """
    check_convertible(files)
    hasher = hashlib.blake2b(digest_size=16)
    hasher.update(json.dumps(files.config, sort_keys=True).encode())
    if files.commit is not None:
        return f"{files.name} at {files.commit}, config {hasher.hexdigest()[:16]}"
    for name, size, changed in weight_stamps(files):
        hasher.update(f"{name} {size} {changed}\n".encode())
    return f"files {hasher.hexdigest()}"


def check_convertible(files: ModelFiles) -> None:
    """Check that the weights of a model are in files that can be converted.

    Raises:
        UnsupportedModelError: They are in GGUF.
    """
    if files.gguf is not None:
        raise UnsupportedModelError(
            f"{files.name} is in GGUF, whose weights are not converted: run it as it is, or convert the repository that it was made from"
        )


def weight_bytes(files: ModelFiles) -> int:
    """Return the bytes of all files of weights."""
    return sum((files.folder / name).stat().st_size for name in weight_files(files.folder))


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model whose weights are converted.

    Attributes:
        files: Its files.
        config: Its transformers config.
        headers: Its tensors, decoded where they are in a low-bit format.
    """

    files: ModelFiles
    config: Any
    headers: Headers


def open_source(files: ModelFiles) -> Source:
    """Read the config and the headers of a model.

    Raises:
        ModelError: They cannot be used, or the weights are in a format that is not decoded.
    """
    check_convertible(files)
    if (tool := other_quantization(files.config)) is not None:
        raise refuse_quantization({"quant_method": tool})
    config = read_config(files)
    check_supported_number_format(config)
    return Source(files=files, config=config, headers=decoded_headers(stored_headers(files), config))


def decoded_headers(headers: Headers, config: Any) -> Headers:
    """Return the headers with tensors of a low-bit format in the dtype of the config.

    Raises:
        UnsupportedModelError: The weights are in GGUF, whose names for tensors are not those of transformers.
        CheckpointError: The tensors are not stored as their format requires.
    """
    if headers.architecture is not None:
        raise UnsupportedModelError(f"{headers.folder}: weights in GGUF are not converted; its own types of 4 and 8 bits run as they are")
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return headers.decoded(stated_format(config), stored if isinstance(stored, torch.dtype) else torch.bfloat16)


class _Buffer:
    """Memory that is read into again and again, so that the system does not have to clear new memory each time.

    Files are read past the page cache where their file system allows it: each byte is needed once, and a page of the cache costs more CPU
    time than its transfer.

    Args:
        files: The files, shared by all buffers.
    """

    def __init__(self, files: FileSet) -> None:
        self._files, self._memory = files, AlignedBuffer(0)

    def bytes(self, nbytes: int) -> torch.Tensor:
        """Return the first bytes of the memory, which grows if it has to."""
        if self._memory.size_bytes < nbytes:
            self._memory = AlignedBuffer(0)
            self._memory = AlignedBuffer(nbytes)
        return self._memory.tensor[:nbytes]

    def read(self, path: Path, offset: int, nbytes: int, dtype: torch.dtype) -> torch.Tensor:
        """Return numbers of a file that begin at an offset, flattened.

        Raises:
            CheckpointError: The file ends too early.
            StorageError: The file cannot be read.
        """
        skipped = offset % ALIGNMENT
        memory, file = self.bytes(align_up(skipped + nbytes, ALIGNMENT)), self._files[path]
        if file.size_bytes < offset + nbytes:
            raise CheckpointError(f"{path}: ends before byte {offset + nbytes}; it was longer when its header was read")
        file.read_into(memory.numpy().data, offset - skipped)
        numbers = memory[skipped : skipped + nbytes]
        return (numbers.clone() if skipped % dtype.itemsize else numbers).view(dtype)


_Read = Callable[[_Buffer], torch.Tensor]


class Reader:
    """Reads tensors on a thread of its own, one portion ahead of its use.  Closing it ends the thread."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="flexgen-convert-read")
        self._files = FileSet(tell_plain=False)
        self._buffers = _Buffer(self._files), _Buffer(self._files)

    def close(self) -> None:
        """End the thread, and close the files."""
        self._thread.shutdown(cancel_futures=True)
        self._files.close()

    def portions(self, wanted: Iterable[tuple[StoredTensor, int]]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield tensors in portions, one tensor after the other; a portion is good until the next one is asked for.

        Args:
            wanted: The tensors, each with what its portions are.  0: bytes to copy, as they are stored, or decoded if they are in a low-bit
                format.  A number of rows: rows of a matrix that begin at a multiple of it, as they are stored, or in float32 if they
                are in a low-bit format or in one that is not rounded as it is.

        Yields:
            The index of the tensor, and its next portion.

        Raises:
            CheckpointError: A file cannot be read, or ends too early.
            StorageError: Reading fails.
        """
        reads = (
            (index, read)
            for index, (tensor, granule_rows) in enumerate(wanted)
            for read in (_reads_of_rows(tensor, granule_rows) if granule_rows else _reads_of_bytes(tensor))
        )
        ahead: tuple[int, Future[torch.Tensor]] | None = None
        for (index, read), buffer in zip(reads, itertools.cycle(self._buffers), strict=False):
            following = index, self._thread.submit(read, buffer)
            if ahead is not None:
                yield ahead[0], ahead[1].result()
            ahead = following
        if ahead is not None:
            yield ahead[0], ahead[1].result()


def _reads_of_rows(tensor: StoredTensor, granule_rows: int) -> Iterator[_Read]:
    as_stored = tensor.encoding is None and tensor.dtype in ROUNDED_AS_STORED
    return _reads_of_blocks(tensor, granule_rows, tensor.dtype if as_stored else torch.float32)


def _reads_of_bytes(tensor: StoredTensor) -> Iterator[_Read]:
    if tensor.encoding is not None:
        for read in _reads_of_blocks(tensor, 1, tensor.dtype):
            yield lambda buffer, read=read: read(buffer).view(-1).view(torch.uint8)
        return
    for start in range(0, tensor.nbytes, _COPIED_BYTES):
        yield partial(_read_range, tensor.path, tensor.offset + start, min(_COPIED_BYTES, tensor.nbytes - start))


def _reads_of_blocks(tensor: StoredTensor, granule_rows: int, dtype: torch.dtype) -> Iterator[_Read]:
    source = ParameterSource(name=tensor.name, shape=tensor.shape, dtype=tensor.dtype, pieces=whole(tensor))
    rows = tensor.shape[0]
    step = max(BLOCK_ELEMENTS // max(math.prod(tensor.shape[1:]), 1) // granule_rows, 1) * granule_rows if source.sliceable else rows
    for start in range(0, rows, max(step, 1)):
        yield partial(_read_source, source.rows(start, min(start + step, rows)) if source.sliceable else source, dtype)


def _read_source(source: ParameterSource, dtype: torch.dtype, buffer: _Buffer) -> torch.Tensor:
    if source.is_view and source.dtype == dtype:
        stored = source.ranges[0]
        return buffer.read(stored.path, stored.offset, stored.nbytes, dtype).view(source.shape)
    numbers = buffer.bytes(math.prod(source.shape) * dtype.itemsize).view(dtype).view(source.shape)
    source.read(numbers)
    return numbers


def _read_range(path: Path, offset: int, nbytes: int, buffer: _Buffer) -> torch.Tensor:
    return buffer.read(path, offset, nbytes, torch.uint8)
