"""Random pages: finite in every format, wherever they live, and only where tokens are stored on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from flexgen.devices.base import HOST
from flexgen.devices.sim import SimulatedDevice
from flexgen.io.pool import IOPool
from flexgen.kernels.reference import AttentionKernels
from flexgen.kv import random_pages
from flexgen.kv.format import PlainPages
from flexgen.kv.low_bit import kv_format
from flexgen.kv.pages import KVGroup, PagePool, group_layers, layer_index, of_positions
from flexgen.kv.random_pages import RandomPages
from flexgen.kv.slots import StagedPage
from flexgen.kv.spill import DiskPool, StagedLayer
from flexgen.options import KV_FORMATS
from tests.kv.test_places import KV, PAGE_TOKENS

NUM_PAGES = 7
DTYPE = torch.float32


def groups_of(name: str) -> Sequence[KVGroup]:
    return group_layers(KV, PAGE_TOKENS, kv_format(name, DTYPE))


@contextlib.contextmanager
def filling(backend: SimulatedDevice | None = None, seed: int = 0):
    with contextlib.closing(IOPool(1)) as io, contextlib.closing(RandomPages(DTYPE, 1, backend, io, seed)) as pages:
        yield pages, io


def check(found: torch.Tensor) -> None:
    assert found.isfinite().all()
    assert 0.6 < found.std() < 1.4
    assert len(found.unique()) > 10


@pytest.mark.parametrize("block_bytes", [1, 1000, 4 << 20])
@pytest.mark.parametrize("tier", ["host", "device"])
@pytest.mark.parametrize("name", KV_FORMATS)
def test_pages_in_memory(name: str, tier: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_pages, "BLOCK_BYTES", block_bytes)
    groups = groups_of(name)
    with contextlib.closing(SimulatedDevice(64 << 20)) as device, filling(device) as (pages, _):
        pool = PagePool(groups, [NUM_PAGES] * len(groups), *([device.allocate] if tier == "device" else []))
        pages.fill(tier, pool, [[] for _ in groups])
        for memory, group in zip(pool.memory, groups, strict=True):
            planes = [plane.to(HOST).clone() for plane in memory.planes]
            for layer in range(len(group.layers)):
                of_layer = group.format.pages(*(plane[layer] for plane in planes), group.geometry, PAGE_TOKENS)
                if isinstance(of_layer, PlainPages):
                    check(torch.cat([of_layer.keys.flatten(), of_layer.values.flatten()]))
                else:
                    key, value = of_layer.gather(AttentionKernels(), torch.arange(NUM_PAGES), 0, NUM_PAGES * PAGE_TOKENS, DTYPE)
                    check(torch.cat([key.flatten(), value.flatten()]))


@pytest.mark.parametrize("name", KV_FORMATS)
def test_pages_on_disk(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_pages, "BLOCK_BYTES", 1000)
    groups, stored = groups_of(name), [1, 2, 5]
    with filling() as (pages, io), contextlib.closing(DiskPool(groups, [NUM_PAGES] * len(groups), tmp_path)) as pool:
        pages.fill("disk", pool, [stored for _ in groups])
        for _, (index, place) in layer_index(groups).items():
            staged = StagedLayer(pool.groups, index, [NUM_PAGES] * len(groups))
            every = [[StagedPage(page, page) for page in range(NUM_PAGES)] for _ in groups]
            io.read(pool.parts(place, staged, every)).wait()
            for each in staged.groups:
                raw = torch.cat([plane[0] for plane in each.memory.planes], dim=1)
                assert [bool(page.any()) for page in raw] == [page in stored for page in range(NUM_PAGES)]
            found = [*staged.pages.gather(AttentionKernels(), torch.tensor(stored), 0, len(stored) * PAGE_TOKENS, DTYPE)]
            check(torch.cat([each.flatten() for each in found]))


def test_seeds() -> None:
    groups, found = of_positions(groups_of("auto")), []
    for seed in (1, 1, 2):
        with filling(seed=seed) as (pages, _):
            pool = PagePool(groups, [NUM_PAGES] * len(groups))
            pages.fill("host", pool, [[] for _ in groups])
            found.append(torch.cat([plane.flatten() for memory in pool.memory for plane in memory.planes]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
