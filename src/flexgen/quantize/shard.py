"""Writes one file of weights: tensors that are copied, and the parts of tensors that are rounded, each to its place."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from flexgen.base.parallel import Parallel
from flexgen.quantize.layout import Item, Shard, scale_dtype
from flexgen.quantize.rounding import check_finite, round_as_the_paper, round_groups
from flexgen.quantize.settings import QuantizeSettings
from flexgen.quantize.source import Reader


def write_shard(
    path: Path, shard: Shard, settings: QuantizeSettings, reader: Reader, parallel: Parallel, on_written: Callable[[int], None]
) -> None:
    """Write a file of weights from its beginning, and make it durable.

    Args:
        path: The file; what is there is written over.
        shard: What it holds.
        settings: How weights are rounded.
        reader: Reads the source.
        parallel: Runs the loops of rounding.
        on_written: Called with the number of bytes written so far.

    Raises:
        CheckpointError: The source cannot be read, or its numbers cannot be rounded.
        OSError: Writing fails.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        os.posix_fallocate(descriptor, 0, shard.nbytes)
        with ThreadPoolExecutor(1, thread_name_prefix="flexgen-convert-write") as thread:
            file = _File(descriptor, thread, on_written)
            _write_items(file, shard, settings, reader, parallel)
            file.wait()
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _File:
    """An open file in which places are written, on a thread that does so while the next portion is rounded."""

    def __init__(self, descriptor: int, thread: ThreadPoolExecutor, on_written: Callable[[int], None]) -> None:
        self._descriptor, self._thread, self._on_written = descriptor, thread, on_written
        self._written = 0
        self._pending: Future[int] | None = None

    def put(self, parts: Sequence[tuple[int, bytes | torch.Tensor]]) -> None:
        """Begin to write bytes, or contiguous tensors, each at its offset; when this returns, what was put before is written."""
        self.wait()
        self._pending = self._thread.submit(_written, self._descriptor, parts)

    def wait(self) -> None:
        """Return when all that was put is written.

        Raises:
            OSError: Writing fails.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._written += pending.result()
            self._on_written(self._written)


def _written(descriptor: int, parts: Sequence[tuple[int, bytes | torch.Tensor]]) -> int:
    """Write each part at its offset, and return the number of bytes."""
    total = 0
    for start, data in parts:
        view = data.contiguous().view(-1).view(torch.uint8).numpy().data if isinstance(data, torch.Tensor) else memoryview(data)
        offset, total = start, total + len(view)
        while view:
            count = os.pwrite(descriptor, view, offset)
            view, offset = view[count:], offset + count
        os.posix_fadvise(descriptor, start, offset - start, os.POSIX_FADV_DONTNEED)  # the disk begins now, not at the fsync
    return total


def _write_items(file: _File, shard: Shard, settings: QuantizeSettings, reader: Reader, parallel: Parallel) -> None:
    offsets = shard.offsets()
    file.put([(0, shard.header)])
    wanted = [(item.source, settings.granule_rows(item.source.name) if item.rounded else 0) for item in shard.items]
    for index, numbers in reader.portions(wanted):
        item = shard.items[index]
        parts = _rounded(numbers, item, settings, parallel) if item.rounded else (numbers,)
        named = list(zip((tensor.name for tensor in item.written), parts, strict=False))  # shapes follow at the end
        file.put([(offsets[name], part) for name, part in named])
        for name, part in named:
            offsets[name] += part.nbytes
        if not item.rounded:
            file.wait()  # the memory of the portion is about to be read into
    if not settings.is_paper:
        shapes = [(item.written[-1].name, item.source.shape) for item in shard.items if item.rounded]
        file.put([(offsets[name], torch.tensor(shape, dtype=torch.int64)) for name, shape in shapes])


def _rounded(numbers: torch.Tensor, item: Item, settings: QuantizeSettings, parallel: Parallel) -> tuple[torch.Tensor, ...]:
    """Return the parts of the rounded rows, in the order of `Item.written`; each part is the next portion of its tensor."""
    name = item.source.name
    if settings.is_paper:
        numbers = numbers.float()
        check_finite(name, numbers)
        return round_as_the_paper(numbers)
    bits, dtype = settings.bits_of(name), scale_dtype(item.source.dtype)
    return round_groups(numbers, bits=bits, group_size=settings.group_size, dtype=dtype, name=name, parallel=parallel)
