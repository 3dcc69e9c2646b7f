"""Writes one file of weights: tensors that are copied, and the parts of tensors that are rounded, each to its place."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from flexgen.base.parallel import Parallel
from flexgen.quantize.layout import Item, Shard, scale_dtype
from flexgen.quantize.rounding import check_finite, round_as_the_paper, round_groups
from flexgen.quantize.settings import QuantizeSettings
from flexgen.quantize.source import Block, Reader


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
        file = _File(descriptor, on_written)
        file.put(0, shard.header)
        offsets = shard.offsets()
        for item in shard.items:
            _write_item(file, item, [offsets[each.name] for each in item.written], settings, reader, parallel)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _File:
    """An open file in which places are written."""

    def __init__(self, descriptor: int, on_written: Callable[[int], None]) -> None:
        self._descriptor, self._on_written, self._written = descriptor, on_written, 0

    def put(self, offset: int, data: bytes | torch.Tensor) -> None:
        """Write bytes, or the numbers of a contiguous tensor, at an offset."""
        view = data.contiguous().view(-1).view(torch.uint8).numpy().data if isinstance(data, torch.Tensor) else memoryview(data)
        self._written += len(view)
        while view:
            count = os.pwrite(self._descriptor, view, offset)
            view, offset = view[count:], offset + count
        self._on_written(self._written)


def _write_item(file: _File, item: Item, offsets: list[int], settings: QuantizeSettings, reader: Reader, parallel: Parallel) -> None:
    if not item.rounded:
        for portion in reader.copies(item.source):
            file.put(offsets[0], portion)
            offsets[0] += portion.nbytes
        return
    for block in reader.blocks(item.source, settings.granule_rows(item.source.name)):
        check_finite(item.source.name, block.numbers)
        for index, part in enumerate(_rounded(block, item, settings, parallel)):
            file.put(offsets[index], part)
            offsets[index] += part.nbytes
    if not settings.is_paper:
        file.put(offsets[-1], torch.tensor(item.source.shape, dtype=torch.int64))


def _rounded(block: Block, item: Item, settings: QuantizeSettings, parallel: Parallel) -> tuple[torch.Tensor, ...]:
    """Return the parts of the rounded rows, in the order of `Item.written`; each part is the next portion of its tensor."""
    if settings.is_paper:
        return round_as_the_paper(block.numbers)
    bits, dtype = settings.bits_of(item.source.name), scale_dtype(item.source.dtype)
    return round_groups(block.numbers, bits=bits, group_size=settings.group_size, dtype=dtype, parallel=parallel)
