"""Fills pages of KV with random numbers, as their format stores them, for measuring passes over tokens that nobody computed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from flexgen.devices.base import HOST, Device
from flexgen.devices.staging import Staging
from flexgen.io.aligned import allocate_memory
from flexgen.io.pool import IOPool
from flexgen.kernels.attention import attention_kernels
from flexgen.kv.pages import KVGroup, PageMemory, PagePool, Pool
from flexgen.kv.slots import StagedPage
from flexgen.kv.spill import DiskPool, StagedLayer

BLOCK_BYTES = 4 << 20  # of pages of one layer, which are repeated through all pages of a group


class RandomPages:
    """Random pages.  The numbers are normal, and finite in every format.

    Args:
        dtype: The dtype of computing.
        num_threads: The number of threads that compute.
        backend: The computing device; None if that is the host.
        io: The threads that write pages on disk.
        seed: The seed of the numbers.
    """

    def __init__(self, dtype: torch.dtype, num_threads: int, backend: Device | None, io: IOPool, seed: int) -> None:
        self._dtype, self._io = dtype, io
        self._staging, self._here = Staging(backend), Staging(None)
        self._kernels = attention_kernels(HOST, num_threads)
        self._generator = torch.Generator().manual_seed(seed)

    def fill(self, tier: str, pool: Pool, stored: Sequence[Sequence[int]]) -> None:
        """Fill all pages of a pool in memory, or those of a pool on disk that hold tokens.

        Args:
            tier: The tier of the pool.
            pool: The pool.
            stored: For each layer group, the page ids that hold tokens.

        Raises:
            StorageError: Pages cannot be written to disk.
        """
        if isinstance(pool, DiskPool):
            self._fill_disk(pool, stored)
        elif isinstance(pool, PagePool):
            self._fill_memory(pool, self._staging if tier == "device" else self._here)

    def _fill_memory(self, pool: PagePool, staging: Staging) -> None:
        for group, memory, count in zip(pool.groups, pool.memory, pool.num_pages, strict=True):
            if not count:
                continue
            block = PageMemory(group, 1, _block_pages(group, count), allocate_memory)
            self._randomise(group, block)
            sources = staging.to_device(*(plane[0] for plane in block.planes)).take()
            for plane, source in zip(memory.planes, sources, strict=True):  # (layers, pages, bytes), (pages of the block, bytes)
                for layer in range(len(group.layers)):
                    for start in range(0, count, len(source)):
                        part = plane[layer, start : start + len(source)]
                        part.copy_(source[: len(part)])

    def _fill_disk(self, pool: DiskPool, stored: Sequence[Sequence[int]]) -> None:
        for index, group in enumerate(pool.groups):
            if group.tail_of is not None:  # it is written with the group whose tails it has
                continue
            slots = [_block_pages(each, count) for each, count in zip(pool.groups, pool.num_pages, strict=True)]
            staged = StagedLayer(pool.groups, index, slots)
            for each in staged.groups:
                self._randomise(pool.groups[each.index], each.memory)
            for place, each in itertools.product(range(len(group.layers)), staged.groups):
                pages, most = stored[each.index], slots[each.index]
                for start in range(0, len(pages), most):
                    some: list[list[StagedPage]] = [[] for _ in pool.groups]
                    some[each.index] = [StagedPage(page, slot) for slot, page in enumerate(pages[start : start + most])]
                    self._io.write(pool.parts(place, staged, some)).wait()

    def _randomise(self, group: KVGroup, memory: PageMemory) -> None:
        """Fill pages of one layer in host memory."""
        count, geometry = memory.planes[0].shape[1], group.geometry
        tokens = count * group.page_tokens
        key = torch.randn(tokens, geometry.key_heads, geometry.key_dim, generator=self._generator).to(self._dtype)
        value = torch.randn(tokens, geometry.value_heads, geometry.value_dim, generator=self._generator).to(self._dtype)
        memory.pages(0).write_pages(self._kernels, key, value, torch.arange(count))

    def close(self) -> None:
        """Stop the threads of the kernels."""
        self._kernels.close()


def _block_pages(group: KVGroup, count: int) -> int:
    """Return how many of `count` pages a block has, at least one."""
    return max(min(BLOCK_BYTES // max(group.layer_page_bytes, 1), count), 1)
