"""Low-bit pages on disk: keys and values side by side in padded slots, which hold and give back what pages in memory do."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from flexgen.io.aligned import ALIGNMENT
from flexgen.io.direct_io import File
from flexgen.io.pool import IOPool
from flexgen.kernels.cpu import CpuKernels
from flexgen.kernels.reference import AttentionKernels
from flexgen.kv.format import Steps
from flexgen.kv.low_bit import LowBitPages, kv_format
from flexgen.kv.pages import KVGroup, PagePool, group_layers, on_disk
from flexgen.kv.slots import StagedPage
from flexgen.kv.spill import DiskPool, StagedLayer
from flexgen.passes.calls import AttentionCall, FixedProjection
from flexgen.passes.geometry import KVGeometry, LayerKV
from tests.kv.test_low_bit import LOW_BIT, conversation_in, low_bit
from tests.kv.test_places import KV, PAGE_TOKENS, PLACES, converse, poisoned

SHAPES = {
    "one head of 8": KVGeometry(key_heads=1, key_dim=8, value_heads=1, value_dim=8),
    "three heads of 20 and 12": KVGeometry(key_heads=3, key_dim=20, value_heads=3, value_dim=12),
    "8 heads of 128": KVGeometry(key_heads=8, key_dim=128, value_heads=8, value_dim=128),
    "latents": KVGeometry(key_heads=1, key_dim=70, value_heads=1, value_dim=9, latent=True),
}


@pytest.fixture
def any_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pages get slots, too."""
    monkeypatch.setattr("flexgen.kv.low_bit.MOST_PADDING", math.inf)


@pytest.mark.matrix(4)
@pytest.mark.parametrize("place", [place for place in PLACES if place.startswith("disk")])
@pytest.mark.parametrize("name", LOW_BIT)
def test_what_a_query_sees_does_not_depend_on_slots(name: str, place: str, tmp_path: Path, any_padding: None) -> None:
    kv = low_bit(name)
    bench = PLACES[place](tmp_path, group_layers(KV, PAGE_TOKENS, kv))
    pool = bench.cache.pools["disk"]
    assert all((group.slot is not None) == group.stores_whole_pages for group in pool.groups)
    try:
        converse(bench, random.Random(0), conversation_in(kv))
    finally:
        bench.place.close()
        for close in bench.close:
            close()


def two_layers(geometry: KVGeometry, name: str, dtype: torch.dtype) -> tuple[KVGroup, ...]:
    layers = [LayerKV(layer=layer, geometry=geometry, flops_per_pair=1.0) for layer in range(2)]
    return group_layers(layers, 16, low_bit(name, dtype))


def noise(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def staged(pool: DiskPool) -> StagedLayer:
    """Staging for three pages and a tail, poisoned."""
    layer = StagedLayer(pool.groups, 0, [3, 1])
    for each in layer.groups:
        for plane in each.memory.planes:
            plane.fill_(0xFF)
    return layer


def attended(kernels: AttentionKernels, pages: LowBitPages, table: Sequence[int], geometry: KVGeometry, dtype: torch.dtype) -> Tensor:
    """The last of 40 tokens, whose own page is the tail."""
    heads = 2 * geometry.key_heads
    query_dim = geometry.key_dim + (geometry.value_dim if geometry.latent else 0)
    query = noise(5, 1, heads, query_dim, dtype=dtype)
    out = torch.full((1, heads, geometry.key_dim if geometry.latent else geometry.value_dim), math.nan, dtype=dtype)
    latent = FixedProjection(key_up=query, value_up=query) if geometry.latent else None
    call = AttentionCall(layer=0, query=query, key=query, value=query, scaling=0.2, latent=latent)
    tables, zero = torch.tensor([[*table, -1]]), torch.zeros(1, dtype=torch.int64)
    pages.decode(kernels, call, query, Steps(tables=tables, starts=zero, lengths=zero + 40, tails=zero), out)
    return out


def fill(pages: LowBitPages, kernels: AttentionKernels, geometry: KVGeometry, ids: Sequence[int], dtype: torch.dtype) -> None:
    """Seal the pages of 32 tokens, and write 8 more to the first tail."""
    key = noise(1, 40, geometry.key_heads, geometry.key_dim, dtype=dtype)
    value = noise(2, 40, geometry.value_heads, geometry.value_dim, dtype=dtype)
    pages.seal(kernels, key[:32], value[:32], torch.tensor(ids))
    pages.write(kernels, key[32:], value[32:], torch.zeros(8, dtype=torch.int64), torch.arange(8))


@pytest.mark.matrix(12)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", LOW_BIT)
@pytest.mark.parametrize("shape", SHAPES)
def test_slots_give_back_what_pages_in_memory_do(shape: str, name: str, dtype: torch.dtype, tmp_path: Path, any_padding: None) -> None:
    """Bit for bit, after a way over the disk to other places; bytes that pad are never written by kernels."""
    geometry, (first, second) = SHAPES[shape], (2, 0)
    groups = two_layers(geometry, name, dtype)
    disk, memory, io = DiskPool(groups, [5, 1], tmp_path), PagePool(groups, [3, 1], poisoned), IOPool(1)
    slot = disk.groups[0].slot
    assert slot is not None
    with CpuKernels(2) as kernels:
        fill(memory.pages[0], kernels, geometry, [first, second], dtype)  # type: ignore[arg-type]
        here = staged(disk)
        fill(here.pages, kernels, geometry, [first, second], dtype)  # type: ignore[arg-type]
        used = slot.values_at + disk.groups[0].value_page_bytes // geometry.value_heads
        assert (here.groups[0].memory.keys.view(3, slot.heads, slot.head_bytes)[..., used:] == 0xFF).all()
        assert (here.groups[0].memory.keys[0, 1] == 0xFF).all(), "a page that was not sealed"
        io.write(disk.parts(1, here, [[StagedPage(3, first), StagedPage(1, second)], []])).wait()
        there = staged(disk)
        there.groups[1].memory.keys.copy_(here.groups[1].memory.keys)
        there.groups[1].memory.values.copy_(here.groups[1].memory.values)
        io.read(disk.parts(1, there, [[StagedPage(3, 0), StagedPage(1, 1)], []])).wait()
        known = memory.pages[0].gather(kernels, torch.tensor([first, second]), 3, 32, dtype)
        found = there.pages.gather(kernels, torch.tensor([0, 1]), 3, 32, dtype)
        assert all(torch.equal(one, other) for one, other in zip(found, known, strict=True))
        wanted = attended(kernels, memory.pages[0], [first, second], geometry, dtype)  # type: ignore[arg-type]
        got = attended(kernels, there.pages, [0, 1], geometry, dtype)  # type: ignore[arg-type]
        assert wanted.isfinite().all()
        assert torch.equal(got, wanted)
    io.close()
    disk.close()


@pytest.mark.parametrize("name", LOW_BIT)
def test_what_goes_over_the_disk_is_aligned(name: str, tmp_path: Path) -> None:
    """As direct I/O needs it: places in files and in memory, and sizes; keys and values of adjacent pages are one piece."""
    pool = DiskPool(two_layers(SHAPES["8 heads of 128"], name, torch.bfloat16), [9, 1], tmp_path)
    layer = StagedLayer(pool.groups, 0, [3, 1])
    parts = pool.parts(1, layer, [[StagedPage(4, 1), StagedPage(5, 2), StagedPage(8, 0)], [StagedPage(0, 0)]])
    assert [len(view) for _, _, view in parts[:2]] == [2 * pool.groups[0].layer_page_bytes, pool.groups[0].layer_page_bytes]
    assert len(parts) == 2 + 2, "keys and values of tails are apart"
    for _, offset, view in parts:
        assert (offset % ALIGNMENT, len(view) % ALIGNMENT, np.frombuffer(view, np.uint8).ctypes.data % ALIGNMENT) == (0, 0, 0)
    pool.close()


def test_pages_that_padding_would_swell_go_through_the_page_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[bool] = []

    class Watched(File):
        def __init__(self, path: Path, *, direct: bool = True, **how: object) -> None:
            opened.append(direct)
            super().__init__(path, direct=direct, **how)  # type: ignore[arg-type]

    monkeypatch.setattr("flexgen.kv.spill.File", Watched)
    for shape, direct, warnings in (("8 heads of 128", True, 0), ("one head of 8", False, 1)):
        caplog.clear()
        opened.clear()
        pool = DiskPool(two_layers(SHAPES[shape], "int8", torch.bfloat16), [2, 1], tmp_path)
        assert opened[0] == direct
        assert sum("page cache, which is slower" in each.message for each in caplog.records) == warnings
        pool.close()


# What docs/kv-cache.md says.
PADDED = [
    (8, 128, {"int8": 5.9, "k8v4": 3.7, "int4": 0.0}),  # Llama-3B
    (4, 128, {"int8": 17.6, "k8v4": 18.5, "int4": 20.0}),  # Qwen2.5-7B
    (32, 128, {"int8": 0.0, "k8v4": 0.0, "int4": 0.0}),  # OPT-6.7B
    (56, 128, {"int8": 5.9, "k8v4": 3.7, "int4": 0.0}),  # OPT-30B
    (4, 64, {"int8": None, "k8v4": 18.5, "int4": None}),  # novels-opt-7m
]


@pytest.mark.parametrize(("heads", "dim", "known"), PADDED)
def test_what_padding_wastes(heads: int, dim: int, known: dict[str, float | None]) -> None:
    geometry = KVGeometry(key_heads=heads, key_dim=dim, value_heads=heads, value_dim=dim)
    for name, percent in known.items():
        (group, _), (packed, _) = (
            make(group_layers([LayerKV(layer=0, geometry=geometry, flops_per_pair=1.0)], 16, low_bit(name))) for make in (on_disk, tuple)
        )
        if percent is None:
            assert group.slot is None
        else:
            assert round(100 * (group.page_bytes / packed.page_bytes - 1), 1) == percent


def test_latents_are_padded_by_a_quarter() -> None:
    geometry = KVGeometry(key_heads=1, key_dim=512, value_heads=1, value_dim=64, latent=True)  # DeepSeek-V2, V3
    kv = low_bit("int8")
    slot = kv.disk_slot(geometry, 16)
    assert slot is not None
    assert (slot.page_bytes, 16 * (kv.key_bytes(geometry) + kv.value_bytes(geometry))) == (12288, 9792)


def test_plain_pages_have_no_slots() -> None:
    plain = kv_format("auto", torch.bfloat16)
    assert all(plain.disk_slot(geometry, 16) is None for geometry in SHAPES.values())
