"""Opens the KV pools that a policy asks for, and the place that attends to each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from flexgen.kernels.attention import attention_kernels
from flexgen.memory.direct_io import IOPool
from flexgen.memory.kv_cache import KVCache, KVGroup, PagePool, divide_pool
from flexgen.memory.kv_place import LocalPlace, Place
from flexgen.memory.transfer import Backend
from flexgen.plan.policy import Policy


def open_places(
    groups: Sequence[KVGroup],
    policy: Policy,
    *,
    backend: Backend | None,
    io: IOPool,
    offload_dir: Path | None,
    notify: Callable[[], None],
) -> tuple[dict[str, Place], KVCache]:
    """Tier -> place, and the cache over all tiers, for the policy's pools."""
    typical = 512
    pools: dict[str, PagePool] = {}
    places: dict[str, Place] = {}
    host = torch.device("cpu")
    if policy.kv_host_bytes:
        pages = divide_pool(groups, policy.kv_host_bytes, typical)
        pools["host"] = PagePool(groups, pages, lambda size: torch.empty(size, dtype=torch.uint8))
        places["host"] = LocalPlace(pools["host"], attention_kernels(host, policy.compute_threads), host)
    return places, KVCache(groups, pools)
