"""The weights that are converted: their identity, their headers, and their numbers, read in blocks of rows ahead of their use."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from flexgen.base.parallel import Parallel
from flexgen.base.quantities import MIB
from flexgen.checkpoint.files import Headers
from flexgen.checkpoint.pieces import whole
from flexgen.checkpoint.sources import ParameterSource, read_bytes
from flexgen.checkpoint.stored import stored_headers
from flexgen.errors import UnsupportedModelError
from flexgen.formats.base import StoredTensor
from flexgen.formats.table import check_supported_number_format, refuse_quantization, stated_format
from flexgen.hub.config import read_config
from flexgen.hub.diagnose import other_quantization
from flexgen.hub.model_files import ModelFiles, weight_files, weight_stamps

# Numbers of a block, in float32 16 MiB: of two blocks, of the bytes read for one, and of what one becomes, 64 MiB are in memory.
BLOCK_ELEMENTS = 4 * MIB
_COPIED_BYTES = 16 * MIB


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


class Block:
    """Rows of a tensor.

    Attributes:
        start: The first row.
        stop: The row after the last one.
        numbers: The rows in float32.
    """

    __slots__ = ("numbers", "start", "stop")

    def __init__(self, start: int, stop: int, numbers: torch.Tensor) -> None:
        self.start, self.stop, self.numbers = start, stop, numbers


class Reader:
    """Reads tensors on a thread of its own, one block ahead of its use.  Closing it ends the thread.

    Args:
        parallel: Runs the loops of decoding.
    """

    def __init__(self, parallel: Parallel) -> None:
        self._parallel = parallel
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="flexgen-convert-read")

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def blocks(self, tensor: StoredTensor, granule_rows: int) -> Iterator[Block]:
        """Yield the rows of a matrix in float32, in blocks that begin at multiples of `granule_rows`.

        Raises:
            CheckpointError: A file cannot be read.
        """
        source = ParameterSource(name=tensor.name, shape=tensor.shape, dtype=tensor.dtype, pieces=whole(tensor))
        rows = tensor.shape[0]
        step = max(BLOCK_ELEMENTS // max(tensor.shape[1], 1) // granule_rows, 1) * granule_rows if source.sliceable else rows
        ahead = None
        for start in range(0, rows, step):
            following = self._thread.submit(_rows, source, start, min(start + step, rows))
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None:
            yield ahead.result()

    def copies(self, tensor: StoredTensor) -> Iterator[torch.Tensor]:
        """Yield the bytes of a tensor as they are stored, or decoded if it is in a low-bit format, in portions.

        Raises:
            CheckpointError: A file cannot be read.
        """
        if tensor.encoding is None:
            for start in range(0, tensor.nbytes, _COPIED_BYTES):
                yield read_bytes(tensor.path, tensor.offset + start, min(_COPIED_BYTES, tensor.nbytes - start))
            return
        source = ParameterSource(name=tensor.name, shape=tensor.shape, dtype=tensor.dtype, pieces=whole(tensor))
        rows = tensor.shape[0]
        step = max(BLOCK_ELEMENTS // max(math.prod(tensor.shape[1:]), 1), 1) if source.sliceable else rows
        for start in range(0, rows, step):
            part = source.rows(start, min(start + step, rows)) if source.sliceable else source
            out = torch.empty(part.shape, dtype=tensor.dtype)
            part.read(out)
            yield out.view(-1).view(torch.uint8)


def _rows(source: ParameterSource, start: int, stop: int) -> Block:
    numbers = torch.empty(stop - start, *source.shape[1:], dtype=torch.float32)
    (source.rows(start, stop) if source.sliceable else source).read(numbers)
    return Block(start, stop, numbers)
