"""Random checkpoints from a config alone, for benchmarks and tests of models whose weights are not on this machine.

The files look like those of a repository (original tensor names, per-expert tensors, shards, index), in the number format that the config
states, so that reading them takes the same work as reading the real ones.  Memory stays bounded: no large tensor is ever built.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from flexgen.base.quantities import align_up
from flexgen.checkpoint.random_tensors import RandomContents, RandomTensors
from flexgen.checkpoint.repository import RepositoryTensors, sharded
from flexgen.errors import StorageError
from flexgen.hub.model_files import INDEX_FILE
from flexgen.io.aligned import ALIGNMENT, AlignedBuffer, Extent
from flexgen.io.direct_io import File

SHARD_BYTES = 2 * 10**9
_BUFFER_BYTES = 16 << 20
_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW

Range = tuple[int, int]  # the first byte of a part of a file, and the one after its last


class RandomFiles:
    """The files of random weights, of which only what is asked for is written.

    Headers are, when the files are made.  The rest takes no room on the disk, and is made when it is read through files that `open_file`
    opens; whether bytes were written or not, such a file reads the same.  (Read in another way, what is not written is zeros.)  Tied
    weights are there once.  The files are readable by their owner only.

    Args:
        config: The config of a causal language model.
        folder: The folder of the files; it is created if necessary, and must not hold weights yet.
        dtype: The dtype of all floating-point tensors that are not encoded.
        seed: The seed of the random numbers.
        shard_bytes: The most bytes of one file, unless a single tensor takes more.

    Attributes:
        total_bytes: The bytes of all tensors.

    Raises:
        StorageError: A file exists already or cannot be written.
        UnsupportedModelError: Random weights in the format that the config states cannot be made.
    """

    def __init__(
        self, config: PreTrainedConfig, folder: Path, dtype: torch.dtype, *, seed: int = 0, shard_bytes: int = SHARD_BYTES
    ) -> None:
        stored = RepositoryTensors.of(config, dtype)
        files, numbers = sharded(stored.tensors, shard_bytes), RandomTensors(stored, dtype, seed)
        self.total_bytes = sum(tensor.nbytes for tensors in files.values() for tensor in tensors)
        self._folder = folder
        self._contents = {folder / name: RandomContents(tensors, numbers) for name, tensors in files.items()}
        self._written: dict[Path, list[Range]] = {path: [] for path in self._contents}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path, contents in self._contents.items():
                self._write_file(path, [(0, len(contents.head))], _NEW_FILE)
            if len(files) > 1:
                weight_map = {tensor.name: name for name, tensors in files.items() for tensor in tensors}
                index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
                _write_text(folder / INDEX_FILE, json.dumps(index, indent=2))
            described = deepcopy(config)
            described.architectures, described.dtype = [stored.architecture], dtype
            _write_text(folder / "config.json", described.to_json_string())
        except (OSError, StorageError) as error:
            raise self._not_written(error) from error

    def write(self, extents: Iterable[Extent]) -> None:
        """Write these parts of the files; no file may be open.

        Raises:
            StorageError: They cannot be written.
        """
        for path, ranges in _by_file(extents).items():
            try:
                self._write_file(path, ranges)
            except StorageError as error:
                raise self._not_written(error) from error

    def write_all(self) -> None:
        """Write all that is not written; the errors are those of `write`."""
        self.write(Extent(path=path, offset=0, size=contents.size_bytes, position=0) for path, contents in self._contents.items())

    def open_file(self, path: Path, **how: Any) -> File:
        """Open one of the files for reading; `how` has the other arguments of `File`."""
        return _RandomFile(path, self._contents[path], self._written[path], **how)

    def _not_written(self, error: Exception) -> StorageError:
        return StorageError(f"{self._folder}: a random checkpoint of {self.total_bytes} bytes could not be written: {error}")

    def _write_file(self, path: Path, ranges: Sequence[Range], flags: int = os.O_RDWR) -> None:
        """Write parts of a file, which begin at whole pages.

        They bypass the page cache where the file system allows that: through it, writing a benchmark's checkpoint takes three times as
        long and evicts everything else from it.
        """
        contents, buffer = self._contents[path], AlignedBuffer(_BUFFER_BYTES)
        with contextlib.closing(File(path, flags=flags, on_plain=lambda folder, why: None)) as file:
            for start, stop in ranges:
                for at in range(start, stop, _BUFFER_BYTES):
                    view = buffer.view[: align_up(min(stop - at, _BUFFER_BYTES), ALIGNMENT)]
                    contents.read_into(view, at)
                    file.write_from(view, at)
            file.truncate(contents.size_bytes)  # the last page was written whole
        self._written[path] = _merged([*self._written[path], *((start, align_up(stop, ALIGNMENT)) for start, stop in ranges)])


class _RandomFile(File):
    """A file whose bytes are read where they are written, and made where they are not."""

    def __init__(self, path: Path, contents: RandomContents, written: Sequence[Range], **how: Any) -> None:
        self._contents, self._written = contents, written
        super().__init__(path, **how)

    def _fill(self, view: memoryview, offset: int) -> None:
        stop = min(offset + len(view), self._contents.size_bytes)
        if any(first <= offset and stop <= end for first, end in self._written):
            super()._fill(view, offset)
        else:
            self._contents.read_into(view, offset)


def write_random_checkpoint(
    config: PreTrainedConfig, folder: Path, dtype: torch.dtype, *, seed: int = 0, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write config.json and safetensors files with random weights for `config` into `folder`.

    The arguments and the errors are those of `RandomFiles`, the numbers those of `RandomTensors`.

    Returns:
        The bytes of all tensors.
    """
    files = RandomFiles(config, folder, dtype, seed=seed, shard_bytes=shard_bytes)
    files.write_all()
    return files.total_bytes


def size_on_disk(extents: Iterable[Extent]) -> int:
    """Return the bytes that parts of files take, those that overlap counted once."""
    return sum(stop - start for ranges in _by_file(extents).values() for start, stop in ranges)


def _by_file(extents: Iterable[Extent]) -> dict[Path, list[Range]]:
    """Return the parts of each file, none of which overlap."""
    ranges: dict[Path, list[Range]] = {}
    for each in extents:
        ranges.setdefault(each.path, []).append((each.offset, each.offset + each.size))
    return {path: _merged(found) for path, found in ranges.items()}


def _merged(ranges: Iterable[Range]) -> list[Range]:
    """Return the same bytes as ranges in order, with a gap between any two."""
    merged: list[Range] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
    return merged


def _write_text(path: Path, text: str) -> None:
    descriptor = os.open(path, _NEW_FILE | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
