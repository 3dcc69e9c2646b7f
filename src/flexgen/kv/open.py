"""Opens the KV pools that a policy asks for, and the place that attends to each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from flexgen.devices.base import Backend
from flexgen.errors import EngineError
from flexgen.io.pool import IOPool
from flexgen.kernels.attention import AttentionKernels, attention_kernels
from flexgen.kv.cache import KVCache, KVGroup, PagePool, Pool, divide_pool
from flexgen.kv.disk import DiskPlace, DiskPool
from flexgen.kv.host import HOST, HostPlace
from flexgen.kv.place import LocalPlace, Place
from flexgen.plan.policy import Policy


def open_places(
    groups: Sequence[KVGroup],
    policy: Policy,
    *,
    backend: Backend | None,
    io: IOPool,
    offload_dir: Path | None,
    notify: Callable[[], None],
    verify: bool = False,
) -> tuple[dict[str, Place], KVCache]:
    """Tier -> place, and the cache over all tiers, for the policy's pools.

    Raises:
        StorageError: the spill file cannot be made; no place stays open.
    """
    pools: dict[str, Pool] = {}
    places: dict[str, Place] = {}
    spilled: DiskPool | None = None
    if policy.kv_disk_bytes:  # first, because it is what can fail
        if offload_dir is None:
            raise EngineError("KV on disk needs an offload folder")
        pages = divide_pool(groups, policy.kv_disk_bytes, policy.longest_sequence)
        spilled = DiskPool(groups, pages, offload_dir, tail_bytes=policy.kv_tail_bytes, verify=verify)
    device = backend.device if backend is not None else HOST

    def kernels(where: torch.device) -> AttentionKernels:
        return attention_kernels(where, policy.compute_threads)

    if policy.kv_device_bytes:
        assert backend is not None
        pool = PagePool(groups, divide_pool(groups, policy.kv_device_bytes, policy.longest_sequence), backend.allocate)
        pools["device"], places["device"] = pool, LocalPlace(pool, kernels(device), device)
    if policy.kv_host_bytes:
        pages = divide_pool(groups, policy.kv_host_bytes, policy.longest_sequence)
        pool = PagePool(groups, pages, lambda size: torch.empty(size, dtype=torch.uint8))
        pools["host"] = pool
        if backend is None:
            places["host"] = LocalPlace(pool, kernels(HOST), HOST)
        else:
            places["host"] = HostPlace(pool, kernels(HOST), kernels(device), backend, notify)
    if spilled is not None:
        pools["disk"] = spilled
        places["disk"] = DiskPlace(spilled, kernels(HOST), kernels(device), backend, notify, io, policy.kv_staging_bytes)
    return places, KVCache(groups, pools)
