"""Which places a policy opens, and that none stays open when one cannot be opened."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flexgen.devices.sim import SimulatedDevice
from flexgen.devices.staging import Staging
from flexgen.errors import CapacityError, EngineError, StorageError
from flexgen.io.pool import IOPool
from flexgen.kv.disk import DiskPlace
from flexgen.kv.flow import KVFlow
from flexgen.kv.format import PlainKV
from flexgen.kv.host import HostPlace
from flexgen.kv.linked import LinkedPlace
from flexgen.kv.local import LocalPlace
from flexgen.kv.open import KVSetup, open_places
from flexgen.kv.pages import group_layers
from flexgen.kv.tiers import block_pages
from flexgen.passes.geometry import KVGeometry, LayerKV
from flexgen.plan.policy import Fractions
from tests.models.parity import policy

LAYERS = [LayerKV(layer=0, geometry=KVGeometry(key_heads=1, key_dim=8, value_heads=1, value_dim=8), flops_per_pair=1.0)]


@pytest.fixture
def io() -> Iterator[IOPool]:
    pool = IOPool(1)
    yield pool
    pool.close()


def setup(io: IOPool, kv: Fractions, folder: Path | None, device: SimulatedDevice | None) -> KVSetup:
    chosen = policy("sim" if device is not None else "cpu", weights=Fractions(host=1), kv=kv, ring_bytes=1 << 20)
    groups = group_layers(LAYERS, chosen.page_tokens, PlainKV(torch.float32))
    flow = KVFlow.of(has_device=device is not None)
    return KVSetup(
        groups=groups, policy=chosen, backend=device, staging=Staging(device), flow=flow, io=io, offload_dir=folder, notify=lambda: None
    )


def attention_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.endswith("-attention")]


def test_places_beside_a_device(io: IOPool, tmp_path: Path) -> None:
    device = SimulatedDevice(2_000_000)
    places, cache = open_places(setup(io, Fractions(device=0.5, host=0.25, disk=0.25), tmp_path, device))
    assert {tier: type(place) for tier, place in places.items()} == {"device": LocalPlace, "host": HostPlace, "disk": DiskPlace}
    assert list(places) == list(cache.pools) == ["device", "host", "disk"]
    assert sorted(attention_threads()) == ["flexgen-disk-attention", "flexgen-host-attention"]
    for place in places.values():
        place.close()
    device.close()
    assert not attention_threads()


def test_pages_on_the_host_come_to_the_device_if_the_policy_says_so(io: IOPool) -> None:
    device = SimulatedDevice(2_000_000)
    opened = setup(io, Fractions(host=1.0), None, device)
    with pytest.raises(EngineError, match="needs a ring"):
        open_places(replace(opened, policy=replace(opened.policy, host_attention=False)))
    with pytest.raises(CapacityError):
        open_places(replace(opened, policy=replace(opened.policy, host_attention=False, kv_ring_bytes=3_000_000)))
    assert not attention_threads()
    places, _ = open_places(replace(opened, policy=replace(opened.policy, host_attention=False, kv_ring_bytes=1 << 16)))
    assert {tier: type(place) for tier, place in places.items()} == {"host": LinkedPlace}
    assert device.used_bytes == device.host.size_bytes == 1 << 16
    places["host"].close()
    device.close()
    assert not attention_threads()


def test_places_where_the_host_computes(io: IOPool) -> None:
    places, cache = open_places(setup(io, Fractions(host=1), None, None))
    assert {tier: type(place) for tier, place in places.items()} == {"host": LocalPlace}
    assert cache.pools["host"].num_pages[0] > 0
    places["host"].close()


def test_every_block_has_pages_of_its_own(io: IOPool, tmp_path: Path) -> None:
    """And tails on their way to disk; what is read ahead is shared, because one pass runs at a time."""
    opened = setup(io, Fractions(host=0.5, disk=0.5), tmp_path, None)
    pages: dict[int, dict[str, list[int]]] = {}
    for num_blocks in (1, 3):
        places, cache = open_places(replace(opened, policy=replace(opened.policy, num_blocks=num_blocks)))
        pages[num_blocks] = {tier: pool.num_pages for tier, pool in cache.pools.items()}
        disk = places["disk"]
        assert isinstance(disk, DiskPlace)
        tail_bytes = sum(memory.keys.nbytes + memory.values.nbytes for memory in disk.pool.tails._memory)
        page_bytes = sum(group.page_bytes for group in disk.pool.groups)
        assert tail_bytes == num_blocks * opened.policy.kv_tail_bytes // page_bytes * page_bytes
        for place in places.values():
            place.close()
    assert pages[3] == {tier: [3 * count for count in counts] for tier, counts in pages[1].items()}
    assert pages[1] == {tier: block_pages(tier, opened.groups, opened.policy) for tier in ("host", "disk")}


def test_no_place_stays_open_when_one_fails(io: IOPool, tmp_path: Path) -> None:
    device = SimulatedDevice(2_000_000)
    everywhere = Fractions(device=0.5, host=0.25, disk=0.25)
    with pytest.raises(EngineError, match="offload folder"):
        open_places(setup(io, everywhere, None, device))
    with pytest.raises(StorageError):
        open_places(setup(io, everywhere, tmp_path / "nowhere", device))
    device.close()
    small = SimulatedDevice(1000)
    with pytest.raises(CapacityError):
        open_places(setup(io, everywhere, tmp_path, small))
    small.close()
    assert not attention_threads()
