"""How many bytes of each tier weights and KV take, for shares of what fits."""

from __future__ import annotations

from flexgen.options import TIERS
from flexgen.plan.policy import Fractions


def placed_weights(weight_bytes: int, device: str, device_bytes: float, host_bytes: float, on_device: float, on_host: float) -> Fractions:
    """Home shares of so many bytes that use `on_device` and `on_host` (0 to 1) of the most that fits each tier."""
    whole = max(weight_bytes, 1)
    share = on_device * min(max(device_bytes, 0) / whole, 1.0) if device != "cpu" else 0.0
    host = on_host * min(max(host_bytes, 0) / whole, 1.0 - share)
    disk = 1.0 - share - host
    return Fractions(device=share, host=host, disk=disk if disk > 1e-9 else 0.0)


def kv_pools(free: dict[str, int], disk_bytes: int, kv_homes: float, kv_disk: float, *, staged: float = 0.0) -> dict[str, int]:
    """Pool bytes per tier.

    Args:
        kv_homes: 0 takes the device, 1 the host, a half all of both; between, a part of the one or of the other.
        kv_disk: the disk's share of all KV.
        staged: host bytes of staging that a byte on disk takes.
    """
    device = int(max(free["device"], 0) * min(2 - 2 * kv_homes, 1.0))
    room = max(free["host"], 0)
    host = int(room * min(2 * kv_homes, 1.0)) if free["device"] > 0 else room
    most = min(disk_bytes, int(room / staged) if staged else disk_bytes)
    if kv_disk >= 1:
        return {"device": 0, "host": 0, "disk": most}
    # Each byte on the host brings `ratio` bytes on disk, and these their staging on the host.
    ratio = kv_disk / (1 - kv_disk)
    host = min(host, int(max(room - staged * ratio * device, 0) / (1 + staged * ratio)))
    return {"device": device, "host": host, "disk": min(int((device + host) * ratio), most)}


def first_of(pools: dict[str, int], enough: int) -> dict[str, int]:
    """Pools that together have no more than `enough`: the fastest tiers keep what they have."""
    kept: dict[str, int] = {}
    for tier in TIERS:
        kept[tier] = min(pools[tier], enough)
        enough -= kept[tier]
    return kept


def pool_fractions(pools: dict[str, int]) -> Fractions:
    """The shares of all KV bytes that pools of these sizes stand for."""
    total = max(sum(pools.values()), 1)
    return Fractions(**{tier: size / total for tier, size in pools.items()})
